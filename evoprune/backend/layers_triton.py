"""Triton kernels of a decoder layer, which round where Hugging Face rounds. Triton comes with PyTorch for CUDA."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_norm(x, plus, weight, total, out, eps, wide, adds: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * wide
    at = tl.arange(0, block)
    here = at < wide
    value = tl.load(x + row + at, mask=here, other=0.0)
    if adds:
        value = (value.to(tl.float32) + tl.load(plus + row + at, mask=here, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row + at, value, mask=here)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / wide + eps)
    normed = (exact * scale).to(value.dtype).to(tl.float32)
    tl.store(out + row + at, normed * tl.load(weight + at, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _silu_times(x, out, wide, block: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    here = at < wide
    gate = tl.load(x + 2 * row * wide + at, mask=here, other=0.0)
    exact = gate.to(tl.float32)
    gate = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * wide + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * wide + at, gate * up, mask=here)


@triton.jit
def _rotate_put(
    x, cos, sin, query_norm, key_norm, out, keys, values, column, head_stride, column_stride, eps,
    more: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr,
    norms: tl.constexpr, placed: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, block)
    here = at < dim
    across = (at + dim // 2) % dim
    read = x + (row * (heads + 2 * kv_heads) + head) * dim
    value = tl.load(read + at, mask=here, other=0.0)
    to = row
    if placed:
        to += tl.load(column)
    if head < heads + kv_heads:
        other = tl.load(read + across, mask=here, other=0.0)
        if norms:
            weight = query_norm
            if head >= heads:
                weight = key_norm
            exact = value.to(tl.float32)
            scale = tl.rsqrt(tl.sum(exact * exact, 0) / dim + eps)
            mine = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
            theirs = tl.load(weight + across, mask=here, other=0.0).to(tl.float32)
            value = ((exact * scale).to(value.dtype).to(tl.float32) * mine).to(value.dtype)
            other = ((other.to(tl.float32) * scale).to(other.dtype).to(tl.float32) * theirs).to(other.dtype)
        turned = value.to(tl.float32) * tl.load(cos + row * dim + at, mask=here, other=0.0).to(tl.float32)
        beside = other.to(tl.float32) * tl.load(sin + row * dim + at, mask=here, other=0.0).to(tl.float32)
        value = (turned.to(value.dtype).to(tl.float32) + beside.to(value.dtype).to(tl.float32)).to(value.dtype)
    if head < heads:
        value = tl.where(here, value, tl.full((block,), 1.0, value.dtype))
        tl.store(out + (row * heads + head) * (dim + more) + at, value, mask=at < dim + more)
    elif head < heads + kv_heads:
        tl.store(keys + (head - heads) * head_stride + to * column_stride + at, value, mask=here)
    else:
        tl.store(values + (head - heads - kv_heads) * head_stride + to * column_stride + at, value, mask=here)


def add_norm(
    x: torch.Tensor, plus: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x + plus`, or `x` itself, and its RMS norm as of `decoder.norm`. `[rows, wide]`, contiguous."""
    wide, out = x.shape[1], torch.empty_like(x)
    total = x if plus is None else torch.empty_like(x)
    block = triton.next_power_of_2(wide)
    given = x, x if plus is None else plus, weight, total, out, eps, wide
    _add_norm[(len(x),)](*given, adds=plus is not None, block=block, num_warps=8 if block > 1024 else 4)
    return total, out


def silu_times(x: torch.Tensor) -> torch.Tensor:
    """`[rows, wide]`: SiLU of the first half of each row of `x`, `[rows, 2 * wide]`, times the second."""
    rows, wide = len(x), x.shape[1] // 2
    out = x.new_empty(rows, wide)
    _silu_times[(rows, triton.cdiv(wide, 1024))](x, out, wide, block=1024)
    return out


def rotate_put(
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor | None,
    more: int,
) -> torch.Tensor:
    """Norms queries and keys, where their heads have norms, and rotates them; keys and values are written where they belong.

    Args:
        x: `[L, (heads + 2 * kv_heads) * head_dim]`, queries, keys and values before that.
        places: cosines and sines, as of `decoder.rotation`.
        keys, values: `[kv_heads, n, at least head_dim]`, of the same strides; the first column is written to `column` of them,
            int64 `[1]`, or to the first.
        more: features behind those of a head, which are ones.

    Returns the queries, `[1, L, heads, head_dim + more]`.
    """
    rows, kv_heads = len(x), len(keys)
    dim = x.shape[1] // (heads + 2 * kv_heads)
    out = x.new_empty(1, rows, heads, dim + more)
    _rotate_put[(rows, heads + 2 * kv_heads)](
        x, *places, *(norms or (x, x)), out, keys, values, x if column is None else column, *keys.stride()[:2], eps,
        more=more, dim=dim, block=triton.next_power_of_2(dim + more), heads=heads, kv_heads=kv_heads,
        norms=norms is not None, placed=column is not None, num_warps=1,
    )  # fmt: skip
    return out

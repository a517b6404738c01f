"""The Triton kernel between the two products of the tower's attention: rotation, and the order in which groups read their keys."""

import torch
import triton
import triton.language as tl

from evoprune.backend.attention import NEVER


@triton.jit
def _rotate_into_groups(
    qkv, cos, sin, place, keys, weight, q, k, v, rows,
    heads: tl.constexpr, dim: tl.constexpr, more: tl.constexpr, root: tl.constexpr, least: tl.constexpr, half: tl.constexpr,
    gathers: tl.constexpr,
):  # fmt: skip
    """One unit's queries, for the first `rows` programs, or one key unit's keys and values: four patches of all heads."""
    at = tl.program_id(0).to(tl.int64)
    asks = at < rows
    to = tl.where(asks, at, at - rows)
    source = to
    if gathers:
        source = tl.load(keys + to, mask=at >= rows, other=0)
        source = tl.where(asks, to, source)
    each = tl.arange(0, 4 * heads)
    patch, head = each // heads, each % heads
    h = tl.arange(0, half)
    inside = (h < dim // 2)[None, :]
    turn = (tl.load(place + source) * 4 + patch)[:, None] * dim + h[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0)
    s = tl.load(sin + turn + dim // 2, mask=inside, other=0.0)
    which = tl.where(asks, 0, 1)
    wide: tl.constexpr = heads * dim
    read = (((source * 4 + patch) * 3 + which) * wide + head * dim)[:, None] + h[None, :]
    a = tl.load(qkv + read, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + read + dim // 2, mask=inside, other=0.0).to(tl.float32)
    write = ((to * 4 * heads + each) * (dim + more))[:, None] + h[None, :]
    kind = q.dtype.element_ty
    if asks:
        tl.store(q + write, (a * c - b * s).to(kind), mask=inside)
        tl.store(q + write + dim // 2, (b * c + a * s).to(kind), mask=inside)
    else:
        tl.store(k + write, (a * c - b * s).to(kind), mask=inside)
        tl.store(k + write + dim // 2, (b * c + a * s).to(kind), mask=inside)
    if gathers:
        both = inside & (h * 0 + at >= rows)[None, :]
        tl.store(v + write, tl.load(qkv + read + wide, mask=both, other=0.0), mask=both)
        last = tl.load(qkv + read + wide + dim // 2, mask=both, other=0.0)
        tl.store(v + write + dim // 2, last, mask=both)
    if more > 0:
        e = tl.arange(0, more)
        extra = ((to * 4 * heads + each) * (dim + more) + dim)[:, None] + e[None, :]
        if asks:
            tl.store(q + extra, tl.where(e < 2, 1.0, 0.0)[None, :].to(kind) + tl.zeros((4 * heads, more), kind))
        else:
            value = tl.load(weight + to)
            value = tl.where(value > 0, tl.log(tl.maximum(value, 1).to(tl.float32)), least) * root
            high = value.to(kind)
            low = (value - high.to(tl.float32)).to(kind)
            bias = tl.where(e == 0, high, tl.where(e == 1, low, 0.0))
            tl.store(k + extra, bias[None, :].to(kind) + tl.zeros((4 * heads, more), kind))
            tl.store(v + extra, tl.zeros((4 * heads, more), kind))


def rotate_into_groups(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor,
    heads: int,
    keys: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries `[R * 4, heads, d']`, and keys and values `[K * 4, heads, d']` in the order of groups, from `[R, 4, 3 * heads * d]`.

    Args:
        cos, sin: float32 `[places, 4, d]`, of the rotary embedding, the first half of the sines negated. place: int64 `[R]`.
        keys: int64 `[K]`, the row of each key; None where keys are the rows in their order, and values stay where they are.
        weight: int64 `[K]`, whose log is added to the scores by further dimensions (`vision.attention.with_bias`), or None.
    """
    rows, dim = len(qkv), qkv.shape[2] // (3 * heads)
    more = 0 if weight is None else 8
    gathers = keys is not None or more > 0
    total = rows if keys is None else len(keys)
    q = qkv.new_empty(rows * 4, heads, dim + more)
    k = qkv.new_empty(total * 4, heads, dim + more)
    v = torch.empty_like(k) if gathers else qkv.view(rows * 4, 3, heads, dim)[:, 2]
    if gathers and keys is None:
        keys = torch.arange(rows, dtype=torch.int64, device=qkv.device)
    _rotate_into_groups[rows + total,](
        qkv, cos, sin, place, place if keys is None else keys, place if weight is None else weight, q, k, v, rows,
        heads=heads, dim=dim, more=more, root=dim**0.5, least=-NEVER, half=triton.next_power_of_2(dim // 2), gathers=gathers,
    )  # fmt: skip
    return q, k, v

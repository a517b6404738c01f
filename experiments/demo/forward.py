"""The vision tower's forward pass, rewritten for CPU training. The weights and the output are the same as in the Hugging Face
class.

Because all clips in a batch have the same frame size, windows are batched with a few reshapes instead of a loop. Attention is
implemented with basic operations, because the fused kernel's backward pass is slow on CPUs.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F


@lru_cache(maxsize=32)
def window_buckets(height: int, width: int, side: int = 4) -> list[torch.Tensor]:
    """Return the windows of a height x width grid (in units) as raster indices: int64 `[windows, units]` for each window size."""
    index = torch.arange(height * width).view(height, width)
    windows = [
        index[y : y + side, x : x + side].flatten() for y in range(0, height, side) for x in range(0, width, side)
    ]
    sizes = sorted({len(w) for w in windows})
    return [torch.stack([w for w in windows if len(w) == n]) for n in sizes]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    with torch.autocast(
        "cpu", enabled=False
    ):  # softmax already sums in float32; autocast would make float32 copies of its inputs
        weights = scores.softmax(-1)
    return weights.to(v.dtype) @ v


def tower(visual, patches: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the vision tower on G grids of height x width units.

    Args:
        visual: The vision tower, `model.model.visual`.
        patches: `[G * height * width * 4, 1176]` in Hugging Face's order.
        height: The grid height, in units.
        width: The grid width, in units.

    Returns:
        The merged features `[G, units, D]` and the last layer's patch states `[G, units, 4 * hidden]`, both in raster order.
    """
    units = height * width
    x = F.linear(patches, visual.patch_embed.proj.weight.flatten(1)).float()  # the residual stream stays in float32
    grids = x.shape[0] // (units * 4)
    x = x.view(grids, units * 4, -1)
    y, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inner = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    where = torch.stack(
        [(y.flatten()[:, None] * 2 + inner[0]).flatten(), (xs.flatten()[:, None] * 2 + inner[1]).flatten()]
    )
    # Sort rows by window, so that each window is a slice.
    buckets = window_buckets(height, width)
    order = torch.cat([b.flatten() for b in buckets])
    x = x.view(grids, units, 4, -1)[:, order].flatten(1, 2)
    where = where.view(2, units, 4)[:, order].flatten(1)
    freqs = (where[..., None].float() * visual.rotary_pos_emb.inv_freq).transpose(0, 1).flatten(1)
    cos, sin = (f(freqs).repeat(1, 2)[None, :, None] for f in (torch.cos, torch.sin))
    for layer, block in enumerate(visual.blocks):
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).view(grids, units * 4, 3, heads, -1).unbind(2)
        qkv = torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v.to(q.dtype)])
        if layer in visual.fullatt_block_indexes:
            out = attend(*qkv.transpose(2, 3)).transpose(1, 2)
        else:
            parts = []
            for bucket, part in zip(buckets, qkv.split([b.numel() * 4 for b in buckets], 2), strict=True):
                windows, size = bucket.shape
                part = part.reshape(3, grids * windows, size * 4, heads, -1)
                part = attend(*part.transpose(2, 3)).transpose(1, 2)
                parts.append(part.reshape(grids, windows * size * 4, heads, -1))
            out = torch.cat(parts, 1)
        x = x + block.attn.proj(out.reshape(grids, units * 4, -1).to(x.dtype))
        x = x + block.mlp(block.norm2(x))
    flat = visual.merger.ln_q(x).view(grids, units, -1)[:, order.argsort()]
    return visual.merger.mlp(flat), flat

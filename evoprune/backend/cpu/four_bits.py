"""The layout of 4-bit weights for `rows.c`. Each block of 32 weights has a scale.

Eight blocks form a chunk of 144 bytes. The first 128 bytes contain the weights, from 0 to 15, where 8 represents zero. Each group
of 32 bytes contains two blocks, the first one in the low halves of the bytes. The last 16 bytes of the chunk contain the scales in
bf16. The last chunk of a row of weights is padded with zeros.
"""

import torch
from torch import nn

BLOCK = 32
BLOCKS = 8  # in a chunk
CHUNK_BYTES = BLOCKS * (BLOCK // 2 + 2)
# The weight with the largest magnitude in a block becomes one of these numbers, whichever gives the smallest squared error.
ENDS = (-8, -8.5, -7)


def packed_bytes(length: int) -> int:
    """Return the number of bytes of a row of `length` packed weights."""
    return -(-length // (BLOCK * BLOCKS)) * CHUNK_BYTES


def room_bytes(length: int) -> int:
    """Return the bytes of working memory that a layer with weights of this length needs for each row."""
    return 4 * length + packed_bytes(length) // CHUNK_BYTES * BLOCKS * (BLOCK + 8)


def pack(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights to 4 bits.

    Args:
        weights: `[N, K]`.

    Returns:
        The packed weights, uint8 `[N, packed_bytes(K)]`, and the scale of each row for `compiled.unpack`, float32 `[N]`.
    """
    count = len(weights)
    blocks = nn.functional.pad(weights.float(), (0, -weights.shape[1] % (BLOCK * BLOCKS))).view(count, -1, BLOCK)
    low, high = blocks.aminmax(dim=-1, keepdim=True)
    largest = torch.where(-low > high, low, high)
    least = torch.full_like(largest, torch.inf)
    whole, scale = torch.zeros_like(blocks), torch.zeros_like(largest, dtype=torch.bfloat16)
    for end in ENDS:
        step = (largest / end).bfloat16()
        inverse = torch.where(step == 0, 0.0, 1 / step.float())
        numbers = (blocks * inverse).round_().clamp_(-8, 7)
        error = torch.addcmul(blocks, numbers, step.float(), value=-1).square_().sum(-1, keepdim=True)
        better = ~(error >= least)  # also True for NaN, so that weights that are no numbers don't become zero
        least, whole, scale = (torch.where(better, *both) for both in ((error, least), (numbers, whole), (step, scale)))
    rows = (whole.abs() * scale.float().abs()).amax((1, 2)).clamp_(min=1e-12) / 127
    first, second = whole.add_(8).to(torch.uint8).view(count, -1, BLOCKS // 2, 2, BLOCK).unbind(3)
    chunks = (first | second << 4).flatten(2), scale.view(count, -1, BLOCKS).view(torch.uint8)
    return torch.cat(chunks, -1).flatten(1), rows

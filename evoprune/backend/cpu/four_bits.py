"""4-bit weights and their products, which `rows.c` computes. Each block of 32 weights has a scale.

Eight blocks form a chunk of 144 bytes. The first 128 bytes contain the weights, from 0 to 15, where 8 represents zero. Each group
of 32 bytes contains two blocks, the first one in the low halves of the bytes. The last 16 bytes of the chunk contain the scales in
bf16. The last chunk of a row of weights is padded with zeros.
"""

import torch
from torch import nn

from evoprune.backend.cpu.rows import library

BLOCK = 32
BLOCKS = 8  # in a chunk
CHUNK_BYTES = BLOCKS * (BLOCK // 2 + 2)
# The weight with the largest magnitude in a block becomes one of these numbers, whichever gives the smallest squared error.
ENDS = (-8, -8.5, -7)


def is_supported() -> bool:
    """Return True if `rows.c` was compiled when evoprune was installed, and this CPU can run it."""
    return library() is not None


def packed_bytes(length: int) -> int:
    """Return the number of bytes of a row of `length` packed weights."""
    return -(-length // (BLOCK * BLOCKS)) * CHUNK_BYTES


def pack(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round weights to 4 bits.

    Args:
        weights: `[N, K]`.

    Returns:
        The packed weights, uint8 `[N, packed_bytes(K)]`, and the scale of each row for `unpack`, float32 `[N]`.
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
        better = error < least
        least, whole, scale = (torch.where(better, *both) for both in ((error, least), (numbers, whole), (step, scale)))
    rows = (whole.abs() * scale.float().abs()).amax((1, 2)).clamp_(min=1e-12) / 127
    first, second = whole.add_(8).to(torch.uint8).view(count, -1, BLOCKS // 2, 2, BLOCK).unbind(3)
    chunks = (first | second << 4).flatten(2), scale.view(count, -1, BLOCKS).view(torch.uint8)
    return torch.cat(chunks, -1).flatten(1), rows


def product(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Multiply rows by packed weights. Rows are rounded to 8 bits, with a scale for each block of 32 numbers.

    Args:
        x: `[R, K]`.
        packed: Weights returned by `pack`, `[N, packed_bytes(K)]`.

    Returns:
        float32 `[R, N]`. A row's result doesn't depend on the other rows.
    """
    if x.dtype != torch.float32 or not x.is_contiguous():
        x = x.float().contiguous()
    rows, length = x.shape
    outputs = len(packed)
    blocks = packed.shape[1] // CHUNK_BYTES * BLOCKS
    y = torch.empty(rows, outputs, dtype=torch.float32, device="cpu")
    whole = torch.empty(rows, blocks * BLOCK, dtype=torch.int8, device="cpu")
    steps = torch.empty(2, rows, blocks, dtype=torch.float32, device="cpu")
    pointers = (tensor.data_ptr() for tensor in (x, packed, y, whole, steps))
    library().evoprune_row_product4(*pointers, rows, length, blocks, outputs, torch.get_num_threads())
    return y


def unpack(packed: torch.Tensor, scale: torch.Tensor, length: int) -> torch.Tensor:
    """Unpack weights to 8 bits.

    Args:
        packed, scale: As returned by `pack`.
        length: The number of weights in a row, a multiple of 32.

    Returns:
        int8 `[N, length]`. Multiplied by `scale`, these are the weights with a small error.
    """
    outputs = len(packed)
    blocks = packed.shape[1] // CHUNK_BYTES * BLOCKS
    whole = torch.empty(outputs, length, dtype=torch.int8, device="cpu")
    pointers = packed.data_ptr(), scale.data_ptr(), whole.data_ptr()
    library().evoprune_unpack4(*pointers, length, blocks, outputs, torch.get_num_threads())
    return whole

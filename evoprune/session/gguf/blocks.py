"""Dequantize the blocks of GGUF tensors. ggml-quants.c in llama.cpp defines the block layouts.

The results are bit-identical to llama.cpp, because all products and sums are computed in float32 in the same order.
"""

from collections.abc import Callable

import torch

from evoprune.session.gguf.reader import Kind

# Approximate number of values to dequantize at a time, so that intermediate results fit in a cache. PyTorch computes the scales of
# so few blocks in a single thread, which is faster than waiting for other threads.
PIECE = 2**19
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The values of 4-bit codes in IQ4_NL and IQ4_XS, and in MXFP4, where they are doubled.
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize(data: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Return the values of quantized blocks, float32 `[values]`.

    Args:
        data: The bytes of the blocks, uint8 `[bytes]`.
        kind: The type of the blocks, which must be quantized.
    """
    blocks = data.view(-1, kind.size)
    values = torch.empty(len(blocks), kind.values, dtype=torch.float32, device="cpu")
    step = max(1, PIECE // kind.values)
    for piece, room in zip(blocks.split(step), values.split(step), strict=True):
        room.copy_(DEQUANTIZE[kind.name](piece).view(len(piece), kind.values))
    return values.view(-1)


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 number at a position in each block, as float32 `[blocks, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _signed(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int8)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Split `[blocks, ..., n]` bytes into `[blocks, ..., 2, n]` codes: the lower four bits, then the upper four bits."""
    return torch.stack([packed & 15, packed >> 4], -2)


def _bits(packed: torch.Tensor, width: int) -> torch.Tensor:
    """Split `[..., n]` bytes into `[..., 8 / width, n]` codes of `width` bits, beginning with the lowest bits."""
    return torch.stack([(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)], -2)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the bits of four bytes as the fifth bits of 32 codes, `[blocks, 32]`."""
    shifts = torch.arange(8, dtype=torch.uint8, device="cpu")
    return (((blocks[:, at : at + 4, None] >> shifts) & 1) << 4).flatten(1)


def _q4_0(blocks):
    return (_nibbles(blocks[:, 2:]).flatten(1).float() - 8) * _half(blocks, 0)


def _q4_1(blocks):
    return _nibbles(blocks[:, 4:]).flatten(1).float() * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks):
    codes = _nibbles(blocks[:, 6:]).flatten(1) | _fifth_bits(blocks, 2)
    return (codes.float() - 16) * _half(blocks, 0)


def _q5_1(blocks):
    codes = _nibbles(blocks[:, 8:]).flatten(1) | _fifth_bits(blocks, 4)
    return codes.float() * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks):
    return _signed(blocks[:, 2:]).float().mul_(_half(blocks, 0))


def _q2_k(blocks):
    scales = _nibbles(blocks[:, :16]).float()  # [blocks, 2, 16]: scales, then minimums
    codes = _bits(blocks[:, 16:80].view(-1, 2, 32), 2).view(-1, 16, 16).float()
    scale = scales[:, 0] * _half(blocks, 80)
    least = scales[:, 1] * _half(blocks, 82)
    return codes * scale[:, :, None] - least[:, :, None]


def _q3_k(blocks):
    low = _bits(blocks[:, 32:96].view(-1, 2, 32), 2).view(-1, 16, 16)
    high = _bits(blocks[:, :32], 1).view(-1, 16, 16)
    codes = _signed(low) - ((high ^ 1) << 2).view(torch.int8)
    # The lower four bits of 16 scales, then the upper two bits
    scales = _nibbles(blocks[:, 96:104]).flatten(1) | (_bits(blocks[:, 104:108], 2).flatten(1) << 4)
    scale = (_signed(scales) - 32).float() * _half(blocks, 108)
    return codes.float() * scale[:, :, None]


def _scales_of_8(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales and minimums of the eight parts of Q4_K and Q5_K blocks, float32 `[blocks, 8, 1]`."""
    low, mid, high = blocks[:, 4:16].view(-1, 3, 4).unbind(1)
    scales = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], 1)
    least = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], 1)
    return (scales.float() * _half(blocks, 0))[:, :, None], (least.float() * _half(blocks, 2))[:, :, None]


def _q4_k(blocks):
    scale, least = _scales_of_8(blocks)
    return _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32).float() * scale - least


def _q5_k(blocks):
    scale, least = _scales_of_8(blocks)
    codes = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32) | (_bits(blocks[:, 16:48], 1) << 4)
    return codes.float() * scale - least


def _q6_k(blocks):
    low = _nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    high = _bits(blocks[:, 128:192].view(-1, 2, 32), 2)
    codes = _signed(low | (high << 4)) - 32
    scale = _signed(blocks[:, 192:208]).float() * _half(blocks, 208)
    return codes.view(-1, 16, 16).float() * scale[:, :, None]


def _from_table(table: tuple[int, ...], codes: torch.Tensor) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float32, device="cpu")[codes.int()]


def _iq4_nl(blocks):
    return _from_table(IQ4, _nibbles(blocks[:, 2:]).flatten(1)) * _half(blocks, 0)


def _iq4_xs(blocks):
    # The lower four bits of eight scales, then the upper two bits
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], 2).flatten(1)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device="cpu")
    high = ((blocks[:, 2:4, None] >> shifts) & 3).flatten(1)
    scale = (_signed(low | (high << 4)) - 32).float() * _half(blocks, 0)
    return _from_table(IQ4, _nibbles(blocks[:, 8:].view(-1, 8, 16)).view(-1, 8, 32)) * scale[:, :, None]


def _mxfp4(blocks):
    exponent = blocks[:, :1].int()
    # Half of 2 to the power of (exponent - 127). The two smallest results are subnormal numbers.
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return _from_table(MXFP4, _nibbles(blocks[:, 1:]).flatten(1)) * bits.view(torch.float32)


DEQUANTIZE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs, "MXFP4": _mxfp4,
}  # fmt: skip

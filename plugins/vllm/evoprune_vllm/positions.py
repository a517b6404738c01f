"""Computes the M-RoPE positions of a prompt with pruned videos. Does not import vLLM.

By Qwen's rule (`language.prompt`), the text after a video starts at the end of the video, regardless of which tokens are kept. So
all positions are known before anything is encoded, except inside pruned videos.

A placeholder of a pruned video has the position `-1 - start`, and `start` is the video's position. The encoder appends each token's
position, counted from `start`, to its features, in digits below 256, which bfloat16 and float16 represent exactly. Each position is
written only once, because chunked and interrupted requests deliver some features again.

The 32 bits of a token's bias (model.py) travel in the upper bits of its three positions, which vLLM passes to every layer.
"""

from collections.abc import Sequence

import torch

from evoprune.methods import arange_on

DIGITS = (3, 3, 3, 4)  # digits below 256 for time, height, width, and the bits of the bias
COLUMNS = sum(DIGITS)  # columns appended to a token's features
# Bits of a position. The other 11 bits of a positive int32 are free.
BITS = 20
LIMIT = 2**20
FREE = 2**11 - 1


def extent(grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None) -> int:
    """Return the number of positions from the start of a video to the start of the text after it."""
    clock = 1.0 if tokens_per_second is None else seconds_per_pair * tokens_per_second
    return max(int((grid[0] - 1) * clock) + 1, *grid[1:])


def known_positions(
    length: int, items: Sequence[tuple[int, int, int, torch.Tensor | None]]
) -> tuple[torch.Tensor, int]:
    """Return a prompt's positions before its videos are encoded, and the offset from a generated token's index to its position.

    Args:
        items: for each video and picture, in order: the index of its first placeholder, the number of placeholders, its extent, and
            its positions, int64 `[3, n]` counted from its own, or None if they are not known yet.

    Returns:
        Positions, int64 `[3, length]`, negative at placeholders of pruned videos, and the offset.
    """
    pieces = []
    at = 0
    following = 0
    for start, count, more, known in items:
        pieces.append((arange_on(start - at, "cpu") + following).expand(3, -1))
        following += start - at
        if known is None:
            pieces.append(torch.full((3, count), -1 - following, dtype=torch.int64, device="cpu"))
        else:
            pieces.append(known + following)
        following += more
        at = start + count
    pieces.append((arange_on(length - at, "cpu") + following).expand(3, -1))
    return torch.cat(pieces, dim=1), following - at


def generated_offset(positions: torch.Tensor) -> int:
    """Return the offset of `known_positions` from a prompt's positions, `[3, length]`.

    The prompt must not end with a pruned video.
    """
    return int(positions[:, -1].remainder(LIMIT).max()) + 1 - positions.shape[1]


def as_columns(positions: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Encode positions and biases as the columns to append to a video's features.

    Args:
        positions: int64 `[3, K]`, below 2**24, counted from the video's own position.
        bias: float32 `[K]`.

    Returns:
        `[K, COLUMNS]`, integers below 256 in the dtype of the features.
    """
    numbers = [*positions, bias.float().view(torch.int32).long()]
    columns = [(row >> 8 * i) & 255 for row, digits in zip(numbers, DIGITS, strict=True) for i in range(digits)]
    return torch.stack(columns, 1).to(dtype)


def from_columns(columns: torch.Tensor) -> torch.Tensor:
    """Decode the columns of `as_columns` to int64 `[3, K]`: positions with the bias in their upper bits."""
    parts = columns.T.long().split(DIGITS)
    *rows, bits = (sum(digit << 8 * i for i, digit in enumerate(part)) for part in parts)
    return torch.stack([row + ((bits >> 11 * i) & FREE) * LIMIT for i, row in enumerate(rows)])


def split_bias(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions, int64 or int32 `[3, n]`, into positions without the bias, and the bias, float32 `[n]`."""
    upper = (positions.long() >> BITS) & FREE
    bits = upper[0] + (upper[1] << 11) + (upper[2] << 22)
    bits = bits - ((bits >> 31) << 32)  # to a signed number
    return positions & (LIMIT - 1), bits.to(torch.int32).view(torch.float32)


def with_videos(positions: torch.Tensor, places: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return `positions`, int64 `[3, length]`, with `found` (from `from_columns`) written at `places`, `[n]`.

    Only negative positions, which are not yet written, are replaced.
    """
    before = positions[:, places]
    made = positions.clone()
    made[:, places] = torch.where(before < 0, found - 1 - before, before)
    return made

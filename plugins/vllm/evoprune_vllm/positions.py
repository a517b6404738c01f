"""Computes M-RoPE positions for prompts with pruned videos. Does not import vLLM.

In Qwen models, the text after a video starts at the position where the unpruned video would end, regardless of which tokens are
kept (see `language.prompt`). Therefore, all positions outside pruned videos are known before encoding.

Until a pruned video is encoded, its placeholders have the position `-1 - start`, where `start` is the video's own position. The
encoder appends each token's position, relative to `start`, to its features. The position is split into digits below 256, which
bfloat16 and float16 represent exactly. Each prompt position is written only once because the same features may be delivered again
if a request is chunked or interrupted.

The 32 bits of a token's bias (see model.py) are stored in the upper bits of its three positions, which vLLM passes to each layer.
"""

from collections.abc import Sequence

import torch

from evoprune.methods import arange_on

DIGITS = (3, 3, 3, 4)  # number of digits for the time, the height, the width, and the bias bits
COLUMNS = sum(DIGITS)  # number of columns appended to a token's features
# Number of bits in a position. A positive int32 has 11 more bits, which are free for other data.
BITS = 20
LIMIT = 2**20
FREE = 2**11 - 1


def extent(grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None) -> int:
    """Return the number of M-RoPE positions from the start of a video to the start of the following text."""
    clock = 1.0 if tokens_per_second is None else seconds_per_pair * tokens_per_second
    return max(int((grid[0] - 1) * clock) + 1, *grid[1:])


def known_positions(
    length: int, items: Sequence[tuple[int, int, int, torch.Tensor | None]]
) -> tuple[torch.Tensor, int]:
    """Return the prompt positions known before the videos are encoded.

    Args:
        items: A tuple for each video and image, in order: the index of the first placeholder, the number of placeholders, the
            `extent`, and the token positions relative to the start, int64 `[3, n]`, or None if not known yet.

    Returns:
        The positions, int64 `[3, length]`, which are negative at the placeholders of pruned videos, and the offset to add to the
        index of a generated token to get its position.
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
    """Return the offset from a generated token's index to its position, given the prompt positions (`[3, length]`).

    The prompt must not end with a pruned video.
    """
    return int(positions[:, -1].remainder(LIMIT).max()) + 1 - positions.shape[1]


def as_columns(positions: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Encode token positions and biases as additional columns for a video's features.

    Args:
        positions: int64 `[3, K]`, below 2**24, relative to the video's own position.
        bias: float32 `[K]`.

    Returns:
        Integers below 256, `[K, COLUMNS]`, in the features' dtype, `dtype`.
    """
    numbers = [*positions, bias.float().view(torch.int32).long()]
    columns = [(row >> 8 * i) & 255 for row, digits in zip(numbers, DIGITS, strict=True) for i in range(digits)]
    return torch.stack(columns, 1).to(dtype)


def from_columns(columns: torch.Tensor) -> torch.Tensor:
    """Decode columns returned by `as_columns` into positions with the bias in their upper bits, int64 `[3, K]`."""
    parts = columns.T.long().split(DIGITS)
    *rows, bits = (sum(digit << 8 * i for i, digit in enumerate(part)) for part in parts)
    return torch.stack([row + ((bits >> 11 * i) & FREE) * LIMIT for i, row in enumerate(rows)])


def split_bias(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split int64 or int32 positions `[3, n]` containing a bias into the plain positions and the bias, float32 `[n]`."""
    upper = (positions.long() >> BITS) & FREE
    bits = upper[0] + (upper[1] << 11) + (upper[2] << 22)
    bits = bits - ((bits >> 31) << 32)  # convert to a signed number
    return positions & (LIMIT - 1), bits.to(torch.int32).view(torch.float32)


def with_videos(positions: torch.Tensor, places: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return a copy of the prompt positions with the positions of pruned videos filled in.

    Only negative positions are replaced because all others are already known.

    Args:
        positions: int64 `[3, length]`.
        places: The indices of video placeholders in the prompt, `[n]`.
        found: The positions at these indices, as returned by `from_columns`, `[3, n]`, relative to each video's own position.
    """
    before = positions[:, places]
    made = positions.clone()
    made[:, places] = torch.where(before < 0, found - 1 - before, before)
    return made

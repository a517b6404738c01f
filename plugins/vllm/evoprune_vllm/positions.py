"""Positions (M-RoPE) of a prompt whose videos are pruned. No vLLM here.

By Qwen's rule (`language.prompt`) the text after a video starts where the video ends, whichever tokens are kept. So all positions
but those of pruned videos are known before anything is encoded. A placeholder of a pruned video has `-1 - start`, the position of
the video, until the encoder appends the positions of each token, counted from `start`, to its features: in digits below 256, which
bfloat16 and float16 hold exactly. A position is written once, because chunks and interrupted requests bring some features again.
The 32 bits of a token's bias (model.py) travel in the upper bits of its three positions, which vLLM hands to every layer.
"""

from collections.abc import Sequence

import torch

from evoprune.methods import arange_on

DIGITS = (3, 3, 3, 4)  # below 256: of time, height, width, and the bits of the bias
COLUMNS = sum(DIGITS)  # that the encoder appends to the features of each token
# of a position; the other 11 bits of a positive int32 are free
BITS = 20
LIMIT = 2**20
FREE = 2**11 - 1


def extent(grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None) -> int:
    """Return how many positions the text after a video starts later than the video itself."""
    clock = 1.0 if tokens_per_second is None else seconds_per_pair * tokens_per_second
    return max(int((grid[0] - 1) * clock) + 1, *grid[1:])


def known_positions(
    length: int, items: Sequence[tuple[int, int, int, torch.Tensor | None]]
) -> tuple[torch.Tensor, int]:
    """Return the positions of a prompt before its videos are encoded: int64 `[3, length]`, negative at placeholders of pruned
    videos.

    And the number that vLLM adds to the index of a generated token to get its position. `items`: of each video and picture, in
    order, its first placeholder, how many it has, its extent, and their positions, int64 `[3, n]` counted from its own, where they
    are known.
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
    """Return the number of `known_positions` for a prompt that does not end with a pruned video, from its positions `[3,
    length]`.
    """
    return int(positions[:, -1].remainder(LIMIT).max()) + 1 - positions.shape[1]


def as_columns(positions: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what the encoder appends to the features of a video's tokens: `[K, COLUMNS]`, integers below 256 in the features'
    dtype.

    `positions`: int64 `[3, K]`, below 2**24, counted from the video's own. `bias`: float32 `[K]`.
    """
    numbers = [*positions, bias.float().view(torch.int32).long()]
    columns = [(row >> 8 * i) & 255 for row, digits in zip(numbers, DIGITS, strict=True) for i in range(digits)]
    return torch.stack(columns, 1).to(dtype)


def from_columns(columns: torch.Tensor) -> torch.Tensor:
    """Return int64 `[3, K]`: positions with the bias in their upper bits, from what `as_columns` returned."""
    parts = columns.T.long().split(DIGITS)
    *rows, bits = (sum(digit << 8 * i for i, digit in enumerate(part)) for part in parts)
    return torch.stack([row + ((bits >> 11 * i) & FREE) * LIMIT for i, row in enumerate(rows)])


def split_bias(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return positions without the bias, and the bias, float32 `[n]`; from int64 or int32 `[3, n]`."""
    upper = (positions.long() >> BITS) & FREE
    bits = upper[0] + (upper[1] << 11) + (upper[2] << 22)
    bits = bits - ((bits >> 31) << 32)  # as a signed number
    return positions & (LIMIT - 1), bits.to(torch.int32).view(torch.float32)


def with_videos(positions: torch.Tensor, places: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return `positions` (int64 `[3, length]`, negative where unwritten) with `found` (`from_columns`) at `places` (`[n]`)."""
    before = positions[:, places]
    made = positions.clone()
    made[:, places] = torch.where(before < 0, found - 1 - before, before)
    return made

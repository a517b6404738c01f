"""The positions of prompt tokens in time, height and width (M-RoPE).

Qwen2.5-VL rotates queries and keys by three positions at once. Text has the same number in all three; a video token has
the time of its frame pair and the row and column of its unit, counted from where the video starts. Qwen2-VL counts frame
pairs instead of time. Text after a video continues at *the largest position so far plus one* (Qwen2-VL, arXiv 2409.12191,
section 2.1; the models were trained so).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.pruning.indices import ascending


@dataclass(frozen=True)
class VisualSpan:
    """A video inside a prompt, or a picture, which is one frame pair.

    Attributes:
        start: index of its first token.
        grid: (T, H, W): frame pairs, and rows and columns of units.
        seconds_per_pair: time from one frame pair to the next, in seconds, with fractions; of one frame pair it does not matter.
    """

    start: int
    grid: tuple[int, int, int]
    seconds_per_pair: float

    @property
    def tokens(self) -> int:
        t, h, w = self.grid
        return t * h * w


def video_positions(
    grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None
) -> torch.Tensor:
    """Positions of a video's units, counted from its own start.

    Args:
        grid: (T, H, W): frame pairs, and rows and columns of units.
        seconds_per_pair: time from one frame pair to the next.
        tokens_per_second: time positions per second (`config.VisionConfig`); None for one per frame pair.

    Returns:
        int64 `[3, T*H*W]`: time, height, width; frame pair after frame pair, units in raster order.
    """
    t, h, w = grid
    # In float64, and rounded down once at the end: multiples of a rounded step would drift.
    step = 1.0 if tokens_per_second is None else seconds_per_pair * tokens_per_second
    clock = (torch.arange(t, dtype=torch.float64, device="cpu") * step).floor().long()
    return torch.stack(torch.meshgrid(clock, ascending(h, "cpu"), ascending(w, "cpu"), indexing="ij")).flatten(1)


def prompt_positions(length: int, videos: Sequence[VisualSpan], tokens_per_second: float | None) -> torch.Tensor:
    """M-RoPE positions of an unpruned prompt of `length` tokens, by Qwen's rule.

    Args:
        length: number of tokens, including video tokens.
        videos: the videos and pictures in it, in order and without overlap.
        tokens_per_second: see `video_positions`.

    Returns:
        int64 `[3, length]`. The first generated token has the position `positions.max() + 1`.

    Raises:
        ValueError: a video overlaps another or does not fit into the prompt.
    """
    pieces, at, following = [], 0, 0
    for video in videos:
        if video.start < at or video.start + video.tokens > length:
            raise ValueError(f"video at {video.start} with {video.tokens} tokens does not fit the prompt")
        pieces.append((ascending(video.start - at, "cpu") + following).expand(3, -1))
        following += video.start - at
        inside = video_positions(video.grid, video.seconds_per_pair, tokens_per_second) + following
        pieces.append(inside)
        following = int(inside.max()) + 1
        at = video.start + video.tokens
    pieces.append((ascending(length - at, "cpu") + following).expand(3, -1))
    return torch.cat(pieces, dim=1)

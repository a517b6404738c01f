"""The encoder's result: the tokens of a video, and the row that represents each of its units."""

from dataclasses import dataclass
from itertools import accumulate

import torch

from evoprune.pruning.indices import ascending


@dataclass(frozen=True, repr=False)
class Encoded:
    """One encoded video, or several in a row, as the language model reads them.

    Attributes:
        features: `[K, D]`, the tokens.
        kept: int64 `[K]`, the unit whose position each token has, ascending in Hugging Face's order.
        rows: `[E, D]`, the encoder's rows, ordered by unit.
        owner: int64 `[N]`, the index in `rows` of the row that represents each unit, -1 for none.
        grids: (T, H, W) in units, of each video.
        layers: (layer, rows that it computes), summed over the videos.
        prune_seconds: time spent on scores, merging and selection; part of the encoding time.
        flat: whether every frame pair has one colour, so that no unit differs from another.
        size: float32 `[K]`, the weight of each token in the language model's attention, which adds log(size) to its logits: in
            `evoprune` (cluster size) ** count, that is the square root by default. None for 1 each.
    """

    features: torch.Tensor
    kept: torch.Tensor
    rows: torch.Tensor
    owner: torch.Tensor
    grids: tuple[tuple[int, int, int], ...]
    layers: list[tuple[int, int]]
    prune_seconds: float
    flat: bool = False
    size: torch.Tensor | None = None

    def __repr__(self) -> str:
        tokens, width = self.features.shape
        return f"<Encoded: {tokens:,} of {len(self.owner):,} visual tokens, {width} numbers each, grids {list(self.grids)}>"

    @property
    def live_share(self) -> float:
        """The live share: the mean over the layers of rows computed / units. The tower's time is proportional to it."""
        return sum(rows for _, rows in self.layers) / len(self.layers) / len(self.owner)

    @property
    def kept_per_pair(self) -> list[int]:
        """Number of tokens in each frame pair, video after video."""
        edges = [h * w for t, h, w in self.grids for _ in range(t)]
        pair = ascending(len(edges), "cpu").repeat_interleave(torch.tensor(edges, dtype=torch.int64, device="cpu"))
        return torch.bincount(pair[self.kept.cpu()], minlength=len(edges)).tolist()


def joined(videos: list[Encoded]) -> Encoded:
    """Several videos as one; the numbers of units and rows continue from video to video."""
    if len(videos) == 1:
        return videos[0]
    units = [0, *accumulate(len(v.owner) for v in videos)]
    rows = [0, *accumulate(len(v.rows) for v in videos)]
    return Encoded(
        torch.cat([v.features for v in videos]),
        torch.cat([v.kept + first for v, first in zip(videos, units, strict=False)]),
        torch.cat([v.rows for v in videos]),
        torch.cat([torch.where(v.owner >= 0, v.owner + first, -1) for v, first in zip(videos, rows, strict=False)]),
        sum((v.grids for v in videos), ()),
        [(layers[0][0], sum(n for _, n in layers)) for layers in zip(*(v.layers for v in videos), strict=True)],
        sum(v.prune_seconds for v in videos),
        all(v.flat for v in videos),
        _joined_sizes(videos),
    )


def _joined_sizes(videos: list[Encoded]) -> torch.Tensor | None:
    if all(v.size is None for v in videos):
        return None
    return torch.cat(
        [v.features.new_ones(len(v.kept), dtype=torch.float32) if v.size is None else v.size for v in videos]
    )

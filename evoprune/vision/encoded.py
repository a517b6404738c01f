"""The encoder's result: the tokens of a video, and the row that represents each of its units."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch

from evoprune.backend import devices
from evoprune.errors import UsageError
from evoprune.methods.chain import select, tokens_before_inflection
from evoprune.methods.plans import EncoderPlan, Inflection
from evoprune.methods.types import Selection, Tokens, ascending, tally
from evoprune.model.numerics import not_a_number_error


@dataclass(frozen=True, repr=False)
class Encoded:
    """One encoded video, or several in a row, as the language model reads them."""

    features: torch.Tensor  # `[K, D]`, the tokens
    kept: torch.Tensor  # int64 `[K]`, the unit whose position each token has, ascending in Hugging Face's order
    rows: torch.Tensor  # `[E, D]`, the encoder's rows, ordered by unit
    owner: torch.Tensor  # int64 `[N]`, the index in `rows` of the row that represents each unit, -1 for none
    grids: tuple[tuple[int, int, int], ...]  # (T, H, W) in units, of each video
    layers: list[tuple[int, int]]  # (layer, rows that it computes), summed over the videos
    prune_seconds: float  # spent on scores, merging and selection; part of the encoding time
    flat: bool = False  # whether every frame pair has one colour, so that no unit differs from another
    # float32 `[K]`, the weight of each token in the language model's attention, which adds log(size) to its logits: in `evoprune`
    # (cluster size) ** count, that is the square root by default. None for 1 each.
    size: torch.Tensor | None = None
    # `[n, K, D]`, added to the tokens after the first n layers of the language model
    deepstack: torch.Tensor | None = None
    read: torch.Tensor | None = None  # `kept` on the CPU, if it has been read

    def __repr__(self) -> str:
        tokens, width = self.features.shape
        return f"<Encoded: {tokens:,} of {len(self.owner):,} visual tokens, {width} numbers each, grids {list(self.grids)}>"

    @property
    def live_share(self) -> float:
        """The live share: the mean over the layers of rows computed / units. The tower's time is proportional to it."""
        return sum(rows for _, rows in self.layers) / len(self.layers) / len(self.owner)

    @cached_property
    def kept_here(self) -> torch.Tensor:
        """`kept` on the CPU, read once: from an accelerator it waits."""
        return self.kept.cpu() if self.read is None else self.read

    @property
    def every_feature(self) -> torch.Tensor:
        """`[(1 + n) K, D]`: the tokens, and behind them what DeepStack adds to them."""
        return torch.cat([self.features, *(() if self.deepstack is None else self.deepstack)])

    @property
    def kept_per_pair(self) -> list[int]:
        """Number of tokens in each frame pair, video after video."""
        edges = [h * w for t, h, w in self.grids for _ in range(t)]
        pair = ascending(len(edges), "cpu").repeat_interleave(torch.tensor(edges, dtype=torch.int64, device="cpu"))
        return torch.bincount(pair[self.kept_here], minlength=len(edges)).tolist()


def joined(videos: list[Encoded]) -> Encoded:
    """Several videos as one; the numbers of units and rows continue from video to video."""
    if len(videos) == 1:
        return videos[0]
    units = [0, *accumulate(len(v.owner) for v in videos)]
    rows = [0, *accumulate(len(v.rows) for v in videos)]
    sizes = None
    if any(v.size is not None for v in videos):
        ones = (v.features.new_ones(len(v.kept), dtype=torch.float32) for v in videos)
        sizes = torch.cat([one if v.size is None else v.size for v, one in zip(videos, ones, strict=True)])
    return Encoded(
        torch.cat([v.features for v in videos]),
        torch.cat([v.kept + first for v, first in zip(videos, units, strict=False)]),
        torch.cat([v.rows for v in videos]),
        torch.cat([torch.where(v.owner >= 0, v.owner + first, -1) for v, first in zip(videos, rows, strict=False)]),
        sum((v.grids for v in videos), ()),
        [(layers[0][0], sum(n for _, n in layers)) for layers in zip(*(v.layers for v in videos), strict=True)],
        sum(v.prune_seconds for v in videos),
        all(v.flat for v in videos),
        sizes,
        None if videos[0].deepstack is None else torch.cat([v.deepstack for v in videos], 1),
    )


@dataclass
class Checks:
    """Results that are read at the end, so that nothing synchronises earlier: bool tensors without dimension."""

    even: list[torch.Tensor] = field(default_factory=list)  # for each chunk, whether each frame pair has one colour
    failed: list[torch.Tensor] = field(default_factory=list)  # whether a group lost fewer rows than planned
    numbers: list[torch.Tensor] = field(default_factory=list)  # whether rows are without NaN and infinity


@dataclass
class EncodedRows:
    """A video after the tower, before tokens are selected."""

    plan: EncoderPlan
    tokens: Tokens  # the input of the selector
    unit: torch.Tensor  # int64 `[E]`, the unit whose place each row has
    source: torch.Tensor  # int64 `[T, H*W]`, the number of the frame pair whose pixels represent each unit
    layers: list[tuple[int, int]]  # as in `Encoded`
    selection: Selection | None  # inside the tower, if the language model reads exactly those rows
    timer: devices.Timer  # of pruning
    checks: Checks  # which `finish` reads
    deepstack: torch.Tensor  # `[E, n, D]`, of the rows

    def nothing_selected(self) -> Encoded:
        """An encoding without tokens, for a method whose question is not known yet."""
        return self.encoded(self.tokens.rows[:0], self.unit[:0], None, self.deepstack[:0])

    def encoded(
        self, features: torch.Tensor, kept: torch.Tensor, size: torch.Tensor | None, deepstack: torch.Tensor
    ) -> Encoded:
        """The encoding with these tokens; `deepstack`: `[K, n, D]`. Errors as of `finish`."""
        flat, seconds, read = self.finish(kept)
        by_layer = deepstack.transpose(0, 1) if deepstack.shape[1] else None
        about = self.tokens.rows, self.tokens.owner, (self.plan.grid,), self.layers, seconds, flat
        return Encoded(features, kept, *about, size, by_layer, read)

    def finish(self, kept: torch.Tensor) -> tuple[bool, float, torch.Tensor]:
        """Whether each frame pair has one colour, the seconds spent on pruning, and `kept` on the CPU; reads all checks.

        Raises ModelError: a row has NaN or infinite values. RuntimeError: a merger did not remove its rows.
        """
        checks, no = self.checks, torch.zeros_like(self.checks.numbers[0])
        flags = (
            torch.stack(checks.numbers).all(),
            torch.stack([no, *checks.failed]).any(),
            torch.stack([~no, *checks.even]).all(),
        )
        flags = torch.stack(flags)
        if not devices.exact_shapes(kept.device):  # one copy from an accelerator
            flags, kept = torch.cat([flags.long(), kept]).cpu().split([len(flags), len(kept)])
        numbers, failed, even = flags.tolist()
        if not numbers:
            raise not_a_number_error("encode")
        if failed:
            name = self.plan.stages[0].reduce.merger.name
            raise RuntimeError(f"method {name} did not remove as many rows as it was asked to")
        return bool(checks.even) and bool(even), self.timer.seconds(), kept


@torch.inference_mode()
def select_tokens(video: EncodedRows, question: torch.Tensor | None = None) -> Encoded:
    """Selects the tokens that the language model reads. May be called again with another question.

    `question`: as in `encoder.encode`; ignored unless the method reads the question.

    Raises ModelError, RuntimeError: as in `EncodedRows.finish`. UsageError, PluginError: as in `selected`.
    """
    rows, owner = video.tokens.rows, video.tokens.owner
    with video.timer:
        selection = selected(video, question)
        kept = devices.to_device(selection.kept, rows.device)
        features, deepstack = rows, video.deepstack
        if selection is not video.selection:
            found = replace(selection, kept=kept)
            features, deepstack = (averaged(found, each, owner) for each in (rows, video.deepstack))
    return video.encoded(features, kept, selection.size, deepstack)


def averaged(found: Selection, values: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Values `[K, ...]` of the selected tokens, from those of rows, `[E, ...]`; `owner`: int64 `[N]`, the row of each unit."""
    shape = len(found.kept), *values.shape[1:]
    return found.features(values.flatten(1), owner).view(shape) if values.numel() else values.new_empty(shape)


def selected(video: EncodedRows, question: torch.Tensor | None = None) -> Selection:
    """The units that the language model reads; arguments as in `select_tokens`.

    Raises UsageError: the method reads the question, and there is none. PluginError: as `methods.chain.select`.
    """
    tokens, keep, stage = video.tokens, video.plan.keep, video.plan.token_stage
    if video.selection is not None or not video.plan.prunes:
        return video.selection or Selection(video.unit)
    if stage is None:
        few = len(video.unit) > keep
        return Selection(video.unit[_largest(tally(tokens.owner, len(video.unit)), keep)] if few else video.unit)
    selector = stage.selector
    if selector.reads_question:
        if question is None:
            problem = f"method {selector.name} reads the question, and there is none here"
            raise UsageError(problem, "give the question with the video, or take another method")
        tokens = replace(tokens, given={**tokens.given, "question": question.to(video.unit.device).float()})
    if isinstance(stage.reduce, Inflection):
        keep = tokens_before_inflection(selector, tokens, keep)
    return select(selector, tokens, keep)


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: the rows of largest cluster `size` (int64 `[E]`); among equal ones, at even distances.

    This serves counts below one row per frame pair, which merging inside frame pairs cannot reach.
    """
    order = ascending(len(size), size.device)
    even = order * keep // len(size)  # a new value marks each row of an even selection
    first = torch.cat([torch.ones(1, dtype=torch.bool, device=size.device), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values

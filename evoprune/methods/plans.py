"""Plans: how many visual tokens a budget keeps, and what the encoder does with a video. No torch.

A method makes its plan before the first frame is read. The encoder runs it; the memory check, the cost, estimates
and the cache's key read it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import prod
from typing import Any, Literal

from evoprune.errors import UsageError
from evoprune.util import did_you_mean

# Budgets: how many tokens are kept, and how they are spread over the frame pairs.


class Preset(float):
    """A budget with a name: the share of a video's tokens, and `still`, that of one frame pair, which no other repeats.

    It equals no number, because the two differ in what they keep of pictures.
    """

    def __new__(cls, name: str, video: float, still: float):
        preset = super().__new__(cls, video)
        preset.name, preset.still = name, still
        return preset

    def __reduce__(self):
        return Preset, (self.name, float(self), self.still)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preset) and self.name == other.name

    def __ne__(self, other: object) -> bool:  # a float has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return self.name


PRESETS = {
    "full": 1.0,
    "high": Preset("high", 0.4, 0.7),
    "balanced": Preset("balanced", 0.25, 0.5),
    "fast": Preset("fast", 0.1, 0.3),
}
# With the accuracy that they keep in the worst of the demo's worlds and weights, and the speed of the first token against Hugging
# Face at 3B dimensions, fp32 (results/frontier.md).
IN_WORDS = "high (0.4; accuracy 98.2%, 2.0x as fast), balanced (0.25; 97.1%, 2.8x), fast (0.1; 95.8%, 4.4x)"
DEFAULT = "balanced"
# Under AUTO the content decides how many tokens are kept (`Method.automatic`), between these shares.
AUTO, AUTO_LEAST, AUTO_MOST = "auto", 0.05, 0.5
AUTO_INFLECTION = "auto:inflection"  # from the curve of a method's scores (methods/chain.py)
AUTOS = (AUTO, AUTO_INFLECTION)


def parse_budget(text: str | float, names: Sequence[str] = ()) -> float | str:
    """The share to keep, from a preset's name, a number in (0, 1] or a percentage; other `names` unchanged. Raises UsageError."""
    if text in names or isinstance(text, Preset):  # which another object parsed before
        return text
    if isinstance(text, str) and text in PRESETS:
        return PRESETS[text]
    percent = isinstance(text, str) and text.rstrip().endswith("%")
    value = _number(text.rstrip()[:-1]) / 100 if percent else _number(text)
    if 0 < value <= 1:
        return value
    raise _refused(text, names)


def parse_budget_or_name(text: str | float) -> float | str:
    """As `parse_budget`, but returns "auto" and "auto:inflection" unchanged."""
    return parse_budget(text, AUTOS)


def _number(text: str | float) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _refused(text: str | float, names: Sequence[str]) -> UsageError:
    if text in AUTOS and text not in names:
        hint = f"give a share of tokens such as 0.25; {text} works with VideoQA, and with commands that ask or evaluate"
        return UsageError(f"budget {text!r} does not work here", hint)
    percent, also = _number(text), f", or {', '.join(names[:-1])} or {names[-1]}" if names else ""
    meant = f"did you mean {percent / 100:g} (or {percent:g}%)? " if 1 < percent <= 100 else ""
    hint = f"give a number above 0 and up to 1 (0.25 or 25% for a quarter), or one of {', '.join(PRESETS)}{also}"
    meant = meant or did_you_mean(str(text), (*PRESETS, *names))
    return UsageError(f"budget {text!r} is not a share of tokens to keep", meant + hint)


def plain(budget: float | str) -> float | str:
    """A budget as records hold it: a number, or a name."""
    return budget.name if isinstance(budget, Preset) else budget


def share_for(budget: float, grid: tuple[int, int, int]) -> float:
    """The share of one input: `grid` is (T, H, W) in units."""
    return budget.still if isinstance(budget, Preset) and grid[0] == 1 else float(budget)


def keep_tokens(budget: float, grid: tuple[int, int, int]) -> int:
    """K of one input: `grid` is (T, H, W) in units."""
    return keep_count(share_for(budget, grid), prod(grid))


def share_of(budget: float, grids: Sequence[tuple[int, int, int]]) -> float:
    """The share of all units of several inputs that `keep_tokens` keeps, for methods that know only one share."""
    if not isinstance(budget, Preset):
        return budget
    return sum(keep_tokens(budget, grid) for grid in grids) / sum(map(prod, grids))


def largest_share(budget: float) -> float:
    """The largest share of any input that a budget keeps."""
    return max(budget, budget.still) if isinstance(budget, Preset) else budget


def keep_count(budget: float, units: int) -> int:
    """K = max(1, floor(budget * units + 0.5)), at most `units`."""
    return min(units, max(1, math.floor(budget * units + 0.5)))


def spread(keep: int, pairs: int) -> list[int]:
    """Divides `keep` tokens among equal frame pairs; each gets the mean, rounded down, or up at even distances over the clip."""
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


def apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `weights` (at least 0), by largest remainder, with a limit (`most`) for each share.

    Excess above a limit goes to the others, in proportion again; if only weights of zero are left, evenly. Ties go by index.
    The shares sum to `total`, or to the sum of `most` if that is less.
    """
    counts, quotas = [0] * len(most), {}
    open_ = [i for i, limit in enumerate(most) if limit > 0]
    while open_:
        left, weight = total - sum(counts), sum(Fraction(weights[i]) for i in open_)
        quotas = {i: left * (Fraction(weights[i]) / weight if weight else Fraction(1, len(open_))) for i in open_}
        full = [i for i in open_ if quotas[i] >= most[i]]
        if not full:
            break
        for i in full:
            counts[i] = most[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        counts[i] = math.floor(quotas[i])
    missing = total - sum(counts)
    for i in sorted(open_, key=lambda i: (counts[i] - quotas[i], i))[:missing]:
        counts[i] += 1
    return counts


# The encoder's plan: how many tokens to keep, and the stages that reduce rows on the way.

ALLOCATIONS = ("mean", "skip", "first", "last", "increasing", "decreasing")

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class TowerShape:
    """The properties of a vision tower that plans depend on."""

    depth: int
    full_layers: tuple[int, ...]  # whose attention spans a whole frame pair; the others attend inside windows
    window: int = 4  # its side in units
    launch_bound: int = 0  # inputs of fewer units take the time of their launches, whatever the number of rows

    def scope(self, layer: int) -> Literal["window", "pair"]:
        return "pair" if layer in self.full_layers else "window"

    def windows(self, height: int, width: int) -> int:
        """Number of windows in a frame pair of `height` x `width` units."""
        return -(-height // self.window) * -(-width // self.window)


@dataclass(frozen=True)
class WholePairs:
    """A selector keeps all rows of a frame pair or none."""

    selector: Any


@dataclass(frozen=True)
class Inflection:
    """A selector keeps the tokens before the inflection of its sorted scores (methods/chain.py)."""

    selector: Any


@dataclass(frozen=True)
class Merge:
    """A merger merges rows inside each window or frame pair, until each frame pair has as many as `left`, `[T]`, says."""

    merger: Any
    left: tuple[int, ...]


@dataclass(frozen=True)
class SetAside:
    """Rows are set aside, follow similar rows, and come back after the last layer (vision/reductions.py)."""

    left: int  # rows of each frame pair that stay
    until: int  # number of layers up to which rows that were set aside are keys and values of attention
    neighbours: int  # how many of the rows that stay each other row follows


@dataclass(frozen=True)
class Stage:
    """From one layer of the tower on there are fewer rows."""

    first_layer: int  # how many layers have run: 0 for patch embeddings, the tower's depth for after its last layer
    rows: int  # of the whole video from there on; an upper bound if not `exact`
    # A `Selector` of rows, or of tokens after the last layer; `WholePairs`, `Inflection`, `Merge`, `SetAside`
    reduce: Any
    exact: bool = True  # whether `rows` does not depend on the content

    @property
    def inside_pairs(self) -> bool:
        """Whether rows are merged or set aside inside frame pairs; otherwise it selects among those of the video."""
        return isinstance(self.reduce, Merge | SetAside)

    @property
    def selector(self) -> Any:
        """Its selector; None where rows merge or are set aside."""
        return None if self.inside_pairs else getattr(self.reduce, "selector", self.reduce)


@dataclass(frozen=True)
class EncoderPlan:
    """The encoder's work on one video.

    Raises ValueError: stages that are out of order, or that merge or set aside after a selection among the rows of the video.
    """

    grid: Grid  # (T, H, W) in units, as the encoder sees it; an input method makes it smaller than the video's own
    keep: int  # K, the number of tokens for the language model
    depth: int  # layers of the tower
    # A unit is encoded again if it changes by at least this many levels of 255; 0 encodes every unit
    reuse: float = 0.0
    stages: tuple[Stage, ...] = ()  # in the order of their layers; the last may select tokens, after the last layer
    # Inputs of fewer units are pruned after the tower alone, where others are pruned inside it; 0 where no size changes that
    after_tower_below: int = 0

    def __post_init__(self):
        for stage, after in pairwise(self.stages):
            if after.first_layer < stage.first_layer or (after.inside_pairs and not stage.inside_pairs):
                raise ValueError(f"stage {after} cannot come after {stage}")
        if self.row_stages and any(isinstance(stage.reduce, SetAside) for stage in self.stages):
            raise ValueError("rows that are set aside come back after the last layer, and none may be selected before")

    @property
    def units(self) -> int:
        """N, all units of the grid."""
        return prod(self.grid)

    @property
    def prunes(self) -> bool:
        """Whether there are fewer tokens than units."""
        return self.keep < self.units

    @property
    def exact(self) -> bool:
        """Whether `layers` and `rows` are exact; otherwise they are upper bounds, and the content decides."""
        return not self.reuse and all(stage.exact for stage in self.stages if stage is not self.token_stage)

    @property
    def token_stage(self) -> Stage | None:
        """The stage that selects tokens after the tower."""
        last = self.stages[-1] if self.stages else None
        return last if last and last.first_layer == self.depth and not last.inside_pairs else None

    @property
    def inside_pairs(self) -> list[Stage]:
        """The stages that merge rows or set them aside inside frame pairs; they come first."""
        return [stage for stage in self.stages if stage.inside_pairs]

    @property
    def row_stages(self) -> list[Stage]:
        """The stages between layers that select among the rows of the whole video."""
        return [stage for stage in self.stages if not stage.inside_pairs and stage is not self.token_stage]

    @property
    def spans(self) -> list[range]:
        """The layers before the first of `row_stages`, and those after each."""
        edges = [0, *(stage.first_layer for stage in self.row_stages), self.depth]
        return [range(first, last) for first, last in pairwise(edges)]

    @property
    def layers(self) -> tuple[int, ...]:
        """Rows that each layer computes, over the whole video."""
        edges = [(0, self.units), *((s.first_layer, s.rows) for s in self.stages), (self.depth, 0)]
        return tuple(rows for (first, rows), (last, _) in pairwise(edges) for _ in range(first, last))

    @property
    def rows(self) -> int:
        """Rows that leave the tower."""
        left = [s.rows for s in self.stages if s is not self.token_stage and not isinstance(s.reduce, SetAside)]
        return left[-1] if left else self.units


def full_plan(tower: TowerShape, grid: Grid) -> EncoderPlan:
    """The plan in which every unit goes through every layer and becomes a token."""
    return EncoderPlan(grid, prod(grid), tower.depth)


def layer_weights(depth: int, allocation: str, first: float, last: float) -> dict[int, float]:
    """The layers that reduce, each with its share of the whole reduction, by an allocation of EvoPrune (arXiv 2603.03681).

    `first` and `last`: the range in relative depth, of at least one layer; layer l ends at (l + 1) / depth.

    Raises ValueError: an unknown allocation or an empty range.
    """
    if allocation not in ALLOCATIONS or not 0 <= first <= last <= 1:
        known = f"one of {ALLOCATIONS}, 0 <= first <= last <= 1"
        raise ValueError(f"no schedule {allocation!r} from {first} to {last}: {known}")
    end = min(depth, max(1, round(last * depth))) - 1
    begin = min(end, max(0, math.ceil(first * depth) - 1))
    layers = list(range(begin, end + 1))
    n = len(layers)
    weights = {
        "mean": lambda i: 1,
        "skip": lambda i: (n - 1 - i) % 2 == 0,  # counted from the end, so that the last layer of the range reduces
        "first": lambda i: i < (n + 1) // 2,
        "last": lambda i: i >= n // 2,
        "increasing": lambda i: i + 1,
        "decreasing": lambda i: n - i,
    }[allocation]
    total = sum(weights(i) for i in range(n))
    return {layer: weights(i) / total for i, layer in enumerate(layers) if weights(i)}


def rows_after_layers(tower: TowerShape, units: int, windows: int, keep: int, weights: dict[int, float]) -> list[int]:
    """Rows of one frame pair after each layer, from `units` down to `keep`.

    A layer that merges inside windows leaves at least one row in each of the `windows`. The next full-attention layer removes the
    excess, even if it is outside the range; in a tower without one, more than `keep` (at least 1) are left. `weights`: from
    `layer_weights`.
    """
    rows, done, counts = units, 0.0, []
    for layer in range(tower.depth):
        done += weights.get(layer, 0.0)
        wish = units - math.floor((units - keep) * min(done, 1.0) + 0.5)
        if tower.scope(layer) == "window":
            # Outside the range a window layer does not reduce; only full-attention layers do.
            wish = max(wish, windows) if layer in weights else rows
        rows = min(rows, wish)
        counts.append(rows)
    return counts

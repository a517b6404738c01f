"""The settings, cases, rows and samples of `evoprune profile`. Times are in seconds. Does not import torch."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from evoprune.methods import MethodText
from evoprune.session import PruneOptions
from evoprune.util import budget_text


@dataclass(frozen=True)
class ProfileSettings:
    """The settings of a profile. Every method runs at every budget and with every quantization of the language model."""

    SYNTHETIC: ClassVar[tuple[str, ...]] = ("motion", "static90", "noise")  # kinds of synthetic clips, see `clips.py`

    budgets: tuple[float | str, ...]  # see `Budget.recorded`
    methods: tuple[str, ...] = (MethodText.DEFAULT,)
    quantize: tuple[str, ...] = ("none",)
    seed: int = 0  # for methods that select at random
    new_tokens: int = 4  # always generated; end-of-sequence tokens are ignored
    warmups: int = 1  # rounds that are not counted
    repetitions: int = 3  # rounds that are counted
    time_limit_s: float = 150.0  # for the whole run, including loading

    def config(self, name: str, budget: float | str):
        """Return the `PruneConfig` of a method at a budget."""
        return PruneOptions(budget, name, seed=self.seed).config()


# Kinds of rows: plain transformers, evoprune without pruning, the upper bound for methods that act after the encoder, a method.
HUGGING_FACE = "hugging_face"
FULL = "full"
BOUND = "post_encoder_bound"
METHOD = "method"


@dataclass(frozen=True, order=True)
class Case:
    """The size of a clip: the number of frames, and their height and width in pixels. A single frame is an image."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        if self.frames == 1:
            return f"a picture of {size}"
        return f"{self.frames} frames of {size}"

    def of_units(self, larger: float) -> "Case":
        """Return a case with the same number of units, for units whose side is `larger` times as long in pixels."""
        return replace(self, height=round(self.height * larger), width=round(self.width * larger))


@dataclass(frozen=True)
class Sample:
    """The times of one row in one round, in seconds."""

    encode: float  # the tower
    prune: float  # scoring, merging and selection; part of `encode`
    prefill: float  # the prompt, up to the logits of its last token
    generate: float  # all new tokens; the first comes from the prefill
    peak_bytes: int | None = None  # peak memory, including weights
    prefill_prune: float = 0.0  # part of `prefill`

    @property
    def first_token(self) -> float:
        return self.encode + self.prefill


@dataclass(frozen=True)
class Counts:
    """The work of a row, which is the same in every round."""

    units: int  # N, of the clip
    encoder_rows: int  # rows that leave the tower
    live_share: float  # rows / N, averaged over layers
    layers: tuple[tuple[int, int], ...]  # (layer, rows computed)
    tokens: int  # K, visual tokens read by the language model
    prompt: int  # tokens of the prompt, visual and text
    tower_flop: float
    # (layer, visual tokens read), and (layer, tokens whose keys, queries and MLP were computed); None if all were.
    language_layers: tuple[tuple[int, int], ...] | None = None
    language_work: tuple[tuple[int, ...], ...] | None = None


@dataclass(eq=False)
class ProfileRow:
    """A row in a case. `samples` has one entry per measured round. It is empty if the row failed, in which case `error` is set."""

    kind: str
    case: Case
    budget: float | str = 1.0
    method: str | None = None
    counts: Counts | None = None
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None
    quantize: str = "none"

    @property
    def name(self) -> str:
        if self.kind == HUGGING_FACE:
            return "Hugging Face"
        if self.kind == FULL:
            return "budget 1.0"
        pruner = "bound" if self.kind == BOUND else self.method
        name = f"{pruner} -b {budget_text(self.budget)}"
        if self.quantize != "none":
            name += f" {self.quantize}"
        return name

    def seconds(self, stage: str) -> list[float]:
        """Return the times of a stage in all rounds, in seconds. `stage` is a field of `Sample` or `first_token`."""
        return [getattr(sample, stage) for sample in self.samples]


def bound_of(full: ProfileRow, method: ProfileRow) -> ProfileRow:
    """Return the bound. In each round, it has the tower time of `full` and the other times of `method`.

    This is the best possible time of a method that prunes after the encoder. If either row failed, the bound has its error.
    """
    bound = ProfileRow(BOUND, method.case, method.budget, error=full.error or method.error)
    if bound.error or full.counts is None or method.counts is None:
        return bound
    bound.counts = replace(full.counts, tokens=method.counts.tokens, prompt=method.counts.prompt)
    rounds = zip(full.samples, method.samples, strict=True)
    bound.samples = [Sample(tower.encode, 0.0, rest.prefill, rest.generate) for tower, rest in rounds]
    return bound

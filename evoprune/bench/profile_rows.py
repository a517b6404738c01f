"""The settings, cases, rows, and samples of `evoprune profile`. Times are in seconds. Does not import torch."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from evoprune.methods import MethodText
from evoprune.session import PruneOptions
from evoprune.util import budget_text


@dataclass(frozen=True)
class ProfileSettings:
    """The settings of a profile, which runs each method at each budget and with each language model quantization."""

    SYNTHETIC: ClassVar[tuple[str, ...]] = ("motion", "static90", "noise")  # types of synthetic clips; see `clips.py`

    budgets: tuple[float | str, ...]  # see `Budget.recorded`
    methods: tuple[str, ...] = (MethodText.DEFAULT,)
    quantize: tuple[str, ...] = ("none",)
    seed: int = 0  # for methods with random selection
    new_tokens: int = 4  # number of tokens to generate; end-of-sequence tokens are ignored
    warmups: int = 1  # number of warm-up rounds, which are excluded from the results
    repetitions: int = 3  # number of measured rounds
    time_limit_s: float = 150.0  # limit for the whole run, including loading

    def config(self, name: str, budget: float | str):
        """Return the pruning configuration (`PruneConfig`) for the method `name` at this budget."""
        return PruneOptions(budget, name, seed=self.seed).config()


# Row types: plain transformers, evoprune without pruning, the best possible time for pruning after the encoder, and a pruning
# method.
HUGGING_FACE = "hugging_face"
FULL = "full"
BOUND = "post_encoder_bound"
METHOD = "method"


@dataclass(frozen=True, order=True)
class Case:
    """A clip size: the number of frames, and their height and width in pixels. A case with only one frame is an image."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        if self.frames == 1:
            return f"an image of {size}"
        return f"{self.frames} frames of {size}"

    def of_units(self, larger: float) -> "Case":
        """Return a case with the same number of units for a model whose units are `larger` times as wide and high in pixels."""
        return replace(self, height=round(self.height * larger), width=round(self.width * larger))


@dataclass(frozen=True)
class Sample:
    """The times of one row in one round, in seconds."""

    encode: float  # time in the tower
    prune: float  # part of `encode` spent on scoring, merging, and selection
    prefill: float  # time to process the prompt, up to the logits of its last token
    generate: float  # time to generate all new tokens after the prefill
    peak_bytes: int | None = None  # peak memory, including the weights
    prefill_prune: float = 0.0  # part of `prefill` spent on pruning

    @property
    def first_token(self) -> float:
        return self.encode + self.prefill


@dataclass(frozen=True)
class Counts:
    """The amount of work done by a profile row, which is the same in every round."""

    units: int  # number of units in the clip, N
    encoder_rows: int  # number of rows that leave the tower
    live_share: float  # number of rows divided by N, averaged over the tower's layers
    layers: tuple[tuple[int, int], ...]  # pairs of a layer index and the number of rows that the layer computed
    tokens: int  # number of visual tokens read by the language model, K
    prompt: int  # number of tokens in the prompt, both visual and text
    tower_flop: float
    # Pairs of a language model layer index and the number of visual tokens that the layer read. None if every layer read all of
    # them.
    language_layers: tuple[tuple[int, int], ...] | None = None
    # For each language model layer, its index and the numbers of visual tokens for which it computed keys, queries, and the MLP.
    # None if every layer computed everything.
    language_work: tuple[tuple[int, ...], ...] | None = None


@dataclass(eq=False)
class ProfileRow:
    """One line of a profile: a clip size and a processing method, with its measurements.

    `samples` has one entry per measured round. If the row failed, it is empty, and `error` contains the reason.
    """

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
        """Return a stage's duration in each round, in seconds. `stage` is `first_token` or a field of `Sample`."""
        return [getattr(sample, stage) for sample in self.samples]


def bound_of(full: ProfileRow, method: ProfileRow) -> ProfileRow:
    """Return a row with the best possible times of a method that prunes after the encoder.

    In each round, the bound combines the tower time of the row `full` with all other times of the row `method`. If one of the two
    rows failed, its error is copied to the bound.
    """
    bound = ProfileRow(BOUND, method.case, method.budget, error=full.error or method.error)
    if bound.error or full.counts is None or method.counts is None:
        return bound
    bound.counts = replace(full.counts, tokens=method.counts.tokens, prompt=method.counts.prompt)
    rounds = zip(full.samples, method.samples, strict=True)
    bound.samples = [Sample(tower.encode, 0.0, rest.prefill, rest.generate) for tower, rest in rounds]
    return bound

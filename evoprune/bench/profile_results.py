"""What `evoprune profile` sweeps, and what it measured: raw samples in seconds, and figures made of them. No torch.

A ratio is taken round by round, and its median is reported, so that a drift of the machine's speed cancels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

from evoprune import methods
from evoprune.report import Environment, ModelFacts
from evoprune.session.options import PruneOptions
from evoprune.util import budget_text

SYNTHETIC = ("motion", "static90", "noise")  # kinds of synthetic clips, see `clips.py`


@dataclass(frozen=True)
class ProfileSettings:
    """Every method runs at every budget, with each quantisation of the language model's weights."""

    budgets: tuple[float | str, ...]  # as of `Budget.recorded`
    methods: tuple[str, ...] = (methods.DEFAULT,)
    quantize: tuple[str, ...] = ("none",)
    seed: int = 0  # for methods that select at random
    new_tokens: int = 4  # generated in any case; ends of sequence are ignored
    warmups: int = 1  # rounds that are not counted
    repetitions: int = 3  # rounds that are
    time_limit_s: float = 150.0  # of the whole run, loading included

    def config(self, name: str, budget: float | str):
        """Return the `PruneConfig` of a method at a budget."""
        return PruneOptions(budget, name, seed=self.seed).config()


@dataclass
class TimeLimit:
    """Limit the seconds that a run may take since it `begun`, by the clock `now`."""

    seconds: float
    now: Callable[[], float] = time.perf_counter
    begun: float | None = None

    def __post_init__(self):
        if self.begun is None:
            self.begun = self.now()

    @property
    def spent(self) -> float:
        return self.now() - self.begun

    @property
    def left(self) -> float:
        """Negative when the limit is over."""
        return self.seconds - self.spent


SCHEMA = "evoprune/profile@1"
# Kinds of rows: plain transformers, evoprune without pruning, the best that a post-encoder method could reach, a method.
HUGGING_FACE = "hugging_face"
FULL = "full"
BOUND = "post_encoder_bound"
METHOD = "method"
STAGES = {  # names of times in the document, and in a `Sample`
    "encode": "encode", "encode_prune": "prune", "prefill": "prefill", "prefill_prune": "prefill_prune",
    "generate": "generate", "ttft_model": "first_token",
}  # fmt: skip
RATIOS = {  # names in the document, and in `Figures`
    "first_token_to_hugging_face": "vs_hf", "first_token_to_bound": "vs_bound", "encode_to_hugging_face": "encode_vs_hf",
    "prune_of_encode": "prune_share", "tower_of_matmul": "matmul_share",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Case:
    """Hold the size of a clip: its number of frames, and their height and width in pixels. One frame is a picture."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        if self.frames == 1:
            return f"a picture of {size}"
        return f"{self.frames} frames of {size}"

    def of_units(self, larger: float) -> "Case":
        """Return the same number of units, whose side in pixels is so many times larger."""
        return replace(self, height=round(self.height * larger), width=round(self.width * larger))


@dataclass(frozen=True)
class Sample:
    """Hold the times of one row in one round, in seconds."""

    encode: float  # the tower
    prune: float  # scores, merging and selection, part of `encode`
    prefill: float  # the prompt, up to the logits of its last token
    generate: float  # all new tokens; the first needs no pass of its own
    peak_bytes: int | None = None  # the most memory in use, weights included
    prefill_prune: float = 0.0  # part of `prefill`

    @property
    def first_token(self) -> float:
        return self.encode + self.prefill


@dataclass(frozen=True)
class Counts:
    """Count the work of a row, the same in every round."""

    units: int  # N, of the clip
    encoder_rows: int  # that leave the tower
    live_share: float  # mean over its layers of rows / N
    layers: tuple[tuple[int, int], ...]  # (layer, rows that it computed)
    tokens: int  # K, visual tokens that reach the language model
    prompt: int  # those and the text around them
    tower_flop: float
    # (layer, visual tokens that it read), and (layer, those whose keys, queries and MLP it computed); None where it is all of them
    language_layers: tuple[tuple[int, int], ...] | None = None
    language_work: tuple[tuple[int, ...], ...] | None = None


@dataclass(eq=False)
class ProfileRow:
    """Hold one row at one case. `samples`: one for each measured round; none if the row failed with an `error`."""

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
        """Return the times of all rounds in seconds; `stage` is a field of Sample, or `first_token`."""
        return [getattr(sample, stage) for sample in self.samples]


class Spread(NamedTuple):
    """Hold the median of several rounds, and the lowest and the highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the rounds' own ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def bound_of(full: ProfileRow, method: ProfileRow) -> ProfileRow:
    """Return the tower of `full` and the rest of `method`, round by round: the best that a method after the encoder can do, or
    why not.
    """
    bound = ProfileRow(BOUND, method.case, method.budget, error=full.error or method.error)
    if bound.error or full.counts is None or method.counts is None:
        return bound
    bound.counts = replace(full.counts, tokens=method.counts.tokens, prompt=method.counts.prompt)
    rounds = zip(full.samples, method.samples, strict=True)
    bound.samples = [Sample(tower.encode, 0.0, rest.prefill, rest.generate) for tower, rest in rounds]
    return bound


class Figures(NamedTuple):
    """Hold the figures of a row: medians over the rounds in seconds, and ratios as medians of the rounds' own."""

    encode: Spread
    prefill: Spread
    generate: Spread
    first_token: Spread
    generate_tok_s: float | None  # over the passes after the first token
    prune_share: float  # of encode
    vs_hf: float | None  # how many times faster the first token is than plain transformers'
    vs_bound: float | None  # and than the bound's at this budget
    encode_vs_hf: float | None
    matmul_share: float | None  # of the machine's rate in plain matrix products, reached by the tower
    peak_bytes: int | None  # the highest


@dataclass
class ProfileResults:
    """Everything a benchmark found, and with which settings."""

    model: ModelFacts
    weights_bytes: int
    env: Environment
    machine: dict[str, Any]  # facts beyond `env`
    settings: dict[str, Any]
    # Hugging Face, budget 1.0, then for each budget the bound and the methods.
    rows: list[ProfileRow] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)  # plain products' operations a second, by measured round
    warmups: int = 0  # that ran, as `rounds`
    rounds: int = 0
    warmup_seconds: float = 0.0
    seconds: float = 0.0  # of everything
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def remarks(self) -> list[str]:
        """Return the notes, and why there are fewer rounds than the settings ask for."""
        wanted = self.settings["repetitions"]
        limit = self.settings["time_limit_s"]
        said = list(self.notes)
        if self.interrupted:
            said.append(f"interrupted: {self.rounds} of {wanted} rounds were finished")
        elif self.rounds < wanted:
            said.append(f"{self.rounds} of {wanted} rounds: another would not have ended within {limit:g} s")
        if self.warmup_seconds > limit:
            said.append(f"the warm-up alone took {self.warmup_seconds:.0f} s, more than the time limit of {limit:g} s")
        return said

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: Case) -> list[ProfileRow]:
        return [row for row in self.rows if row.case == case]

    def _against(self, row: ProfileRow, other: str, stage: str) -> float | None:
        """Return how many times as fast `row` is as the `other` kind of row at its case, if that has samples."""
        peers = (r for r in self.of(row.case) if r.kind == other and (other != BOUND or r.budget == row.budget))
        peer = next((r for r in peers if r.samples), None)
        if peer is None:
            return None
        return median_ratio(peer.seconds(stage), row.seconds(stage))

    def figures(self, row: ProfileRow) -> Figures | None:
        """Compute the figures of a row; None where it has no samples."""
        if not row.samples:
            return None
        encode = row.seconds("encode")
        generate = row.seconds("generate")
        passes = self.settings["new_tokens"] - 1
        flop = row.counts.tower_flop
        reached = [flop / spent / rate for spent, rate in zip(encode, self.matmul_rates, strict=True)]
        peaks = [sample.peak_bytes for sample in row.samples if sample.peak_bytes is not None]
        figures = Figures(
            *(Spread.of(row.seconds(stage)) for stage in ("encode", "prefill", "generate", "first_token")),
            generate_tok_s=None,
            prune_share=median_ratio(row.seconds("prune"), encode),
            vs_hf=self._against(row, HUGGING_FACE, "first_token"),
            vs_bound=None,
            encode_vs_hf=self._against(row, HUGGING_FACE, "encode"),
            matmul_share=None,
            peak_bytes=max(peaks, default=None),
        )
        if passes:
            figures = figures._replace(generate_tok_s=median(passes / spent for spent in generate))
        if row.kind == METHOD:
            figures = figures._replace(vs_bound=self._against(row, BOUND, "first_token"))
        if row.kind != BOUND:
            figures = figures._replace(matmul_share=median(reached))
        return figures

    def document(self) -> dict[str, Any]:
        """Return all of it as plain data for JSON: times in milliseconds, sizes in bytes."""
        rates = self.matmul_rates
        seconds = round(self.seconds, 3)
        ran = {"warmup": self.warmups, "measured": self.rounds, "seconds": seconds, "interrupted": self.interrupted}
        facts = {"schema": SCHEMA, "model": asdict(self.model), "env": asdict(self.env), "machine": self.machine}
        return facts | {
            "settings": self.settings,
            "rounds": ran,
            "memory": {"weights_bytes": self.weights_bytes},
            "matmul": {"flop_per_s": round(median(rates)) if rates else None, "samples": [*map(round, rates)]},
            "rows": [self._row_document(row) for row in self.rows],
            "notes": self.remarks,
        }

    def _row_document(self, row: ProfileRow) -> dict[str, Any]:
        f = self.figures(row)
        times = {name: row.seconds(stage) for name, stage in STAGES.items()}
        return {
            "row": row.kind,
            "name": row.name,
            "method": row.method,
            "budget": row.budget,
            "quantize": row.quantize,
            **asdict(row.case),
            "counts": asdict(row.counts) if row.counts else None,
            "time_ms": {name: _ms(median(seconds)) if seconds else None for name, seconds in times.items()},
            "rate": {"generate_tok_s": f and _short(f.generate_tok_s)},
            "ratio": {name: f and _short(getattr(f, figure)) for name, figure in RATIOS.items()},
            "memory": {"peak_bytes": f and f.peak_bytes},
            "samples": [
                {name: _ms(getattr(sample, stage)) for name, stage in STAGES.items()}
                | {"peak_bytes": sample.peak_bytes}
                for sample in row.samples
            ],
            "error": row.error,
        }


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

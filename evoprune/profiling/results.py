"""What a benchmark measured: rows of raw samples, and the figures made of them (schema `evoprune/profile@1`). No torch.

A ratio is taken round by round, and its median is reported, so that a drift of the machine's speed cancels. Times are seconds here
and milliseconds in the document; unknown values are None.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, NamedTuple

from evoprune.report.records import Environment, ModelFacts

SCHEMA = "evoprune/profile@1"
# Kinds of rows: plain transformers, evoprune without pruning, the best that a post-encoder method could reach, a method.
HUGGING_FACE, FULL, BOUND, METHOD = "hugging_face", "full", "post_encoder_bound", "method"
STAGES = {  # names of times in the document, and in a `Sample`
    "encode": "encode", "encode_prune": "prune", "prefill": "prefill", "prefill_prune": "prefill_prune",
    "generate": "generate", "ttft_model": "first_token",
}  # fmt: skip


@dataclass(frozen=True, order=True)
class Case:
    """The size of a clip: its number of frames, and their height and width in pixels. One frame is a picture."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}"
        return f"a picture of {size}" if self.frames == 1 else f"{self.frames} frames of {size}"

    def of_units(self, larger: float) -> "Case":
        """The same number of units, whose side in pixels is so many times larger."""
        return replace(self, height=round(self.height * larger), width=round(self.width * larger))


@dataclass(frozen=True)
class Sample:
    """One row's turn in one round, in seconds.

    Attributes:
        encode: the tower. `prune`: scores, merging and selection, part of `encode`.
        prefill: the prompt, up to the logits of its last token. `prefill_prune`: choosing tokens there, part of prefill.
        generate: all new tokens; the first needs no pass of its own.
        peak_bytes: the most memory in use, weights included.
    """

    encode: float
    prune: float
    prefill: float
    generate: float
    peak_bytes: int | None = None
    prefill_prune: float = 0.0

    @property
    def first_token(self) -> float:
        return self.encode + self.prefill


@dataclass(frozen=True)
class Counts:
    """How much work a row has, the same in every round.

    Attributes:
        units: merge units of the clip, N.
        encoder_rows: rows that leave the tower; `live_share`: mean over its layers of rows / N.
        layers: (layer, rows that it computed).
        tokens: visual tokens that reach the language model, K; `prompt`: those and the text around them.
        tower_flop: floating-point operations of the tower.
        language_layers: (layer, visual tokens that it read) of the language model; None where each reads all that reach it.
        language_work: (layer, visual tokens whose keys, queries and MLP it computed); None where these do not differ.
    """

    units: int
    encoder_rows: int
    live_share: float
    layers: tuple[tuple[int, int], ...]
    tokens: int
    prompt: int
    tower_flop: float
    language_layers: tuple[tuple[int, int], ...] | None = None
    language_work: tuple[tuple[int, ...], ...] | None = None


@dataclass(eq=False)
class Row:
    """One row at one case. `kind`: see above. `samples`: one for each measured round; none if the row failed with an `error`."""

    kind: str
    case: Case
    budget: float = 1.0
    method: str | None = None
    counts: Counts | None = None
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None
    quantize: str = "none"

    @property
    def name(self) -> str:
        fixed = {HUGGING_FACE: "Hugging Face", FULL: "budget 1.0"}
        weights = "" if self.quantize == "none" else f" {self.quantize}"
        return fixed.get(self.kind) or f"{'bound' if self.kind == BOUND else self.method} -b {self.budget:g}{weights}"

    def seconds(self, stage: str) -> list[float]:
        """Of every round; `stage` is a field of Sample, or `first_token`."""
        return [getattr(sample, stage) for sample in self.samples]


class Spread(NamedTuple):
    """The median of several rounds, and the lowest and the highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the rounds' own ratios."""
    return median(a / b for a, b in zip(above, below, strict=True))


def bound_of(full: Row, method: Row) -> Row:
    """The best that a method after the encoder can do with as many tokens as `method` keeps, or why it is unknown.

    It is put together, round by round: the tower without pruning, a selection that costs nothing, and `method`'s own prefill and
    generation.
    """
    bound = Row(BOUND, method.case, method.budget, error=full.error or method.error)
    if bound.error or full.counts is None or method.counts is None:
        return bound
    f, m = full.counts, method.counts
    bound.counts = Counts(f.units, f.encoder_rows, f.live_share, f.layers, m.tokens, m.prompt, f.tower_flop)
    rounds = zip(full.samples, method.samples, strict=True)
    bound.samples = [Sample(tower.encode, 0.0, rest.prefill, rest.generate) for tower, rest in rounds]
    return bound


class Figures(NamedTuple):
    """The figures of a row: medians over the rounds in seconds, and ratios as medians of the rounds' own.

    Attributes:
        generate_tok_s: tokens a second over the passes after the first token.
        prune_share: of encode.
        vs_hf, vs_bound: how many times faster the first token is than plain transformers', and than the bound's at this budget.
        encode_vs_hf: how many times faster the tower is.
        matmul_share: the share of the machine's rate in plain matrix products that the tower reaches.
        peak_bytes: the highest.
    """

    encode: Spread
    prefill: Spread
    generate: Spread
    first_token: Spread
    generate_tok_s: float | None
    prune_share: float
    vs_hf: float | None
    vs_bound: float | None
    encode_vs_hf: float | None
    matmul_share: float | None
    peak_bytes: int | None


@dataclass
class Results:
    """Everything a benchmark found, and with which settings.

    Attributes:
        machine: facts beyond `env`.
        rows: case after case: Hugging Face, budget 1.0, then for each budget the bound and the methods.
        matmul_rates: floating-point operations a second in plain matrix products, one figure a measured round.
        warmups, rounds: how many ran. `warmup_seconds`, `seconds`: how long the warm-ups took, and everything.
    """

    model: ModelFacts
    weights_bytes: int
    env: Environment
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    matmul_rates: list[float] = field(default_factory=list)
    warmups: int = 0
    rounds: int = 0
    warmup_seconds: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def remarks(self) -> list[str]:
        """The notes, and why there are fewer rounds than the settings ask for."""
        wanted, limit = self.settings["repetitions"], self.settings["time_limit_s"]
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

    def of(self, case: Case) -> list[Row]:
        return [row for row in self.rows if row.case == case]

    def _against(self, row: Row, kind: str, stage: str) -> float | None:
        """How many times as fast `row` is as the row of this kind that it is compared with, if that has samples."""
        peers = (r for r in self.of(row.case) if r.kind == kind and (kind != BOUND or r.budget == row.budget))
        peer = next((r for r in peers if r.samples), None)
        return median_ratio(peer.seconds(stage), row.seconds(stage)) if peer else None

    def figures(self, row: Row) -> Figures | None:
        """None where the row has no samples."""
        if not row.samples:
            return None
        encode, generate = row.seconds("encode"), row.seconds("generate")
        passes, flop = self.settings["new_tokens"] - 1, row.counts.tower_flop
        reached = [flop / spent / rate for spent, rate in zip(encode, self.matmul_rates, strict=True)]
        peaks = [sample.peak_bytes for sample in row.samples if sample.peak_bytes is not None]
        return Figures(
            *(Spread.of(row.seconds(stage)) for stage in ("encode", "prefill", "generate", "first_token")),
            generate_tok_s=median(passes / spent for spent in generate) if passes else None,
            prune_share=median_ratio(row.seconds("prune"), encode),
            vs_hf=self._against(row, HUGGING_FACE, "first_token"),
            vs_bound=self._against(row, BOUND, "first_token") if row.kind == METHOD else None,
            encode_vs_hf=self._against(row, HUGGING_FACE, "encode"),
            matmul_share=None if row.kind == BOUND else median(reached),
            peak_bytes=max(peaks, default=None),
        )

    def document(self) -> dict[str, Any]:
        """All of it as plain data for JSON: times in milliseconds, sizes in bytes."""
        return {
            "schema": SCHEMA,
            "model": asdict(self.model),
            "env": asdict(self.env),
            "machine": self.machine,
            "settings": self.settings,
            "rounds": {
                "warmup": self.warmups,
                "measured": self.rounds,
                "seconds": round(self.seconds, 3),
                "interrupted": self.interrupted,
            },
            "memory": {"weights_bytes": self.weights_bytes},
            "matmul": {
                "flop_per_s": round(median(self.matmul_rates)) if self.matmul_rates else None,
                "samples": [round(rate) for rate in self.matmul_rates],
            },
            "rows": [self._row_document(row) for row in self.rows],
            "notes": self.remarks,
        }

    def _row_document(self, row: Row) -> dict[str, Any]:
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
            "ratio": {
                "first_token_to_hugging_face": f and _short(f.vs_hf),
                "first_token_to_bound": f and _short(f.vs_bound),
                "encode_to_hugging_face": f and _short(f.encode_vs_hf),
                "prune_of_encode": f and _short(f.prune_share),
                "tower_of_matmul": f and _short(f.matmul_share),
            },
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

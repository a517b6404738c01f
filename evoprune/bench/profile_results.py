"""The results of `evoprune profile` as JSON, as text, Markdown, and CSV tables, and as a chart. Does not import torch.

Ratios are computed separately for each round, and the median over the rounds is reported. This way, changes in machine speed
between rounds cancel out.
"""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from statistics import median
from typing import Any, NamedTuple

from evoprune.bench.chart import COLOURS, INK, PALE, Panel, Point, draw, lines
from evoprune.bench.profile_rows import BOUND, HUGGING_FACE, METHOD, Case, ProfileRow
from evoprune.bench.results import Column, Results, as_csv, fitting, folded, markdown, meanings, short_name
from evoprune.report import Environment, ModelFacts
from evoprune.statistics import device_text
from evoprune.util import budget_text, counted, one_line, size

SCHEMA = "evoprune/profile@1"
STAGES = {  # maps names of times in the document to fields of `Sample`
    "encode": "encode", "encode_prune": "prune", "prefill": "prefill", "prefill_prune": "prefill_prune",
    "generate": "generate", "ttft_model": "first_token",
}  # fmt: skip
# The CSV columns that identify a row, and the CSV columns with its counts.
KEY = ("row", "name", "method", "budget", "quantize", "frames", "height", "width")
COUNTED = ("units", "encoder_rows", "live_share", "tokens", "prompt", "tower_flop")
RATIOS = {  # maps names of ratios in the document to fields of `Figures`
    "first_token_to_hugging_face": "vs_hf", "first_token_to_bound": "vs_bound", "encode_to_hugging_face": "encode_vs_hf",
    "prune_of_encode": "prune_share", "tower_of_matmul": "matmul_share",
}  # fmt: skip


class Spread(NamedTuple):
    """The median, minimum, and maximum of a value over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over rounds of the ratio `above` / `below`. Both sequences have one value per round."""
    return median(a / b for a, b in zip(above, below, strict=True))


class Figures(NamedTuple):
    """The statistics of a row: times in seconds, and ratios. Unless otherwise noted, they are medians over the rounds."""

    encode: Spread
    prefill: Spread
    generate: Spread
    first_token: Spread
    generate_tok_s: float | None  # tokens generated per second after the first token
    prune_share: float  # fraction of the encode time spent on pruning
    vs_hf: float | None  # speedup of the time to first token over plain transformers
    vs_bound: float | None  # speedup of the time to first token over the bound at this budget
    encode_vs_hf: float | None  # speedup of the encode time over plain transformers
    matmul_share: float | None  # the tower's operations per second, as a fraction of the plain matrix product speed
    peak_bytes: int | None  # maximum over the rounds


Row = tuple[ProfileRow, Figures | None]


@dataclass
class ProfileResults(Results):
    """A profile's settings and the measurements so far."""

    model: ModelFacts
    weights_bytes: int
    env: Environment
    machine: dict[str, Any]  # machine properties that are not in `env`
    settings: dict[str, Any]
    # For each case, the rows for Hugging Face and budget 1.0, followed by the bound and the methods at each budget.
    rows: list[ProfileRow] = field(default_factory=list)
    # The plain matrix product speed in operations per second, with one value per measured round.
    matmul_rates: list[float] = field(default_factory=list)
    warmups: int = 0  # number of warm-up rounds that ran
    rounds: int = 0  # number of measured rounds that ran
    warmup_seconds: float = 0.0
    seconds: float = 0.0  # total duration of the run
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def remarks(self) -> list[str]:
        """The notes and, if fewer rounds than requested were measured, the reason."""
        wanted = self.settings["repetitions"]
        limit = self.settings["time_limit_s"]
        remarks = list(self.notes)
        if self.interrupted:
            remarks.append(f"interrupted: {self.rounds} of {wanted} rounds finished")
        elif self.rounds < wanted:
            remarks.append(
                f"{self.rounds} of {wanted} rounds: another would have exceeded the time limit of {limit:g} s"
            )
        if self.warmup_seconds > limit:
            remarks.append(f"the warm-up took {self.warmup_seconds:.0f} s, more than the time limit of {limit:g} s")
        return remarks

    @property
    def cases(self) -> list[Case]:
        return list(dict.fromkeys(row.case for row in self.rows))

    def of(self, case: Case) -> list[ProfileRow]:
        return [row for row in self.rows if row.case == case]

    def _against(self, row: ProfileRow, other: str, stage: str) -> float | None:
        """Return the speedup of `row` over the row of type `other` in the same case, or None if that row has no samples."""
        peers = (r for r in self.of(row.case) if r.kind == other and (other != BOUND or r.budget == row.budget))
        peer = next((r for r in peers if r.samples), None)
        if peer is None:
            return None
        return median_ratio(peer.seconds(stage), row.seconds(stage))

    def figures(self, row: ProfileRow) -> Figures | None:
        """Compute the statistics of a row. Returns None if the row has no samples."""
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
        """Return all results as a JSON-serializable dict, with times in milliseconds and sizes in bytes."""
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
            "time_ms": {name: _milliseconds(median(seconds)) if seconds else None for name, seconds in times.items()},
            "rate": {"generate_tok_s": f and _short(f.generate_tok_s)},
            "ratio": {name: f and _short(getattr(f, figure)) for name, figure in RATIOS.items()},
            "memory": {"peak_bytes": f and f.peak_bytes},
            "samples": [
                {name: _milliseconds(getattr(sample, stage)) for name, stage in STAGES.items()}
                | {"peak_bytes": sample.peak_bytes}
                for sample in row.samples
            ],
            "error": row.error,
        }

    def text(self, form: str, width: int) -> str:
        """Return the results as text. `form` is "table", "md", "csv" or "json"."""
        if form == "md":
            return self._markdown()
        if form == "csv":
            return self._csv()
        return super().text(form, width)

    def table(self, width: int) -> str:
        """Return two tables for each case, one with the times and one with the amount of work."""
        lines = folded(self._heading(), width)
        shown: list[Column] = []
        for case in self.cases:
            lines += ["", *textwrap.wrap(self._caption(case), width)]
            rows = [(row, self.figures(row)) for row in self.of(case)]
            for columns in (TIMES, WORK):
                drawn, there = fitting(rows, [NAME, *columns], width)
                lines += ["", *drawn]
                shown += there
        legend = _legend(shown)
        if any("±" in line for line in lines):
            legend += ["±: distance of the farthest round from the median"]
        lines += ["", *folded((*legend, *self._remarks()), width)]
        return "\n".join(lines) + "\n"

    def _markdown(self) -> str:
        columns = MARKDOWN
        if len(self.cases) == 1:
            seen = self._caption(self.cases[0])
        else:
            seen = f"{len(self.cases)} sizes"
            columns = [FRAMES, SIZE, *MARKDOWN]
        heading = self._heading()
        head = "; ".join([*heading[:3], seen, *heading[3:]]) + "."
        rows = [(row, self.figures(row)) for row in self.rows]
        notes = (*_legend(MARKDOWN), "Times: median (lowest-highest) of the rounds", *self._remarks())
        items = [f"- {note[0].upper()}{note[1:]}." for note in notes]
        return "\n".join([head, "", *markdown(rows, columns), "", *items]) + "\n"

    def _csv(self) -> str:
        """Return all rows as CSV. Each line repeats the properties of the whole run, and unknown values are left blank."""
        document = self.document()
        common = {"rounds": self.rounds, "warmups": self.warmups, "new_tokens": self.settings["new_tokens"]}
        common |= {"source": self._source(), "matmul_flop_per_s": document["matmul"]["flop_per_s"]}
        common |= {
            f"model_{name}": one_line(document["model"][name]) for name in ("id", "dtype", "device", "load_format")
        }
        common |= document["env"]
        rows = []
        for facts in document["rows"]:
            counts = facts["counts"] or {}
            line = {name: facts[name] for name in KEY}
            line |= {name: counts.get(name) for name in COUNTED}
            for stage, median_ms in facts["time_ms"].items():
                taken = [sample[stage] for sample in facts["samples"]]
                line |= {f"{stage}_ms": median_ms}
                line |= {f"{stage}_low_ms": min(taken, default=None), f"{stage}_high_ms": max(taken, default=None)}
            rows.append(line | facts["rate"] | facts["ratio"] | facts["memory"] | {"error": facts["error"]} | common)
        return as_csv(rows)

    def chart(self) -> str:
        """Draw a chart of times against clip sizes or, if there is only one size, of the encode time against the live share."""
        longest = max((max(row.seconds("first_token")) for row in self.rows if row.samples), default=0)
        unit = "milliseconds"
        factor = 1000.0
        if longest >= 2:
            unit = "seconds"
            factor = 1.0
        if len(self.cases) > 1:
            sizes = ", ".join(sorted({f"{case.height}x{case.width}" for case in self.cases}))
            seen = f"frames of {sizes}"
            subject = "time to the first token"
            panels = self._sweep(unit, factor)
        else:
            used = ", ".join(dict.fromkeys(one_line(row.method) for row in self.rows if row.kind == METHOD))
            seen = str(self.cases[0])
            subject = f"encode against live share of {used}"
            panels = [self._live_share(unit, factor)]
        rounds = "1 round"
        if self.rounds > 1:
            rounds = f"median and range of {self.rounds} rounds"
        name = short_name(self.model.id)
        if self.model.load_format == "dummy":
            name += " with random weights"
        device = device_text(self.model.device, self.env.threads)
        return draw(f"{name}: {subject}", ", ".join([self.model.dtype, device, seen, self._source(), rounds]), panels)

    def _sweep(self, unit: str, factor: float) -> list[Panel]:
        """Return panels that plot encode and first-token times against the number of frames, or of units if frame sizes differ.

        Plain transformers is drawn in gray, and unpruned evoprune in black. A bound has the same color as the row below it.
        """
        by_frames = len({(case.height, case.width) for case in self.cases}) == 1
        pruned = {row.name: row.budget for row in self.rows if row.kind == METHOD}
        colours = dict(zip(pruned, cycle(COLOURS), strict=False))
        colours |= {f"bound -b {budget_text(pruned[name])}": colour for name, colour in reversed(colours.items())}
        panels = []
        for stage, title in (("encode", "Encode"), ("first_token", "First token (encode + prefill)")):
            points: dict[str, list[Point]] = {}
            for row in self.rows:
                figures = self.figures(row)
                if figures and (row.kind != BOUND or stage == "first_token"):
                    x = row.case.frames if by_frames else row.counts.units
                    points.setdefault(row.name, []).append(_point(x, getattr(figures, stage), factor))
            xs = tuple(sorted({point.x for line in points.values() for point in line}))
            label = "frames" if by_frames else "units (visual tokens before pruning)"
            bounds = [name for name in points if name.startswith("bound")]
            panels.append(Panel(title, label, unit, lines(points, colours | FIXED, bounds), xs))
        return panels

    def _live_share(self, unit: str, factor: float) -> Panel:
        """Return a panel that plots the encode time against the live share (share of rows computed), with one line per method."""
        points: dict[str, list[Point]] = {}
        forms = [row.quantize for row in self.rows if row.kind == METHOD]
        # Show the same form of the weights for all methods.
        shown = "none" if "none" in forms else next(iter(forms), "none")
        for row in self.rows:
            figures = self.figures(row)
            if figures and row.kind != BOUND and (row.kind != METHOD or row.quantize == shown):
                name = row.method if row.kind == METHOD else row.name
                label = ""
                if row.counts.live_share < 1:
                    label = f"-b {budget_text(row.budget)}"
                points.setdefault(name, []).append(_point(row.counts.live_share, figures.encode, factor, label))
        ideal = "live share of budget 1.0's time"
        if "budget 1.0" in points:
            points = {ideal: [Point(0, 0), Point(1, points["budget 1.0"][0].y)], **points}
        series = lines(points, FIXED | {ideal: PALE}, [ideal])
        return Panel("Encode", "live share: rows computed, averaged over all layers", unit, series)

    def _source(self) -> str:
        return one_line(self.settings.get("video") or f"synthetic {self.settings.get('synthetic', 'clip')}")

    def _heading(self) -> list[str]:
        """Return the lines above the tables, which describe the model, the machine, and the input."""
        model = self.model
        env = self.env
        name = one_line(model.id)
        if model.load_format == "dummy":
            name += " (true dimensions, random weights)"
        text_tokens = f"{self.settings['text_tokens']} text tokens"
        read = [self._source(), text_tokens, counted(self.settings["new_tokens"], "new token")]
        return [
            f"evoprune profile {env.evoprune}, torch {env.torch}, transformers {env.transformers}",  # `-o` recognizes files by it
            f"{name}, {model.dtype}",
            f"{device_text(model.device, env.threads)}: {env.device_name}, {median(self.matmul_rates) / 1e9:,.0f} GFLOP/s in "
            "matrix products",
            "; ".join(read),
            f"{counted(self.rounds, 'round')} after {self.warmups} of warm-up, {self.seconds:.0f} s in all",
        ]

    def _remarks(self) -> list[str]:
        failed = [f"{row.name}, {row.case}: {row.error}" for row in self.rows if row.error and row.kind != BOUND]
        return [*failed, *self.remarks]

    def _caption(self, case: Case) -> str:
        for row in self.of(case):
            if row.counts:
                return f"{case}: {counted(row.counts.units, 'unit')}"
        return str(case)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


LEGEND = (
    "Hugging Face: plain transformers on the same weights; budget 1.0: evoprune, nothing pruned",
    "bound: the best possible result of pruning after the encoder, computed from the same round: encode of budget 1.0, a free "
    "selection, and prefill and generation with the tokens that the row below it keeps",
)


def _legend(columns: Sequence[Column]) -> list[str]:
    """Return the notes below a table that explain its rows and columns."""
    ratios = ", ".join(title for title in ("vs HF", "vs bound") if title in [column.title for column in columns])
    texts = [*LEGEND]
    if ratios:
        faster = "speedup, the median of the ratios in each round; first token is encode + prefill"
        texts.append(f"{ratios}: {faster}")
    if shares := meanings(list(dict.fromkeys(columns))):
        texts.append(shares)
    return texts


def _ms(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.1f}"
    return f"{seconds * 1000:,.0f}"


def _near(spread: Spread) -> str:
    """Format a time as the median, followed by the largest relative deviation in any round if the rounds differ."""
    far = max(spread.high - spread.median, spread.median - spread.low)
    if not far:
        return _ms(spread.median)
    return f"{_ms(spread.median)} ±{far / spread.median:.0%}"


def _range(spread: Spread) -> str:
    """Format a time as the median, followed by the minimum and maximum if the rounds differ."""
    if spread.low == spread.high:
        return _ms(spread.median)
    return f"{_ms(spread.median)} ({_ms(spread.low)}-{_ms(spread.high)})"


def _rate(tokens_s: float) -> str:
    if tokens_s < 10:
        return f"{tokens_s:.2f}"
    return f"{tokens_s:,.0f}"


def _figure(show: Callable[[Any], str], name: str, row: Row) -> str:
    """Format a statistic of a row. Returns "-" if the row has no statistics, or "" if only this statistic is unknown."""
    _, figures = row
    if figures is None:
        return "-"
    value = getattr(figures, name)
    return "" if value is None else show(value)


def _count(show: Callable[[Any], str], name: str, row: Row) -> str:
    """Format a count of a row. Returns "-" if the row has no counts."""
    counts = row[0].counts
    return "-" if counts is None else show(getattr(counts, name))


def _pruning(row: Row) -> str:
    """Format the fraction of the encode time spent on pruning. Returns "" if the row does not prune."""
    if row[1] and row[0].kind != METHOD:
        return ""
    return _figure("{:.1%}".format, "prune_share", row)


NAME: Column[Row] = Column("", lambda row: row[0].name)
FRAMES: Column[Row] = Column("frames", lambda row: f"{row[0].case.frames:,}")
SIZE: Column[Row] = Column("size", lambda row: f"{row[0].case.height}x{row[0].case.width}")
# The columns of text and Markdown tables, keyed by title. Columns with a lower `drop` are dropped earlier.
BOTH: dict[str, Column[Row]] = {
    column.title: column
    for column in (
        Column("vs HF", partial(_figure, "{:.2f}x".format, "vs_hf")),
        Column("vs bound", partial(_figure, "{:.2f}x".format, "vs_bound"), drop=8),
        Column("tower vs HF", partial(_figure, "{:.2f}x".format, "encode_vs_hf"), drop=7),
        Column("tok/s", partial(_figure, _rate, "generate_tok_s"), drop=1),
        Column("tokens", partial(_count, "{:,}".format, "tokens")),
        Column(
            "live",
            partial(_count, "{:.2f}".format, "live_share"),
            "live: share of rows computed by the tower, averaged over its layers",
        ),
        Column("pruning", _pruning, drop=4),
        Column(
            "matmul",
            partial(_figure, "{:.0%}".format, "matmul_share"),
            "matmul: share of the machine's matmul rate that is reached",
            drop=5,
        ),
        Column("peak", partial(_figure, size, "peak_bytes"), drop=2),
    )
}
TIMES: list[Column[Row]] = [
    Column("encode ms", partial(_figure, _near, "encode"), drop=6),
    Column("prefill", partial(_figure, lambda spread: _ms(spread.median), "prefill"), drop=3),
    Column("first token", partial(_figure, _near, "first_token")),
    *(BOTH[title] for title in ("vs HF", "vs bound", "tok/s")),
]
WORK = [BOTH[title] for title in ("tokens", "live", "tower vs HF", "matmul", "pruning", "peak")]
MARKDOWN: list[Column[Row]] = [
    NAME,
    Column("encode ms", partial(_figure, _range, "encode")),
    Column("prefill ms", partial(_figure, _range, "prefill")),
    Column("first token ms", partial(_figure, _range, "first_token")),
    *(BOTH[title] for title in ("vs HF", "vs bound", "tower vs HF", "tok/s", "tokens")),
    Column("prompt", partial(_count, "{:,}".format, "prompt")),
    Column("rows", partial(_count, "{:,}".format, "encoder_rows")),
    *(BOTH[title] for title in ("live", "pruning", "matmul", "peak")),
]

FIXED = {"Hugging Face": PALE, "budget 1.0": INK}  # colors in the chart


def _point(x: float, spread: Spread, factor: float, label: str = "") -> Point:
    return Point(x, spread.median * factor, spread.low * factor, spread.high * factor, label)

"""The results of `evoprune profile` as a table for a terminal, Markdown, CSV or JSON, and as a chart."""

import csv
import io
import textwrap
from collections.abc import Callable, Collection, Sequence
from itertools import cycle
from statistics import median
from typing import Any

from evoprune.bench.chart import COLOURS, INK, PALE, Panel, Point, Series, draw
from evoprune.bench.profile_results import BOUND, METHOD, Case, Figures, ProfileResults, ProfileRow, Spread
from evoprune.text import counted, size
from evoprune_cli.tables import fitting, folded, one_line, short_name
from evoprune_cli.terminal import json_line

Cell = Callable[[ProfileRow, Figures | None], str]

LEGEND = (
    "Hugging Face: plain transformers on the same weights; budget 1.0: evoprune, nothing pruned",
    "bound: the best that pruning after the encoder can do, put together from the same round: encode of budget 1.0, a selection "
    "that costs nothing, prefill and generation of as many tokens as the row below it keeps",
    "{ratios}: how many times faster, the median of the rounds' own ratios; first token is encode + prefill",
)
SHARES = {
    "live": "share of the rows that the tower computes, mean over its layers",
    "matmul": "of the machine's rate, what it reaches",
}


def _legend(titles: Collection[str]) -> list[str]:
    """What rows and columns mean; `titles`: of the columns that are there."""
    ratios = ", ".join(title for title in ("vs HF", "vs bound") if title in titles)
    shares = "; ".join(f"{title}: {text}" for title, text in SHARES.items() if title in titles)
    return [
        *(text.format(ratios=ratios) for text in LEGEND if ratios or "{ratios}" not in text),
        *filter(None, [shares]),
    ]


def render(results: ProfileResults, form: str, width: int = 80) -> str:
    """The results as `table`, `md`, `csv` or `json`; `width` is that of a table, in columns."""
    if form == "json":
        return json_line(results.document()) + "\n"
    return {"table": lambda r: _table(r, width), "md": _markdown, "csv": _csv}[form](results)


# The cells.


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def _near(spread: Spread) -> str:
    """The median, and how far the farthest round is from it, if there is more than one round."""
    far = max(spread.high - spread.median, spread.median - spread.low)
    return f"{_ms(spread.median)} ±{far / spread.median:.0%}" if far else _ms(spread.median)


def _range(spread: Spread) -> str:
    """The median, and the range of the rounds."""
    apart = spread.low < spread.high
    return f"{_ms(spread.median)} ({_ms(spread.low)}-{_ms(spread.high)})" if apart else _ms(spread.median)


def _rate(rate: float) -> str:
    return f"{rate:.2f}" if rate < 10 else f"{rate:,.0f}"


def _of(show: Callable[[Any], str], name: str) -> Cell:
    """A cell for a figure; a dash where the row has no figures, and nothing where this one is unknown."""

    def cell(row: ProfileRow, figures: Figures | None) -> str:
        value = getattr(figures, name, None)
        return "-" if figures is None else "" if value is None else show(value)

    return cell


def _count(show: Callable[[Any], str], name: str) -> Cell:
    return lambda row, figures: show(getattr(row.counts, name)) if row.counts else "-"


def _pruning(row: ProfileRow, figures: Figures | None) -> str:
    return "" if figures and row.kind != METHOD else _of("{:.1%}".format, "prune_share")(row, figures)


# The head: what was measured, and how.


def _source(results: ProfileResults) -> str:
    """The video, or the kind of synthetic clip."""
    settings = results.settings
    return one_line(settings.get("video") or f"synthetic {settings.get('synthetic', 'clip')}")


def _device(results: ProfileResults) -> str:
    """The device, with its threads if it is a CPU."""
    name = results.model.device
    return f"{name} ({counted(results.env.threads, 'thread')})" if name.startswith("cpu") else name


def _head(results: ProfileResults) -> list[str]:
    model, env, asked = results.model, results.env, results.settings
    args = "; ".join(f"{name}={value}" for name, value in (asked["method_args"] or {}).items())
    weights = " (true dimensions, random weights)" if model.load_format == "dummy" else ""
    return [
        f"evoprune profile {env.evoprune}, torch {env.torch}, transformers {env.transformers}",  # as results.py knows it
        f"{one_line(model.id)}{weights}, {model.dtype}",
        f"{_device(results)}: {env.device_name}, {median(results.matmul_rates) / 1e9:,.0f} GFLOP/s in matrix products",
        f"{_source(results)}; {asked['text_tokens']} text tokens; {counted(asked['new_tokens'], 'new token')}"
        + (f"; {one_line(args)}" if args else ""),
        f"{counted(results.rounds, 'round')} after {results.warmups} of warm-up, {results.seconds:.0f} s in all",
    ]


def _tail(results: ProfileResults) -> list[str]:
    failed = [f"{row.name}, {row.case}: {row.error}" for row in results.rows if row.error and row.kind != BOUND]
    return [*failed, *results.remarks]


def _caption(results: ProfileResults, case: Case) -> str:
    units = next((row.counts.units for row in results.of(case) if row.counts), None)
    return f"{case}" + (f": {counted(units, 'unit')}" if units else "")


# For a terminal: a table of times, and below it one of the work behind them. Columns are dropped in the order of `LEAST` where
# the terminal has too few characters.

TIMES: dict[str, Cell] = {
    "encode ms": _of(_near, "encode"),
    "prefill": _of(lambda spread: _ms(spread.median), "prefill"),
    "first token": _of(_near, "first_token"),
    "vs HF": _of("{:.2f}x".format, "vs_hf"),
    "vs bound": _of("{:.2f}x".format, "vs_bound"),
    "tok/s": _of(_rate, "generate_tok_s"),
}
WORK: dict[str, Cell] = {
    "tokens": _count("{:,}".format, "tokens"),
    "live": _count("{:.2f}".format, "live_share"),
    "tower vs HF": _of("{:.2f}x".format, "encode_vs_hf"),
    "matmul": _of("{:.0%}".format, "matmul_share"),
    "pruning": _pruning,
    "peak": _of(size, "peak_bytes"),
}
LEAST = ("tok/s", "peak", "prefill", "pruning", "matmul", "encode ms", "tower vs HF", "vs bound")


def _table(results: ProfileResults, width: int) -> str:
    lines, titles = folded(_head(results), width), []
    for case in results.cases:
        lines += ["", *textwrap.wrap(_caption(results, case), width)]
        found = [(row, results.figures(row)) for row in results.of(case)]
        for columns in (TIMES, WORK):
            cells = {title: (lambda pair, cell=cell: cell(*pair)) for title, cell in columns.items()}
            made, there = fitting(found, lambda pair: pair[0].name, cells, LEAST, width)
            lines += ["", *made]
            titles += there
    lines += ["", *folded((*_legend(titles), "±: the round that is farthest from the median", *_tail(results)), width)]
    return "\n".join(lines) + "\n"


# For a page.

_ALL = TIMES | WORK
MARKDOWN: dict[str, Cell] = {
    "encode ms": _of(_range, "encode"),
    "prefill ms": _of(_range, "prefill"),
    "first token ms": _of(_range, "first_token"),
    **{title: _ALL[title] for title in ("vs HF", "vs bound", "tower vs HF", "tok/s", "tokens")},
    "prompt": _count("{:,}".format, "prompt"),
    "rows": _count("{:,}".format, "encoder_rows"),
    **{title: _ALL[title] for title in ("live", "pruning", "matmul", "peak")},
}


def _markdown(results: ProfileResults) -> str:
    one = results.cases[0] if len(results.cases) == 1 else None
    seen = _caption(results, one) if one else f"{len(results.cases)} sizes"
    head = "; ".join([*_head(results)[:3], seen, *_head(results)[3:]]) + "."
    titles = ["", *MARKDOWN] if one else ["frames", "size", "", *MARKDOWN]
    lines = [head, "", _cells(titles), _cells("---" for _ in titles)]
    for row in results.rows:
        figures, case = results.figures(row), row.case
        where = [] if one else [f"{case.frames:,}", f"{case.height}x{case.width}"]
        lines.append(_cells([*where, row.name, *(cell(row, figures) for cell in MARKDOWN.values())]))
    notes = (*_legend(MARKDOWN), "Times: the median (lowest-highest) of the rounds", *_tail(results))
    return "\n".join([*lines, "", *(f"- {note[0].upper()}{note[1:]}." for note in notes)]) + "\n"


def _cells(texts) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def _csv(results: ProfileResults) -> str:
    """One line a row, each complete in itself; empty where a value is unknown."""
    document, made = results.document(), []
    common = {"rounds": results.rounds, "warmups": results.warmups, "new_tokens": results.settings["new_tokens"]}
    common |= {"source": _source(results), "matmul_flop_per_s": document["matmul"]["flop_per_s"]}
    common |= {f"model_{name}": one_line(document["model"][name]) for name in ("id", "dtype", "device", "load_format")}
    common |= document["env"]
    for facts in document["rows"]:
        counts = facts["counts"] or {}
        line = {
            name: facts[name] for name in ["row", "name", "method", "budget", "quantize", "frames", "height", "width"]
        }
        line |= {
            name: counts.get(name) for name in ["units", "encoder_rows", "live_share", "tokens", "prompt", "tower_flop"]
        }
        for stage, median_ms in facts["time_ms"].items():
            taken = [sample[stage] for sample in facts["samples"]]
            line |= {f"{stage}_ms": median_ms}
            line |= {f"{stage}_low_ms": min(taken, default=None), f"{stage}_high_ms": max(taken, default=None)}
        made.append(line | facts["rate"] | facts["ratio"] | facts["memory"] | {"error": facts["error"]} | common)
    out = io.StringIO()
    writer = csv.DictWriter(out, made[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(made)
    return out.getvalue()


# The chart.


def draw_chart(results: ProfileResults) -> str:
    """SVG. Where sizes are swept, time against them; else the tower's time against its live share."""
    cases, model = results.cases, results.model
    sweep = len(cases) > 1
    sizes = ", ".join(sorted({f"{case.height}x{case.width}" for case in cases}))
    facts = [model.dtype, _device(results), f"frames of {sizes}" if sweep else str(cases[0]), _source(results)]
    facts.append(f"median and range of {results.rounds} rounds" if results.rounds > 1 else "1 round")
    name = short_name(model.id) + " with random weights" * (model.load_format == "dummy")
    used = ", ".join(dict.fromkeys(one_line(row.method) for row in results.rows if row.kind == METHOD))
    title = f"{name}: {'time to the first token' if sweep else f'encode against live share of {used}'}"
    return draw(title, ", ".join(facts), _sweep(results) if sweep else [_live_share(results)])


def _colours(rows: Sequence[ProfileRow]) -> dict[str, str]:
    """By name: plain transformers grey, evoprune without pruning black, methods in colour; a bound like the row below it."""
    pruned = {row.name: row.budget for row in rows if row.kind == METHOD}
    made = dict(zip(pruned, cycle(COLOURS), strict=False))
    bounds = {f"bound -b {pruned[name]:g}": colour for name, colour in reversed(made.items())}
    return made | bounds | {"Hugging Face": PALE, "budget 1.0": INK}


def _scale(results: ProfileResults) -> tuple[str, float]:
    """The unit for all times of a chart, and what to multiply seconds by."""
    longest = max((max(row.seconds("first_token")) for row in results.rows if row.samples), default=0)
    return ("seconds", 1.0) if longest >= 2 else ("milliseconds", 1000.0)


def _point(x: float, spread: Spread, factor: float, label: str = "") -> Point:
    return Point(x, spread.median * factor, spread.low * factor, spread.high * factor, label)


def _series(lines: dict[str, list[Point]], colours: dict[str, str]) -> tuple[Series, ...]:
    """A line for each name, from left to right; a bound is dashed."""
    ordered = {name: tuple(sorted(points, key=lambda point: point.x)) for name, points in lines.items()}
    return tuple(Series(name, points, colours[name], name.startswith("bound")) for name, points in ordered.items())


def _sweep(results: ProfileResults) -> list[Panel]:
    """Encode, and the first token, against the frames, or against the units where their size changes too."""
    by_frames = len({(case.height, case.width) for case in results.cases}) == 1
    unit, factor = _scale(results)
    colours, panels = _colours(results.rows), []
    for stage, title in (("encode", "Encode"), ("first_token", "First token (encode + prefill)")):
        lines: dict[str, list[Point]] = {}
        for row in results.rows:
            figures = results.figures(row)
            if figures and (row.kind != BOUND or stage == "first_token"):
                x = row.case.frames if by_frames else row.counts.units
                lines.setdefault(row.name, []).append(_point(x, getattr(figures, stage), factor))
        xs = tuple(sorted({point.x for points in lines.values() for point in points}))
        label = "frames" if by_frames else "units (visual tokens before pruning)"
        panels.append(Panel(title, label, unit, _series(lines, colours), xs))
    return panels


def _live_share(results: ProfileResults) -> Panel:
    unit, factor = _scale(results)
    lines: dict[str, list[Point]] = {}
    for row in results.rows:
        figures = results.figures(row)
        if figures and row.kind != BOUND and row.quantize == "none":  # a line a method
            name = row.method if row.kind == METHOD else row.name
            label = f"-b {row.budget:g}" if row.counts.live_share < 1 else ""
            lines.setdefault(name, []).append(_point(row.counts.live_share, figures.encode, factor, label))
    fixed = {"Hugging Face": PALE, "budget 1.0": INK}
    colours = fixed | dict(zip((name for name in lines if name not in fixed), cycle(COLOURS), strict=False))
    full = [(Point(0, 0), Point(1, points[0].y)) for name, points in lines.items() if name == "budget 1.0"]
    ideal = [Series("live share of budget 1.0's time", points, PALE, dashed=True) for points in full]
    series = (*ideal, *_series(lines, colours))
    return Panel("Encode", "live share: rows computed, mean over all layers", unit, series)

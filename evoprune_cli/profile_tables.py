"""The results of `evoprune profile` as text: a table for a terminal, Markdown, CSV or JSON."""

import csv
import io
import textwrap
from collections.abc import Callable
from statistics import median
from typing import Any

from evoprune.profiling.results import BOUND, METHOD, Case, Figures, Results, Row, Spread
from evoprune.text import counted, size
from evoprune_cli.tables import fitting, folded, one_line
from evoprune_cli.terminal import json_line

Cell = Callable[[Row, Figures | None], str]

LEGEND = (
    "Hugging Face: plain transformers under sdpa, on the same weights; budget 1.0: evoprune, nothing pruned",
    "bound: the best that pruning after the encoder can do, put together from the same round: encode of budget 1.0, a selection "
    "that costs nothing, prefill and generation of as many tokens as the row below it keeps",
    "vs HF, vs bound: how many times faster, the median of the rounds' own ratios; first token is encode + prefill",
    "live: share of the rows that the tower computes, mean over its layers; matmul: of the machine's rate, what it reaches",
)


def render(results: Results, form: str, width: int = 80) -> str:
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

    def cell(row: Row, figures: Figures | None) -> str:
        value = getattr(figures, name, None)
        return "-" if figures is None else "" if value is None else show(value)

    return cell


def _count(show: Callable[[Any], str], name: str) -> Cell:
    return lambda row, figures: show(getattr(row.counts, name)) if row.counts else "-"


def _pruning(row: Row, figures: Figures | None) -> str:
    return "" if figures and row.kind != METHOD else _of("{:.1%}".format, "prune_share")(row, figures)


# The head: what was measured, and how.


def source(results: Results) -> str:
    """The video, or the kind of synthetic clip."""
    settings = results.settings
    return one_line(settings.get("video") or f"synthetic {settings.get('synthetic', 'clip')}")


def device(results: Results) -> str:
    """The device, with its threads if it is a CPU."""
    name = results.model.device
    return f"{name} ({counted(results.env.threads, 'thread')})" if name.startswith("cpu") else name


def _head(results: Results) -> list[str]:
    model, env, asked = results.model, results.env, results.settings
    args = "; ".join(f"{name}={value}" for name, value in (asked["method_args"] or {}).items())
    weights = " (true dimensions, random weights)" if model.load_format == "dummy" else ""
    return [
        f"evoprune profile {env.evoprune}, torch {env.torch}, transformers {env.transformers}",  # as evoprune_cli/files.py knows it
        f"{one_line(model.id)}{weights}, {model.dtype}",
        f"{device(results)}: {env.device_name}, {median(results.matmul_rates) / 1e9:,.0f} GFLOP/s in matrix products",
        f"{source(results)}; {asked['text_tokens']} text tokens; {counted(asked['new_tokens'], 'new token')}"
        + (f"; {one_line(args)}" if args else ""),
        f"{counted(results.rounds, 'round')} after {results.warmups} of warm-up, {results.seconds:.0f} s in all",
    ]


def _tail(results: Results) -> list[str]:
    """Rows that failed, and the remarks."""
    failed = [f"{row.name}, {row.case}: {row.error}" for row in results.rows if row.error and row.kind != BOUND]
    return [*failed, *results.remarks]


def _caption(results: Results, case: Case) -> str:
    units = next((row.counts.units for row in results.of(case) if row.counts), None)
    return f"{case}" + (f": {units:,} units" if units else "")


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


def _table(results: Results, width: int) -> str:
    lines = folded(_head(results), width)
    for case in results.cases:
        lines += ["", *textwrap.wrap(_caption(results, case), width)]
        found = [(row, results.figures(row)) for row in results.of(case)]
        for columns in (TIMES, WORK):
            cells = {title: (lambda pair, cell=cell: cell(*pair)) for title, cell in columns.items()}
            lines += ["", *fitting(found, lambda pair: pair[0].name, cells, LEAST, width)[0]]
    lines += ["", *folded((*LEGEND, "±: the round that is farthest from the median", *_tail(results)), width)]
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


def _markdown(results: Results) -> str:
    one = results.cases[0] if len(results.cases) == 1 else None
    seen = _caption(results, one) if one else f"{len(results.cases)} sizes"
    head = "; ".join([*_head(results)[:3], seen, *_head(results)[3:]]) + "."
    titles = ["", *MARKDOWN] if one else ["frames", "size", "", *MARKDOWN]
    lines = [head, "", _cells(titles), _cells("---" for _ in titles)]
    for row in results.rows:
        figures, case = results.figures(row), row.case
        where = [] if one else [f"{case.frames:,}", f"{case.height}x{case.width}"]
        lines.append(_cells([*where, row.name, *(cell(row, figures) for cell in MARKDOWN.values())]))
    notes = (*LEGEND, "Times: the median (lowest-highest) of the rounds", *_tail(results))
    return "\n".join([*lines, "", *(f"- {note[0].upper()}{note[1:]}." for note in notes)]) + "\n"


def _cells(texts) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def _csv(results: Results) -> str:
    """One line a row, each complete in itself; empty where a value is unknown."""
    document, made = results.document(), []
    common = {"rounds": results.rounds, "warmups": results.warmups, "new_tokens": results.settings["new_tokens"]}
    common |= {"source": source(results), "matmul_flop_per_s": document["matmul"]["flop_per_s"]}
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

"""`evoprune profile`: latency, counts and memory, against plain Hugging Face and against the best that pruning later can do.

ProfileResults are a table for a terminal, Markdown, CSV or JSON, and a chart.
"""

import csv
import io
import math
import re
import textwrap
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from evoprune.backend.cpu.precision import LOAD_FORMATS, QUANTIZE
from evoprune.bench.chart import COLOURS, INK, PALE, Panel, Point, Series, draw
from evoprune.bench.profile_results import BOUND, METHOD, SYNTHETIC, Case, Figures, ProfileResults, ProfileRow, Spread
from evoprune.errors import UsageError
from evoprune.report import device_text
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.util import budget_text, counted, one_line, without_password
from evoprune.util import size as size_text
from evoprune.video.info import PICTURE, VIDEO, Video
from evoprune_cli import options as opt
from evoprune_cli.running import SOME_FAILED, check_chart, check_writable, prepare, print_text, rescuing, write_bytes
from evoprune_cli.terminal import (
    WIDTH,
    check_output,
    fitting,
    folded,
    json_line,
    note,
    page_width,
    progress,
    short_name,
)

if TYPE_CHECKING:
    from evoprune.bench.profile_results import TimeLimit
    from evoprune.session.loading.description import ModelDescription

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
UNITS = (28, 32)  # sides of a unit in pixels, that models have
SIZE = (224, 336)  # pixels of a frame, height and width, with the first of these; with the other as many units
PICTURES = ((1344, 1344), (2688, 2688))  # 2,304 and 9,216 visual tokens
FORMATS = ("table", "md", "csv", "json")
NOTED_S = 2.0  # a run that takes longer is announced
ROUNDS = "Rounds"  # the title of a panel


@opt.command(
    ModelOptions,
    PruneOptions,
    short="budget method frames size model time_limit form output chart quiet",
    without=("load_format", "quantize", "budget", "method"),
    model={
        "unless_typed": MODEL,
        "help": "Hub id, local folder, demo or demo-scenes. EVOPRUNE_MODEL is ignored.",
        "env": None,
    },
)
def profile(
    *,
    video: opt.argument(str | None, "VIDEO", "A video instead of a synthetic clip; see --synthetic.") = None,
    budget: opt.Budgets = None,
    method: opt.Methods = None,
    frames: opt.option(
        list[str] | None, "--frames LIST", "Numbers of frames, odd ones round up; default: 8.", opt.SWEEP
    ) = None,
    size: opt.option(
        list[str] | None,
        "--size HxW,...",
        "Height x width of the frames in pixels, multiples of 28 (Qwen3-VL: 32); default: 224x336 (256x384), for a VIDEO its "
        "own shape at no more pixels.",
        opt.SWEEP,
    ) = None,
    synthetic: opt.option(
        str | None,
        "--synthetic",
        "Without VIDEO: things that move before a still background, a still picture with a tenth of it changing, "
        "or noise; default: motion.",
        opt.SWEEP,
        **opt.one_of(*SYNTHETIC),
    ) = None,
    pictures: opt.option(
        bool,
        "--pictures",
        "Pictures instead of clips: of 1344x1344 and 2688x2688 pixels (2,304 and 9,216 visual tokens), or of --size.",
        opt.SWEEP,
    ) = False,
    options: opt.MakeOptions,
    load_format: opt.option(
        str | None,
        "--load-format",
        "auto reads the weights; dummy takes random ones, which are as fast and need no network; default: dummy for "
        "a name whose dimensions come with evoprune (evoprune inspect -m NAME), else auto.",
        ModelOptions.PANEL,
        **opt.one_of(*LOAD_FORMATS),
    ) = None,
    quantize: opt.option(
        list[str] | None,
        "--quantize",
        "Of none, int8, int4: how the weights are quantised, CPU only; default: none.",
        opt.SWEEP,
        **opt.list_of(*QUANTIZE),
    ) = None,
    new_tokens: opt.option(
        int, "-n --new-tokens N", "Tokens to generate whatever they are, for tokens/s.", ROUNDS, min=1
    ) = 4,
    repeat: opt.option(int, "-r --repeat N", "Rounds to measure.", ROUNDS, min=1) = 3,
    warmup: opt.option(int, "-w --warmup N", "Rounds before those that are measured.", ROUNDS, min=0) = 1,
    time_limit: opt.option(
        float,
        "--time-limit SECONDS",
        "Of the whole run, loading included. Rows and rounds that would end later are left out, except Hugging Face, budget "
        "1.0 and one method; if even these surely take longer, nothing is run.",
        ROUNDS,
        min=0,
    ) = 150,
    form: opt.option(str, "--format", "Output format.", opt.OUTPUT, **opt.one_of(*FORMATS)) = "table",
    output: opt.option(str | None, "-o --output FILE", "Write there instead of to stdout.", opt.OUTPUT) = None,
    chart: opt.option(
        str | None,
        "--chart FILE.svg",
        "Draw time against frames or size if they are swept, else the encoder's time against the rows computed.",
        opt.OUTPUT,
    ) = None,
    quiet: opt.Quiet = False,
) -> int:
    """Measure latency, counts and memory over a sweep.

    Every run also measures plain Hugging Face transformers, budget 1.0 and the bound, the best time of any method that prunes after
    the encoder; all in turn and on the same weights. By default these are random, at the dimensions of Qwen2.5-VL-3B: speed does
    not depend on their values. Exit code 6: done, but some rows ran out of memory.

    \b
    evoprune profile
    evoprune profile -b 0.25,0.1 --frames 8,16,32 --chart sweep.svg
    evoprune profile --synthetic static90 --frames 32 -b fast --format json
    evoprune profile --pictures -b 0.25,0.1 --time-limit 3600
    """
    bits = tuple(dict.fromkeys(opt.listed(quantize) or ["none"]))
    pipeline = options()
    settings = {
        **opt.sweep(budget, method, pipeline.pruning.method_args), "seed": pipeline.pruning.seed,
        "quantize": bits, "new_tokens": new_tokens, "warmups": warmup, "repetitions": repeat,
    }  # fmt: skip
    counts = _frames(opt.listed(frames))
    sizes = _sizes(opt.listed(size))
    choices = [("--quantize", width, QUANTIZE) for width in bits]
    choices += [("--format", form, FORMATS), ("--load-format", load_format, (None, *LOAD_FORMATS))]
    for name, value, known in (*choices, ("--synthetic", synthetic, (None, *SYNTHETIC))):
        if value not in known:
            raise UsageError(f"{name} {value!r} is unknown", f"one of {', '.join(filter(None, known))}")
    if video is not None and synthetic is not None:
        raise UsageError("a video and --synthetic exclude each other", "give one of the two")
    if pictures:
        if video is not None or frames:
            raise UsageError("--pictures excludes a video and --frames", "leave them out; --size takes other sizes")
        counts = [1]
        sizes = sizes or [*PICTURES]
    if output is None:
        check_output()
    else:
        check_writable(output, inputs=[video or ""])
    check_chart(chart, inputs=[video or ""])
    results = None

    def deliver(error: dict[str, Any] | None = None) -> None:
        """Prints or writes the results, and the chart; of a run that breaks off, those of the finished rounds."""
        if error is not None:
            results.interrupted = error["type"] in ("interrupted", "terminated")
        try:
            if output is None:
                print_text(render(results, form, page_width()))
            else:
                _write_or_print(output, render(results, form, WIDTH))
        finally:  # also where nobody reads stdout
            if chart:
                write_bytes(chart, draw_chart(results).encode())

    inputs = _inputs(video, counts, sizes, pipeline.model.offline)
    ready = rescuing(lambda: results is not None, deliver)
    with ready, inputs as (cases, info), progress(not quiet, timing=True) as show:
        begun = time.perf_counter()
        show("loading libraries")
        prepare()
        from evoprune.bench.clips import synthetic_frames, video_frames
        from evoprune.bench.profile import default_load_format, load, measure, needs_of
        from evoprune.bench.profile_results import ProfileSettings, TimeLimit
        from evoprune.session.loading.description import describe
        from evoprune.session.session import check_fits

        limit = TimeLimit(time_limit, begun=begun)
        swept = ProfileSettings(**settings, time_limit_s=time_limit)
        methods = [
            swept.config(name, 1.0).method for name in swept.methods
        ]  # refuses wrong settings before a model is looked for
        name = pipeline.model.model
        model = describe(replace(pipeline.model, load_format=load_format or default_load_format(name)))
        unit = model.limits[VIDEO].unit
        if not size:  # as many units, of another side in pixels
            cases = [case.of_units(unit / UNITS[0]) for case in cases]
        for reducer in methods:
            check_fits(reducer, model)
        needs = needs_of(model, cases, new_tokens)
        _check_time(needs.seconds, limit, model)
        if needs.seconds >= NOTED_S and not quiet:
            note(f"needs about {size_text(needs.memory)} of memory and at least {needs.seconds:.0f} s")
        show("loading model")
        loaded = load(model, cases)
        if info:
            about = {"video": without_password(video), "synthetic": None}
            read = partial(video_frames, info)
        else:
            kind = synthetic or SYNTHETIC[0]
            about = {"video": None, "synthetic": kind}
            read = partial(synthetic_frames, kind, unit=unit)
        for results in measure(loaded, cases, read, swept, about=about, progress=show, limit=limit):  # noqa: B007
            pass
    deliver()
    return SOME_FAILED if any(row.error for row in results.rows) else 0


def _check_time(seconds: float, limit: "TimeLimit", model: "ModelDescription") -> None:
    """Raises UsageError: what a run takes in `seconds`, at least, goes beyond its limit."""
    if seconds <= limit.left:
        return
    total = seconds + limit.spent
    raise UsageError(
        f"Hugging Face and budget 1.0 alone take at least {total:.0f} s on this machine with {model.id}, the import of libraries "
        f"included, and --time-limit is {limit.seconds:g}",
        f"--time-limit {2 * math.ceil(total)}, fewer or smaller frames (--frames, --size), or -m demo",
    )


def _write_or_print(path: str, text: str) -> None:
    """Write results to a file. Where that fails, print them, which took minutes to find out, and raise the UsageError."""
    try:
        write_bytes(path, text.encode())
    except UsageError:
        print_text(text)
        raise


@contextmanager
def _inputs(
    video: str | None, counts: list[int], sizes: list[tuple[int, int]], offline: bool
) -> Iterator[tuple[list, Video | None]]:
    """Provide the cases to measure, and the video whose frames they have; None for synthetic clips."""
    from evoprune.bench.profile_results import Case

    if video is None:
        yield [Case(count, *size) for count in counts for size in sizes or [SIZE]], None
        return
    from evoprune.video.frames import local_file, probe
    from evoprune.video.plan import InputLimits, SamplingOptions, make_plan, smart_resize

    with local_file(video, offline=offline) as path:
        info = probe(path)
        if info.kind == PICTURE:
            limits = InputLimits(min_pixels=56 * 56, max_pixels=PICTURES[-1][0] * PICTURES[-1][1])
            plan = make_plan(info, limits)
            counts = [1]
            sizes = sizes or [(plan.height, plan.width)]
        for count in counts:
            make_plan(
                info, InputLimits(), SamplingOptions(frames=count)
            )  # refuses a count that the video does not allow
        # The video's own shape, at no more pixels than synthetic clips have.
        sizes = sizes or [smart_resize(info.height, info.width, 28 * 28, SIZE[0] * SIZE[1])]
        yield [Case(count, *size) for count in counts for size in sizes], info


def _frames(texts: list[str]) -> list[int]:
    """Parse even numbers of frames, each once."""
    if wrong := [text for text in texts if not re.fullmatch("[0-9]{1,9}", text) or not int(text)]:
        raise UsageError(f"--frames {wrong[0]!r} is not a number of frames", "for example --frames 8,32")
    return list(dict.fromkeys(int(text) + int(text) % 2 for text in texts or ["8"]))


def _sizes(texts: list[str]) -> list[tuple[int, int]]:
    """Parse pairs (height, width) in pixels, each once."""
    example = "for example --size 224x336"
    sizes = {}
    for text in texts:
        match = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", text)
        if not match:
            raise UsageError(f"--size {text!r} is not HEIGHTxWIDTH in pixels", example)
        sides = int(match[1]), int(match[2])
        if not all(sides) or not any(all(side % unit == 0 for side in sides) for unit in UNITS):
            units = "multiples of 28, the side of a merge unit, or of 32 with Qwen3-VL"
            raise UsageError(f"--size {text!r} is not in {units}", example)
        sizes[sides] = True
    return list(sizes)


# Tables.

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
    """Return what rows and columns mean; `titles`: of the columns that are there."""
    ratios = ", ".join(title for title in ("vs HF", "vs bound") if title in titles)
    shares = "; ".join(f"{title}: {text}" for title, text in SHARES.items() if title in titles)
    return [
        *(text.format(ratios=ratios) for text in LEGEND if ratios or "{ratios}" not in text),
        *filter(None, [shares]),
    ]


def render(results: ProfileResults, form: str, width: int = 80) -> str:
    """Return the results as `table`, `md`, `csv` or `json`; `width` is that of a table, in columns."""
    if form == "json":
        return json_line(results.document()) + "\n"
    if form == "table":
        return _table(results, width)
    if form == "md":
        return _markdown(results)
    return _csv(results)


# The cells.


def _ms(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1000:.1f}"
    return f"{seconds * 1000:,.0f}"


def _near(spread: Spread) -> str:
    """Return the median, and how far the farthest round is from it, if there is more than one round."""
    far = max(spread.high - spread.median, spread.median - spread.low)
    if not far:
        return _ms(spread.median)
    return f"{_ms(spread.median)} ±{far / spread.median:.0%}"


def _range(spread: Spread) -> str:
    """Return the median, and the range of the rounds."""
    if spread.low == spread.high:
        return _ms(spread.median)
    return f"{_ms(spread.median)} ({_ms(spread.low)}-{_ms(spread.high)})"


def _of(show: Callable[[Any], str], name: str) -> Cell:
    """Return a cell for a figure; a dash where the row has no figures, and nothing where this one is unknown."""

    def cell(row: ProfileRow, figures: Figures | None) -> str:
        if figures is None:
            return "-"
        value = getattr(figures, name)
        return "" if value is None else show(value)

    return cell


def _count(show: Callable[[Any], str], name: str) -> Cell:
    """Return a cell for a count; a dash where the row has none."""

    def cell(row: ProfileRow, figures: Figures | None) -> str:
        if row.counts is None:
            return "-"
        return show(getattr(row.counts, name))

    return cell


# The head: what was measured, and how.


def _source(results: ProfileResults) -> str:
    """Return the video, or the kind of synthetic clip."""
    settings = results.settings
    return one_line(settings.get("video") or f"synthetic {settings.get('synthetic', 'clip')}")


def _head(results: ProfileResults) -> list[str]:
    model = results.model
    env = results.env
    asked = results.settings
    args = [f"{name}={value}" for name, value in (asked["method_args"] or {}).items()]
    name = one_line(model.id)
    if model.load_format == "dummy":
        name += " (true dimensions, random weights)"
    read = [_source(results), f"{asked['text_tokens']} text tokens", counted(asked["new_tokens"], "new token")]
    return [
        f"evoprune profile {env.evoprune}, torch {env.torch}, transformers {env.transformers}",  # as results.py knows it
        f"{name}, {model.dtype}",
        f"{device_text(model.device, env.threads)}: {env.device_name}, "
        f"{median(results.matmul_rates) / 1e9:,.0f} GFLOP/s in matrix products",
        "; ".join([*read, *map(one_line, args)]),
        f"{counted(results.rounds, 'round')} after {results.warmups} of warm-up, {results.seconds:.0f} s in all",
    ]


def _tail(results: ProfileResults) -> list[str]:
    failed = [f"{row.name}, {row.case}: {row.error}" for row in results.rows if row.error and row.kind != BOUND]
    return [*failed, *results.remarks]


def _caption(results: ProfileResults, case: Case) -> str:
    for row in results.of(case):
        if row.counts:
            return f"{case}: {counted(row.counts.units, 'unit')}"
    return str(case)


# For a terminal: a table of times, and below it one of the work behind them. Columns are dropped in the order of `DROPPED` where
# the terminal has too few characters.

_prune_share = _of("{:.1%}".format, "prune_share")


def _pruning(row: ProfileRow, figures: Figures | None) -> str:
    """Return the cell for the time of pruning; nothing where nothing is pruned."""
    if figures and row.kind != METHOD:
        return ""
    return _prune_share(row, figures)


def _rate(tokens_s: float) -> str:
    if tokens_s < 10:
        return f"{tokens_s:.2f}"
    return f"{tokens_s:,.0f}"


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
    "peak": _of(size_text, "peak_bytes"),
}
DROPPED = ("tok/s", "peak", "prefill", "pruning", "matmul", "encode ms", "tower vs HF", "vs bound")


def _table(results: ProfileResults, width: int) -> str:
    lines = folded(_head(results), width)
    titles = []
    for case in results.cases:
        lines += ["", *textwrap.wrap(_caption(results, case), width)]
        pairs = [(row, results.figures(row)) for row in results.of(case)]
        for columns in (TIMES, WORK):
            cells = {title: (lambda pair, cell=cell: cell(*pair)) for title, cell in columns.items()}
            drawn, there = fitting(pairs, lambda pair: pair[0].name, cells, DROPPED, width)
            lines += ["", *drawn]
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
    columns: dict[str, Cell] = {"": lambda row, figures: row.name, **MARKDOWN}
    if len(results.cases) == 1:
        seen = _caption(results, results.cases[0])
    else:
        seen = f"{len(results.cases)} sizes"
        columns = {
            "frames": lambda row, figures: f"{row.case.frames:,}",
            "size": lambda row, figures: f"{row.case.height}x{row.case.width}",
            **columns,
        }
    head = "; ".join([*_head(results)[:3], seen, *_head(results)[3:]]) + "."
    lines = [head, "", _cells(columns), _cells("---" for _ in columns)]
    for row in results.rows:
        figures = results.figures(row)
        lines.append(_cells(cell(row, figures) for cell in columns.values()))
    notes = (*_legend(MARKDOWN), "Times: the median (lowest-highest) of the rounds", *_tail(results))
    return "\n".join([*lines, "", *(f"- {note[0].upper()}{note[1:]}." for note in notes)]) + "\n"


def _cells(texts) -> str:
    return f"| {' | '.join(text.replace('|', '/') for text in texts)} |"


def _csv(results: ProfileResults) -> str:
    """Write one line a row, each complete in itself; empty where a value is unknown."""
    document = results.document()
    rows = []
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
        rows.append(line | facts["rate"] | facts["ratio"] | facts["memory"] | {"error": facts["error"]} | common)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# The chart.

FIXED = {"Hugging Face": PALE, "budget 1.0": INK}  # colours


def draw_chart(results: ProfileResults) -> str:
    """Draw SVG. Where sizes are swept, time against them; else the tower's time against its live share."""
    cases = results.cases
    model = results.model
    longest = max((max(row.seconds("first_token")) for row in results.rows if row.samples), default=0)
    unit = "milliseconds"
    factor = 1000.0
    if longest >= 2:
        unit = "seconds"
        factor = 1.0
    if len(cases) > 1:
        sizes = ", ".join(sorted({f"{case.height}x{case.width}" for case in cases}))
        seen = f"frames of {sizes}"
        subject = "time to the first token"
        panels = _sweep(results, unit, factor)
    else:
        used = ", ".join(dict.fromkeys(one_line(row.method) for row in results.rows if row.kind == METHOD))
        seen = str(cases[0])
        subject = f"encode against live share of {used}"
        panels = [_live_share(results, unit, factor)]
    rounds = "1 round"
    if results.rounds > 1:
        rounds = f"median and range of {results.rounds} rounds"
    name = short_name(model.id)
    if model.load_format == "dummy":
        name += " with random weights"
    facts = [model.dtype, device_text(model.device, results.env.threads), seen, _source(results), rounds]
    return draw(f"{name}: {subject}", ", ".join(facts), panels)


def _point(x: float, spread: Spread, factor: float, label: str = "") -> Point:
    return Point(x, spread.median * factor, spread.low * factor, spread.high * factor, label)


def _series(lines: dict[str, list[Point]], colours: dict[str, str]) -> tuple[Series, ...]:
    """Return a line for each name, from left to right; a bound is dashed."""
    ordered = {name: tuple(sorted(points, key=lambda point: point.x)) for name, points in lines.items()}
    return tuple(Series(name, points, colours[name], name.startswith("bound")) for name, points in ordered.items())


def _sweep(results: ProfileResults, unit: str, factor: float) -> list[Panel]:
    """Encode, and the first token, against the frames, or against the units where their size changes too.

    Plain transformers are grey, evoprune without pruning black, methods in colour; a bound like the row below it.
    """
    by_frames = len({(case.height, case.width) for case in results.cases}) == 1
    pruned = {row.name: row.budget for row in results.rows if row.kind == METHOD}
    colours = dict(zip(pruned, cycle(COLOURS), strict=False))
    colours |= {f"bound -b {pruned[name]:g}": colour for name, colour in reversed(colours.items())}
    colours |= FIXED
    panels = []
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


def _live_share(results: ProfileResults, unit: str, factor: float) -> Panel:
    lines: dict[str, list[Point]] = {}
    for row in results.rows:
        figures = results.figures(row)
        if figures and row.kind != BOUND and row.quantize == "none":  # a line a method
            name = row.method if row.kind == METHOD else row.name
            label = ""
            if row.counts.live_share < 1:
                label = f"-b {budget_text(row.budget)}"
            lines.setdefault(name, []).append(_point(row.counts.live_share, figures.encode, factor, label))
    colours = FIXED | dict(zip((name for name in lines if name not in FIXED), cycle(COLOURS), strict=False))
    full = [(Point(0, 0), Point(1, points[0].y)) for name, points in lines.items() if name == "budget 1.0"]
    ideal = [Series("live share of budget 1.0's time", points, PALE, dashed=True) for points in full]
    series = (*ideal, *_series(lines, colours))
    return Panel("Encode", "live share: rows computed, mean over all layers", unit, series)

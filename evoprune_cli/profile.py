"""`evoprune profile`: latency, counts and memory, against plain Hugging Face and against the best that pruning later can do."""

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.model.limits import check_libraries
from evoprune.model.precision import LOAD_FORMATS, QUANTIZE
from evoprune.pipeline.options import ModelOptions, PruneOptions
from evoprune.profiling.settings import SYNTHETIC
from evoprune_cli import options as opt
from evoprune_cli import profile_options as own
from evoprune_cli.files import check_chart, check_writable, print_text, write_text
from evoprune_cli.profile_options import FORMATS
from evoprune_cli.terminal import WIDTH, check_output, page_width

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
SIZE = (224, 336)  # pixels of a frame, height and width
PICTURES = ((1344, 1344), (2688, 2688))  # 2,304 and 9,216 visual tokens
SOME_FAILED = 6


@opt.with_options(
    ModelOptions,
    PruneOptions,
    without=("load_format", "quantize", "budget", "method"),
    model={
        "unless_typed": MODEL,
        "help": "Hub id, local folder, demo or demo-scenes. EVOPRUNE_MODEL is ignored.",
        "env": None,
    },
)
def profile(
    *,
    video: own.Video = None,
    budget: opt.Budgets = None,
    method: opt.Methods = None,
    frames: own.Frames = None,
    size: own.Size = None,
    synthetic: own.Synthetic = None,
    pictures: own.Pictures = False,
    options: opt.Options,
    load_format: own.LoadFormat = None,
    quantize: own.Quantize = None,
    new_tokens: own.NewTokens = 4,
    repeat: own.Repeat = 3,
    warmup: own.Warmup = 1,
    time_limit: own.TimeLimit = None,
    form: own.Format = "table",
    output: own.Output = None,
    chart: own.Chart = None,
    quiet: opt.Quiet = False,
) -> int:
    """Measure latency, counts and memory over a sweep.

    Always measured too, in turn and on the same weights: plain Hugging Face transformers, budget 1.0, and the bound, the best that
    a method which prunes after the encoder could reach. By default on random weights of Qwen2.5-VL-3B's true dimensions: speed does
    not depend on what the weights are. Exit code 6: done, but some rows ran out of memory.

    \b
    evoprune profile
    evoprune profile -b 0.25,0.1 --frames 8,16,32 --chart sweep.svg
    evoprune profile --synthetic static90 --frames 32 -b fast --format json
    evoprune profile --pictures -b 0.25,0.1 --time-limit 3600
    """
    kinds = tuple(dict.fromkeys(opt.listed(quantize) or ["none"]))
    made = options()
    asked = {
        **opt.sweep(budget, method, made.pruning.method_args), "seed": made.pruning.seed,
        "quantize": kinds, "new_tokens": new_tokens, "warmups": warmup, "repetitions": repeat,
    }  # fmt: skip
    counts, sizes = _frames(opt.listed(frames)), _sizes(opt.listed(size))
    _check_flags(kinds, form, load_format, synthetic, video)
    if pictures:
        if video is not None or frames:
            raise UsageError("--pictures excludes a video and --frames", "leave them out; --size takes other sizes")
        counts, sizes = [1], sizes or [*PICTURES]
    check_output() if output is None else check_writable(output, inputs=[video or ""])
    check_chart(chart, inputs=[video or ""])
    clips = partial(_clips, video, synthetic or SYNTHETIC[0], counts, sizes)
    deliver = partial(_deliver, form=form, output=output, chart=chart)
    measured = partial(_measured, made.model, load_format, asked, time_limit)
    return _run(clips, measured, deliver, quiet)


def _run(clips: Callable, measured: Callable, deliver: Callable, quiet: bool) -> int:
    """Measures and delivers the results; of a run that breaks off, those of the finished rounds."""
    results = None
    try:
        with clips() as (cases, about, source), _progress(not quiet) as show:
            for found in measured(cases, about, source, show):
                results = found
    except BaseException as problem:
        if results is not None:
            results.interrupted = not isinstance(problem, Exception)
            with suppress(UsageError):  # the first problem is the one to report
                deliver(results)
        raise
    deliver(results)
    return SOME_FAILED if any(row.error for row in results.rows) else 0


def _measured(
    model: ModelOptions,
    load_format: str | None,
    asked: dict[str, Any],
    seconds: float | None,
    cases: list,
    about: dict,
    source: Callable,
    show,
) -> Iterator:
    """The results after each round, within `seconds` if there are any; see `profiling.run.measure`."""
    begun = time.perf_counter()
    show("loading libraries")
    check_libraries()
    from evoprune.pipeline.loading.found import find_model
    from evoprune.pipeline.recipes import of_model
    from evoprune.profiling import bench, run, settings, time_limit, weights

    options, how = replace(model, load_format=load_format or weights.default_load_format(model.model)), {}
    bind = partial(of_model, name=model.model, weights=lambda: find_model(options).weights_fingerprint)
    for name in {*asked["methods"]} - {"none"}:
        bind(methods.parse(name, asked["method_args"]))
    swept = settings.Settings(**asked)
    usual = swept.time_limit_s
    limit = time_limit.TimeLimit(usual if seconds is None else seconds, begun=begun, firm=seconds is not None)
    if found := weights.outline(options):
        expected, preparing = time_limit.estimate(bench.all_rows(cases, swept), swept, found, bind)
        rows = time_limit.choose_rows(expected, swept.quantize, preparing, limit)
        how = {"rows": rows, "estimated": expected.__getitem__}
    swept = replace(swept, time_limit_s=limit.seconds)
    show("loading model" + f" (the run takes about {limit.seconds:.0f} s)" * (limit.seconds > usual and not limit.firm))
    loaded = weights.load(options, cases)
    yield from run.measure(loaded, cases, source, swept, about=about, progress=show, limit=limit, **how)


@contextmanager
def _clips(
    video: str | None, synthetic: str, counts: list[int], sizes: list[tuple[int, int]]
) -> Iterator[tuple[list, dict, Callable]]:
    """The cases to measure, what to note about their frames, and a function that makes the frames of a case."""
    if video is None:
        cases, about = _cases(counts, sizes or [SIZE]), {"video": None, "synthetic": synthetic}
        yield cases, about, partial(_frames_of, synthetic)
        return
    from evoprune.video.info import PICTURE
    from evoprune.video.plan import InputLimits, make_plan
    from evoprune.video.probe import probe
    from evoprune.video.source import local_file

    with local_file(video) as path:
        info = probe(path)
        if info.kind == PICTURE:
            limits = InputLimits(min_pixels=56 * 56, max_pixels=PICTURES[-1][0] * PICTURES[-1][1])
            plan = make_plan(info, limits)
            counts, sizes = [1], sizes or [(plan.height, plan.width)]
        for count in counts:
            make_plan(info, InputLimits(), frames=count)  # refuses a count that the video does not allow
        cases = _cases(counts, sizes or [_natural_size(info)])
        yield cases, {"video": video, "synthetic": None}, partial(_frames_of, info)


def _cases(counts: list[int], sizes: list[tuple[int, int]]) -> list:
    from evoprune.profiling.results import Case

    return [Case(count, *size) for count in counts for size in sizes]


def _frames_of(source, case):
    """The frames of a case, of a kind of synthetic clip or of a video."""
    from evoprune.profiling import clips

    return clips.synthetic_frames(source, case) if isinstance(source, str) else clips.video_frames(source, case)


def _frames(texts: list[str]) -> list[int]:
    """Even numbers of frames, each once."""
    if wrong := [text for text in texts if not re.fullmatch("[0-9]+", text) or not int(text)]:
        raise UsageError(f"--frames {wrong[0]!r} is not a number of frames", "for example --frames 8,32")
    return list(dict.fromkeys(int(text) + int(text) % 2 for text in texts or ["8"]))


def _sizes(texts: list[str]) -> list[tuple[int, int]]:
    """(height, width) in pixels, each once."""
    made = {}
    for text in texts:
        match = re.fullmatch("([0-9]+)x([0-9]+)", text)
        if not match or not all(int(side) and int(side) % 28 == 0 for side in match.groups()):
            what = "in multiples of 28, the side of a merge unit" if match else "HEIGHTxWIDTH in pixels"
            raise UsageError(f"--size {text!r} is not {what}", "for example --size 224x336")
        made[int(match[1]), int(match[2])] = True
    return list(made)


def _check_flags(kinds, form: str, load_format: str | None, synthetic: str | None, video: str | None) -> None:
    for option, value, known in (
        ("--quantize", next((kind for kind in kinds if kind not in QUANTIZE), None), QUANTIZE),
        ("--format", form, FORMATS),
        ("--load-format", load_format, LOAD_FORMATS),
        ("--synthetic", synthetic, SYNTHETIC),
    ):
        if value is not None and value not in known:
            raise UsageError(f"{option} {value!r} is unknown", f"one of {', '.join(known)}")
    if video is not None and synthetic is not None:
        raise UsageError("a video and --synthetic exclude each other", "give one of the two")


def _natural_size(info) -> tuple[int, int]:
    """The video's own shape, at no more pixels than synthetic clips have."""
    from evoprune.video.plan import smart_resize

    return smart_resize(info.height, info.width, 28 * 28, SIZE[0] * SIZE[1])


def _deliver(results, form: str, output: str | None, chart: str | None) -> None:
    """Prints or writes the results, and the chart."""
    from evoprune_cli.profile_chart import draw_chart
    from evoprune_cli.profile_tables import render

    wide = WIDTH if output else page_width()
    text = render(results, form, wide)
    if output is None:
        print_text(text)
    else:
        try:
            write_text(output, text)
        except UsageError:
            print_text(text)  # it took minutes to find out
            raise
    if chart:
        write_text(chart, draw_chart(results))


@contextmanager
def _progress(active: bool) -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what is running. It does not move: the thread of a spinner would disturb the timing."""
    if not active or not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    with Live(
        console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
    ) as live:
        yield lambda what: live.update(Text(what, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)

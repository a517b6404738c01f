"""`evoprune profile`: measures latency, token counts, and memory usage, compared with plain transformers and a lower bound."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from evoprune.bench import Case, ProfileSettings
from evoprune.errors import UsageError
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.util import size as size_text
from evoprune.util import without_password, words_of
from evoprune.video import Video
from evoprune_cli import options as opt
from evoprune_cli.delivery import check_chart, check_writable, print_text, rescuing, write_bytes
from evoprune_cli.running import SOME_FAILED, prepare
from evoprune_cli.terminal import WIDTH, check_output, page_width, progress, tell
from evoprune_cli.words import check_not_model

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
UNITS = (28, 32)  # side lengths of a unit in supported models, in pixels
SIZE = (224, 336)  # height and width of a frame for units of 28 pixels; scaled for units of 32
PICTURES = ((1344, 1344), (2688, 2688))  # 2,304 and 9,216 visual tokens
FORMATS = ("table", "md", "csv", "json")
NOTED_S = 2.0  # print the expected duration if a run is expected to take longer than this
ROUNDS = "Rounds"  # a panel title
WORDS = {field.name: words_of(field.type) for field in fields(ModelOptions)}  # the allowed values of each model option
QUANTIZE = [word for word in WORDS["quantize"] if word != "auto"]


@dataclass(frozen=True, kw_only=True)
class ProfileArguments:
    """The arguments of `evoprune profile`."""

    video: opt.argument(str | None, "VIDEO", "A video instead of a synthetic clip; see --synthetic.") = None
    budget: opt.Budgets = None
    method: opt.Methods = None
    frames: opt.option(
        list[str] | None, "--frames LIST", "Numbers of frames, odd numbers are rounded up; default: 8.", opt.SWEEP
    ) = None
    size: opt.option(
        list[str] | None,
        "--size HxW,...",
        "Height x width of the frames in pixels, multiples of 28 (Qwen3-VL: 32); default: 224x336 (256x384), for a VIDEO its "
        "own aspect ratio with at most as many pixels.",
        opt.SWEEP,
    ) = None
    synthetic: opt.option(
        str | None,
        "--synthetic",
        "Clip to use without VIDEO: objects that move in front of a still background, a still image of which a tenth changes, "
        "or noise; default: motion.",
        opt.SWEEP,
        **opt.one_of(*ProfileSettings.SYNTHETIC),
    ) = None
    pictures: opt.option(
        bool,
        "--pictures",
        "Measure images instead of clips: 1344x1344 and 2688x2688 pixels (2,304 and 9,216 visual tokens), or --size.",
        opt.SWEEP,
    ) = False
    options: opt.PipelineArguments
    load_format: opt.option(
        str | None,
        "--load-format",
        "auto loads the weights; dummy makes random weights, which are as fast and need no network; default: dummy for "
        "a model whose dimensions are bundled with evoprune (see evoprune inspect), otherwise auto.",
        ModelOptions.PANEL,
        **opt.one_of(*WORDS["load_format"]),
    ) = None
    quantize: opt.option(
        list[str] | None,
        "--quantize",
        "How to quantize the weights: none, int8, int4 (CPU only); default: none.",
        opt.SWEEP,
        **opt.list_of(*QUANTIZE),
    ) = None
    new_tokens: opt.option(
        int,
        "-n --new-tokens N",
        "Number of tokens to generate, even past the end of the answer, for tokens/s.",
        ROUNDS,
        min=1,
    ) = 4
    repeat: opt.option(int, "-r --repeat N", "Rounds to measure.", ROUNDS, min=1) = 3
    warmup: opt.option(int, "-w --warmup N", "Warm-up rounds, which are not measured.", ROUNDS, min=0) = 1
    time_limit: opt.option(
        float,
        "--time-limit SECONDS",
        "Time limit of the whole run, including loading. Rows and rounds that would end later are skipped, except Hugging Face, "
        "budget 1.0 and one method; if even these certainly take longer, nothing is run.",
        ROUNDS,
        min=0,
    ) = 150
    form: opt.option(str, "--format", "Output format.", opt.OUTPUT, **opt.one_of(*FORMATS)) = "table"
    output: opt.option(str | None, "-o --output FILE", "Write to FILE instead of stdout.", opt.OUTPUT) = None
    chart: opt.option(
        str | None,
        "--chart FILE.svg",
        "Draw time against frames or size if they are swept, otherwise the encoder's time against computed rows.",
        opt.OUTPUT,
    ) = None
    quiet: opt.Quiet = False


@opt.command(
    *ModelOptions.NAME,
    *ModelOptions.DEVICE,
    *ModelOptions.RUNNING,
    "seed",
    short="budget method frames size model time_limit form output chart quiet",
    model={
        "unless_typed": MODEL,
        "help": "Hub id, local folder, demo or demo-scenes. EVOPRUNE_MODEL is ignored.",
        "env": None,
    },
)
def profile(given: ProfileArguments) -> int:
    """Measure latency, counts and memory over a sweep.

    Every run also measures plain Hugging Face transformers, budget 1.0 and the bound, which is the best time of any method that
    prunes after the encoder. All of them are measured in turn with the same weights. By default, the weights are random and have
    the dimensions of Qwen2.5-VL-3B, because the speed does not depend on their values. Exit code 6: the run finished, but some rows
    ran out of memory.

    \b
    evoprune profile
    evoprune profile -b 0.25,0.1 --frames 8,16,32 --chart sweep.svg
    evoprune profile --synthetic static90 --frames 32 -b fast --format json
    evoprune profile --pictures -b 0.25,0.1 --time-limit 3600
    """
    settings, pipeline = _parse(given)
    counts, sizes = _check(given)
    return _run(given, settings, pipeline, counts, sizes)


def _parse(given: ProfileArguments) -> tuple[ProfileSettings, PipelineOptions]:
    """Return the settings of the run and the options of the model."""
    check_not_model(given.video, "evoprune profile -m")
    bits = tuple(dict.fromkeys(opt.listed(given.quantize) or ["none"]))
    pipeline = given.options.parse()
    settings = ProfileSettings(
        **opt.sweep(given.budget, given.method),
        seed=pipeline.pruning.seed,
        quantize=bits,
        new_tokens=given.new_tokens,
        warmups=given.warmup,
        repetitions=given.repeat,
        time_limit_s=given.time_limit,
    )
    choices = [("--quantize", width, QUANTIZE) for width in bits]
    choices += [("--format", given.form, FORMATS), ("--load-format", given.load_format, (None, *WORDS["load_format"]))]
    for name, value, known in (*choices, ("--synthetic", given.synthetic, (None, *ProfileSettings.SYNTHETIC))):
        if value not in known:
            raise UsageError(f"{name} {value!r} is unknown", f"one of {', '.join(filter(None, known))}")
    return settings, pipeline


def _check(given: ProfileArguments) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the numbers and sizes of frames, after checking combinations of options and the output files."""
    counts = _frames(opt.listed(given.frames))
    sizes = _sizes(opt.listed(given.size))
    if given.video is not None and given.synthetic is not None:
        raise UsageError("a video and --synthetic cannot be combined", "give one of the two")
    if given.pictures:
        if given.video is not None or given.frames:
            raise UsageError("--pictures excludes a video and --frames", "leave them out; for other sizes, use --size")
        counts = [1]
        sizes = sizes or [*PICTURES]
    if given.output is None:
        check_output()
    else:
        check_writable(given.output, inputs=[given.video or ""])
    check_chart(given.chart, inputs=[given.video or ""])
    return counts, sizes


def _run(
    given: ProfileArguments,
    settings: ProfileSettings,
    pipeline: PipelineOptions,
    counts: list[int],
    sizes: list[tuple[int, int]],
) -> int:
    """Measure, and deliver the results, even if the run is interrupted. Returns the exit code."""
    results = None
    inputs = _inputs(given.video, counts, sizes, pipeline.model.offline)
    ready = rescuing(lambda: results is not None, lambda error: _deliver(given, results, error))
    with ready, inputs as (cases, info), progress(not given.quiet, timing=True) as show:
        begun = time.perf_counter()
        show("loading libraries")
        prepare()
        from evoprune.bench import Profile

        run = Profile(
            settings,
            pipeline.model,
            cases,
            load_format=given.load_format,
            exact=bool(given.size),
            video=info,
            source=without_password(given.video) if info else given.synthetic or ProfileSettings.SYNTHETIC[0],
            begun=begun,
        )
        needs = run.needs()
        if needs.expected >= NOTED_S and not given.quiet:
            weights = "random weights with the dimensions of" if run.model.random else "the weights of"
            needed = f"about {size_text(needs.memory)} of memory and about {needs.expected:.0f} s on an idle machine"
            tell(f"{weights} {run.model.id}: needs {needed} (at most {given.time_limit:g} s: --time-limit)")
        for results in run.run(show):  # noqa: B007
            pass
    _deliver(given, results)
    return SOME_FAILED if any(row.error for row in results.rows) else 0


def _deliver(given: ProfileArguments, results: Any, error: dict[str, Any] | None = None) -> None:
    """Print or write the results and the chart. After an interruption, only finished rounds are included."""
    if error is not None:
        results.interrupted = error["type"] in ("interrupted", "terminated")
    try:
        if given.output is None:
            print_text(results.text(given.form, page_width()))
        else:
            _write_or_print(given.output, results.text(given.form, WIDTH))
    finally:  # even if the reader of stdout has exited
        if given.chart:
            write_bytes(given.chart, results.chart().encode())


def _write_or_print(path: str, text: str) -> None:
    """Write results to a file. If this fails, print them before raising UsageError because they took minutes to measure."""
    try:
        write_bytes(path, text.encode())
    except UsageError:
        print_text(text)
        raise


@contextmanager
def _inputs(
    video: str | None, counts: list[int], sizes: list[tuple[int, int]], offline: bool
) -> Iterator[tuple[list[Case], Video | None]]:
    """Yield the cases to measure, together with the source video of the frames, or None for synthetic clips."""
    if video is None:
        yield [Case(count, *size) for count in counts for size in sizes or [SIZE]], None
        return
    from evoprune.video import InputLimits, Plan, SamplingOptions, local_file, probe

    with local_file(video, offline=offline) as path:
        info = probe(path)
        if info.is_picture:
            limits = InputLimits(min_pixels=56 * 56, max_pixels=PICTURES[-1][0] * PICTURES[-1][1])
            plan = Plan.of(info, limits)
            counts = [1]
            sizes = sizes or [(plan.height, plan.width)]
        for count in counts:
            Plan.of(
                info, InputLimits(), SamplingOptions(frames=count)
            )  # raises an error if the video doesn't have enough frames
        # Keep the video's aspect ratio, with at most as many pixels as a synthetic clip.
        sizes = sizes or [
            InputLimits(min_pixels=28 * 28, max_pixels=SIZE[0] * SIZE[1]).resized(info.height, info.width)
        ]
        yield [Case(count, *size) for count in counts for size in sizes], info


def _frames(texts: list[str]) -> list[int]:
    """Parse frame counts, rounding odd counts up to even numbers and removing duplicates."""
    if wrong := [text for text in texts if not re.fullmatch("[0-9]{1,9}", text) or not int(text)]:
        raise UsageError(f"--frames {wrong[0]!r} is not a number of frames", "for example --frames 8,32")
    return list(dict.fromkeys(int(text) + int(text) % 2 for text in texts or ["8"]))


def _sizes(texts: list[str]) -> list[tuple[int, int]]:
    """Parse frame sizes into pairs of height and width in pixels, removing duplicates."""
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

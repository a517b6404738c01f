"""`evoprune inspect`: this machine, a model, or a video and what a model would look at in it. It never uses the network."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from textwrap import wrap
from typing import Any

from evoprune.errors import UsageError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import ModelOptions, PipelineOptions, PruneOptions, SamplingOptions
from evoprune.report.records import VideoFacts
from evoprune.text import budget_text, clock, counted, size
from evoprune.video.info import PICTURE
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.files import check_writable, write_bytes
from evoprune_cli.terminal import encoding, print_document, print_warning, printable, progress

SCHEMA = "evoprune/inspect@1"
NAMES = ("versions", "devices", "decoders", "method_plugins", "environment")  # facts of things by their names
OFTEN_NOTHING = ("folder", "download_bytes")  # facts that have no line where there is nothing to say
ONE_LINE = ("tower", "language_model")  # facts of several values in a line
TITLES = {  # of facts whose names do not explain them, or are too long
    "resized_hw": "frame size",
    "capped": "cut by a limit",
    "demo_scenes_model_folder": "demo scenes folder",
}
FIRST = ("overlay", "model")  # what was asked for stands first; about a video, the model comes after it
WIDTH, TITLE = 80, 22  # columns of a line, and of what stands before its value

OVERLAYS = (".png", ".gif", ".mp4")  # endings of the pictures that `inspect --overlay` draws

Video = opt.argument(
    str | None, "VIDEO", "A video file, a folder of frames, or - for stdin; without it, a report on this machine."
)
Overlay = opt.option(
    None,
    str | None,
    "--overlay",
    f"Draw which units are read, reused, merged and dropped ({', '.join(OVERLAYS)}). "
    "Loads the model; pruning options are for this.",
    metavar="FILE",
)
Scan = opt.option(None, bool, "--scan", "Decode the whole video and report damage, true length and variable rate.")
ClearCache = opt.option(
    None, bool, "--clear-cache", "Delete what --cache and --store-quantized keep on disk, then report."
)
ForgetTuned = opt.option(
    None,
    str | None,
    "--forget-tuned",
    "Delete the tuned setting and the recipe of a model (by name or beginning of its fingerprint) or all, then report.",
    **completion.one_of("NAME", "FINGERPRINT", "all"),
)
Json = opt.option(None, bool, "--json", "JSON on stdout instead of text.")


@opt.with_options(
    ModelOptions,
    PruneOptions,
    SamplingOptions,
    without=("load_format", "subtitles", "max_subtitle_tokens"),
    model={
        "unless_typed": "",
        "help": "Hub id, local folder, demo or demo-scenes: what it needs. With a video the default is demo.",
    },
)
def inspect(
    *,
    video: Video = None,
    overlay: Overlay = None,
    options: opt.MakeOptions,
    scan: Scan = False,
    clear_cache: ClearCache = False,
    forget_tuned: ForgetTuned = None,
    json: Json = False,
) -> int:
    """Show this machine, what a model needs, or what is in a video.

    With a video, also show what a model would look at in it, and the memory needed. Loads no weights and uses no network,
    except for an overlay.

    \b
    evoprune inspect
    evoprune inspect -m Qwen/Qwen2.5-VL-7B-Instruct
    evoprune inspect clip.mp4 --scan
    evoprune inspect clip.mp4 -m Qwen/Qwen2.5-VL-7B-Instruct --fps 1
    evoprune inspect clip.mp4 --overlay clip.png -b 0.1
    """
    if video is None:
        _print(_about_machine(options, overlay, scan, clear_cache, forget_tuned), {}, json)
    else:
        found = _about_video(video, options, overlay, scan, clear_cache, forget_tuned)
        _print(found, {"video": {"path": video}}, json)
    return 0


def _print(every: Iterator[dict], facts: dict[str, Any], json: bool) -> None:
    """Prints `facts` and all that are found; where something goes wrong, those that were found before it did."""
    try:
        for found in every:
            facts |= found
    except BaseException as problem:
        if json and not isinstance(problem, BrokenPipeError | SystemExit):
            print_document({"schema": SCHEMA, **facts, "error": failure(problem)})
            problem.reported = True
        elif "video" not in facts:
            _print_lines(facts)
        raise
    if json:
        print_document({"schema": SCHEMA, **facts, "error": None})
    else:
        _print_lines(facts)


def _print_lines(facts: Mapping[str, Any]) -> None:
    asked = [name for name in FIRST if name in facts and (name == "overlay" or "video" not in facts)]
    for line in lines({name: facts[name] for name in asked} | dict(facts)):
        print(printable(line, sys.stdout))


def _about_machine(
    options: opt.MakeOptions, overlay: str | None, scan: bool, clear_cache: bool, forget_tuned: str | None
) -> Iterator[dict]:
    """Versions, devices, decoders, caches, tuned settings, and the model that is named."""
    if clear_cache:
        _clear_cache()
    if forget_tuned is not None:
        yield {"forgotten": _forget_tuned(forget_tuned)}
    if scan:
        raise UsageError("--scan needs a video", "evoprune inspect clip.mp4 --scan")
    if overlay is not None:
        raise UsageError("--overlay needs a video", "evoprune inspect clip.mp4 --overlay clip.png")
    from evoprune.pipeline.inspection import environment_facts, model_facts

    yield environment_facts()
    if (model := options().model).model:
        from evoprune.pipeline.loading.found import look_up

        yield {"model": model_facts(look_up(model))}


def _clear_cache() -> None:
    from evoprune.pipeline.cache import Cache
    from evoprune.pipeline.loading.stored import weights_folder

    for cache in (Cache(), weights_folder()):
        try:
            cache.clear()
        except OSError as problem:
            hint = "delete it yourself, or name another folder in EVOPRUNE_CACHE_DIR"
            raise UsageError(f"cannot empty {cache.folder}: {problem.strerror}", hint) from problem


def _forget_tuned(text: str) -> list[dict]:
    """Deletes the tuned settings and recipes that a text names; their facts."""
    from evoprune.pipeline.inspection import recipe_facts, tuned_facts
    from evoprune.pipeline.saved import matching, recipes, tuned

    named, forgotten = {fingerprint for fingerprint, _ in matching(text, recipes.every())}, []
    for shelf, facts in ((tuned, tuned_facts), (recipes, recipe_facts)):
        found = [(fingerprint, kept) for fingerprint, kept in shelf.every() if fingerprint in named]
        for fingerprint, _ in found:
            shelf.remove(fingerprint)
        forgotten += facts(found)
    return forgotten


def _about_video(
    video: str, typed: opt.MakeOptions, overlay: str | None, scan: bool, clear_cache: bool, forget_tuned: str | None
) -> Iterator[dict]:
    """What a video holds, what a scan finds, what a model would look at, and an overlay: each as soon as it is known."""
    if clear_cache:
        raise UsageError("--clear-cache is not about a video", "evoprune inspect --clear-cache")
    if forget_tuned is not None:
        raise UsageError("--forget-tuned is not about a video", "evoprune inspect --forget-tuned NAME")
    from evoprune.video.probe import probe
    from evoprune.video.source import local_file

    options = typed()
    options = replace(options, model=replace(options.model, model=options.model.model or "demo"))
    if overlay is not None:
        _check_overlay(overlay, video)
    with local_file(video) as path:
        info = replace(probe(path), path=video)
        from evoprune.pipeline.inspection import video_facts  # which imports torch

        yield {"video": video_facts(info)}
        if scan:
            from evoprune.video.probe import scan as scan_video

            yield {"scan": asdict(scan_video(path))}
        yield from _plan(info, options)
        if overlay is not None:
            yield {"overlay": _draw_overlay(overlay, path, video, options)}


def _plan(info, options: PipelineOptions) -> Iterator[dict]:
    """The model, what it would look at, and the memory that this takes."""
    from evoprune.pipeline.inspection import memory_facts, model_facts, plan_facts
    from evoprune.pipeline.loading.found import look_up
    from evoprune.video.plan import default_max_visual_tokens, make_plan

    model, numbers = look_up(options.model), options.sampling.numbers
    yield {"model": model_facts(model)}
    if numbers["max_visual_tokens"] is None:
        on_cpu = model.device.type == "cpu"
        numbers["max_visual_tokens"] = default_max_visual_tokens(on_cpu=on_cpu, is_demo=model.demo is not None)
    plan = make_plan(info, model.limits[info.kind], **numbers)
    yield {"plan": {"model": model.id, **plan_facts(plan, model.config)}}
    yield {"memory": memory_facts(model, plan, options.pruning)}


def _check_overlay(file: str, video: str) -> None:
    """Raises UsageError where such a picture or film cannot be drawn or must not be written."""
    if (ending := _ending(file)) not in OVERLAYS:
        hint = ".png shows frame pairs side by side, .gif and .mp4 frame after frame"
        raise UsageError(f"--overlay {file} has {repr(ending) if ending else 'no ending'}, which cannot be drawn", hint)
    check_writable(file, inputs=[video])


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _draw_overlay(file: str, path: str, video: str, options: PipelineOptions) -> dict[str, Any]:
    """Draws what a model makes of a video; the facts to report."""
    with progress(True) as show:
        check_libraries()
        from evoprune.pipeline.opening import open_inputs
        from evoprune.pipeline.video_qa import VideoQA
        from evoprune.visualize.fates import trace
        from evoprune.visualize.overlay import overlay_file

        show("loading model")
        engine = VideoQA.load(loading=options.model, pruning=options.pruning).engine
        with closing(open_inputs(engine, [path], options.sampling, names=[video])) as opened:
            show("reading video")
            traced = trace(opened, encoding(show))
        show("drawing")
        name, budget = engine.options.method, engine.reported_budget
        title = f"{os.path.basename(os.path.abspath(video))}, {name} -b {budget_text(budget)}. {traced.summary}"
        write_bytes(file, overlay_file(traced, title, _ending(file)))
    for warning in traced.warnings:
        print_warning(warning, VideoFacts(path=video, damaged=traced.damaged))
    facts = {"file": file, "method": name, "args": engine.method.args, "budget": budget}
    return facts | traced.fates.counts() | {"warnings": traced.warnings}


def lines(facts: dict, indent: int = 0, literal: bool = False) -> list[str]:
    """Nested facts as aligned lines, folded at 80 columns. `literal`: their names are names of things, shown as they are."""
    made = []
    for key, value in facts.items():
        name = "" if literal else key  # which decides how a value is shown
        plain = key.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
        title = " " * indent + (key if literal else TITLES.get(key, plain))
        if name in ("args", "warnings") or (name in OFTEN_NOTHING and not value):
            continue  # for programs; warnings are on stderr, as sentences
        if name == "overlay":
            made.append(f"{title:<{TITLE}}{value['file']}")
            fates = ", ".join(f"{value[fate]:,} {fate}" for fate in ("read", "reused", "merged", "dropped"))
            budget = budget_text(value["budget"])
            made.append(f"{'':<{TITLE}}{value['method']} -b {budget}; {value['units']:,} units: {fates}")
        elif name in ("tuned", "recipes", "forgotten"):
            made += _tuned_lines(title, value)
        elif name == "presets":
            made.append(title)
            for preset, p in value.items():
                tokens = f"-b {p['budget']:<5g} {p['tokens']:>8,} tokens"
                made.append(f"{' ' * (indent + 2)}{preset:<18}{tokens}  KV cache {size(p['kv_cache_bytes'])}")
        elif isinstance(value, dict) and value and name not in ONE_LINE:
            if name in ("video", "plan") and facts.get("video", {}).get("container") == PICTURE:
                value = {key: fact for key, fact in value.items() if fact is not None}  # a picture has no times
            made += [title, *lines(value, indent + 2, name in NAMES)]
        else:
            pieces = [_value(name, value)]
            if isinstance(value, list):  # only lists are folded: paths and tags stay in one piece
                pieces = wrap(pieces[0], WIDTH - TITLE, break_long_words=False, break_on_hyphens=False) or [""]
            made.append(f"{title + ' ':<{TITLE}}{pieces[0]}")
            made += [f"{'':<{TITLE}}{piece}" for piece in pieces[1:]]
    return made


def _tuned_lines(title: str, settings: list[dict]) -> list[str]:
    """Two lines for each tuned setting or recipe: what it is of, and what it is. Fingerprints are cut; the beginning names them."""
    made = [title if settings else f"{title:<{TITLE}}none"]
    for setting in settings:
        made.append(f"  {setting['fingerprint'][:12]}  {setting['model'] or 'unknown'}")
        if setting["damaged"]:
            made.append(f"    {setting['damaged']}")
            continue
        if "method" not in setting:
            asked = f"{counted(setting['questions'], 'question')} about {counted(setting['videos'], 'video')}"
            made.append(f"    recipe of operations from {asked}, {setting['created_utc'][:10]}")
            continue
        measured = f"agreement {100 * setting['agreement']:.1f}% (at least {100 * setting['low']:.1f}%)"
        made.append(f"    {setting['method']} -b {setting['budget']:g}, {measured}, {setting['created_utc'][:10]}")
    return made


def _value(name: str, value) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "grid":
        return " x ".join(map(str, value)) + " units"
    if name == "resized_hw":
        return f"{value[1]}x{value[0]}"
    if name == "timestamps_s":
        times = [f"{t:g}" for t in (value if len(value) <= 8 else [*value[:4], *value[-2:]])]
        return ", ".join(times if len(value) <= 8 else [*times[:4], "...", *times[4:]]) + " s"
    if name in ONE_LINE:
        return f"{value['layers']:,} layers, hidden size {value['hidden_size']:,}"
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) or "none"
    if name == "parameters" and value >= 10**9:
        return f"{value / 10**9:.2f} billion"
    if name.endswith("_bytes"):
        return size(value)
    if name == "duration_s":
        return f"{value:.3f} s ({clock(value)})"
    if name.endswith("_s") or name == "seconds":
        return f"{value:.3f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

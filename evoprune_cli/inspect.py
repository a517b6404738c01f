"""`evoprune inspect`: describes this machine, a model, or how a model would read a video. Uses the network only for URLs."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from textwrap import wrap
from typing import Any

from evoprune.errors import UsageError
from evoprune.report import VideoFacts
from evoprune.session import ModelOptions, PipelineOptions, PruneOptions
from evoprune.util import budget_text, clock, counted, is_url, size, without_password
from evoprune.video import SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli.delivery import check_writable, rescuing, write_bytes
from evoprune_cli.running import prepare
from evoprune_cli.terminal import (
    downloading,
    encoding,
    page_width,
    print_document,
    print_warning,
    printable,
    progress,
    stdout,
)
from evoprune_cli.words import check_not_model

NAMES = ("versions", "devices", "decoders", "method_plugins", "environment", "tags")  # sections with names as keys
ONLY_IF_SET = (
    "folder",
    "files",
    "assumed",
    "download_bytes",
    "language_layers",
    "clock_restarts",
    "clock_gap_s",
    "rate_guessed",
    "joined",
    "crop",
    "hdr",
    "hdr_format",
    "interlaced",
    "pixel_aspect",
    "other_tracks",
    "cut_by",
)  # printed only if set
TITLES = {  # titles for facts with unclear or overly long names
    "resized_hw": "frame size",
    "capped": "cut by a limit",
    "cut_by": "limit",
    "segments_bytes": "segments size",
    "demo_scenes_model_folder": "demo scenes folder",
}
TITLE = 22  # width of the title column
OVERLAYS = (".png", ".gif", ".mp4")  # file types supported by `inspect --overlay`


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """The arguments of `evoprune inspect`."""

    video: opt.argument(
        str | None,
        "VIDEO",
        "A video file, a folder of frames, a URL, or - for stdin; without VIDEO, describe this machine.",
    ) = None
    overlay: opt.option(
        str | None,
        "--overlay FILE",
        f"Draw which units are read, reused, merged and dropped ({', '.join(OVERLAYS)}). Loads the model.",
    ) = None
    options: opt.PipelineArguments
    scan: opt.option(
        bool, "--scan", "Decode the whole video and report damage, true length and variable frame rate."
    ) = False
    clear_cache: opt.option(
        bool,
        "--clear-cache",
        "Delete the files that --cache and --store-quantized keep on disk, then describe this machine.",
    ) = False
    json: opt.option(bool, "--json", "Print JSON instead of text.") = False


@opt.command(
    *ModelOptions.WEIGHTS,
    *PruneOptions.PRUNING,
    *SamplingOptions.RATE,
    *SamplingOptions.SPAN,
    *SamplingOptions.LIMITS,
    "frame_rate",
    "decoder",
    "seek",
    short="overlay scan clear_cache model budget fps frames start_s end_s json",
    model={
        "unless_typed": "",
        "help": "Model to describe: hub id, local folder, GGUF file, ollama:NAME, demo or demo-scenes. With a video, the default "
        "is demo.",
    },
)
def inspect(given: InspectArguments) -> int:
    """Describe this machine, a model, or a video.

    With a video, also show which frames a model would read, and how much memory it would need. No weights are loaded and
    the network is not used, except for --overlay and for videos on the web.

    \b
    evoprune inspect
    evoprune inspect -m Qwen/Qwen2.5-VL-7B-Instruct
    evoprune inspect clip.mp4 --scan
    evoprune inspect clip.mp4 -m Qwen/Qwen2.5-VL-7B-Instruct --fps 1
    evoprune inspect clip.mp4 --overlay clip.png -b 0.1
    """
    check_not_model(given.video, "evoprune inspect -m")
    facts = {} if given.video is None else {"video": {"path": without_password(given.video)}}

    def deliver(error: dict[str, Any] | None = None) -> None:
        """Print all information collected so far. After an error, this may be incomplete."""
        if given.json:
            print_document({"schema": "evoprune/inspect@1", **facts, "error": error})
        elif error is None or given.video is None:
            printed = facts
            if given.video is None and "model" in facts:
                printed = {"model": facts["model"]}  # without -m, this command describes the machine
            elif "overlay" in facts:
                printed = {"overlay": facts["overlay"], **facts}  # first, because the user has asked for it
            for line in lines(printed):
                print(printable(line, stdout()), file=stdout())

    with rescuing(lambda: given.json or given.video is None, deliver):
        every = _about_machine(given.options, given.overlay, given.scan, given.clear_cache)
        if given.video is not None:
            every = _about_video(given.video, given.options, given.overlay, given.scan, given.clear_cache)
        for part in every:
            facts |= part
    deliver()
    return 0


def _about_machine(
    options: opt.PipelineArguments, overlay: str | None, scan: bool, clear_cache: bool
) -> Iterator[dict]:
    """Yield information about versions, devices, decoders, and caches, followed by the model if the user specified one."""
    if clear_cache:
        from evoprune.session import Cache

        for cache in (Cache(), Cache().of_segments, Cache().of_weights, Cache().of_speech, Cache().of_gguf):
            try:
                cache.clear()
            except OSError as problem:
                hint = "delete it yourself, or set EVOPRUNE_CACHE_DIR to another folder"
                raise UsageError(f"cannot empty {cache.folder}: {problem.strerror}", hint) from problem
    if scan:
        raise UsageError("--scan needs a video", "evoprune inspect clip.mp4 --scan")
    if overlay is not None:
        raise UsageError("--overlay needs a video", "evoprune inspect clip.mp4 --overlay clip.png")
    model = options.parse().model
    from evoprune.session import describe, weights_of
    from evoprune_cli.inspection import environment_facts

    # Check the model first, so an error about its name doesn't follow 50 lines of output.
    weights = weights_of(describe(model, local=True)) if model.model else None
    yield environment_facts(stdout())
    if weights is not None:
        yield {"model": weights.facts()}


def _about_video(
    video: str, options: opt.PipelineArguments, overlay: str | None, scan: bool, clear_cache: bool
) -> Iterator[dict]:
    """Yield information about a video, its scan, the model's plan, and the overlay, each section as soon as it is ready."""
    if clear_cache:
        raise UsageError("--clear-cache does not apply to a video", "evoprune inspect --clear-cache")
    from evoprune.video import local_file, probe
    from evoprune.video import scan as scan_video

    pipeline = options.parse()
    pipeline = replace(pipeline, model=replace(pipeline.model, model=pipeline.model.model or "demo"))
    rate = pipeline.sampling.frame_rate
    ending = os.path.splitext(overlay or "")[1].lower()
    if overlay is not None:
        if ending not in OVERLAYS:
            kind = "files without an ending"
            if ending:
                kind = f"{ending} files"
            hint = "use .png (frame pairs side by side), .gif or .mp4 (frame after frame)"
            raise UsageError(f"--overlay {overlay}: cannot draw {kind}", hint)
        check_writable(overlay, inputs=[video])
    with ExitStack() as stack:
        with progress(is_url(video)) as show:
            offline = pipeline.model.offline
            path = stack.enter_context(local_file(video, offline=offline, progress=downloading(show)))
        video = without_password(video)
        info = replace(probe(path, folder_fps=rate), path=video)
        yield {"video": asdict(info)}
        if scan:
            with progress(True) as show:
                frames = info.frames_total or round((info.duration_s or 0.0) * (info.fps or 0.0))
                count = partial(_show_frames, show, frames)
                count(0)
                yield {"scan": asdict(scan_video(path, folder_fps=rate, on_frames=count))}
        from evoprune.session import describe, weights_of
        from evoprune_cli.inspection import plan_facts

        model = describe(pipeline.model, local=True)
        weights = weights_of(model)
        yield {"model": weights.facts()}
        plan = model.plan(info, pipeline.sampling, pipeline.pruning)
        yield {"plan": {"model": model.id, **plan_facts(plan, model.config)}}
        yield {"memory": weights.memory_facts(plan)}
        if overlay is not None:
            yield {"overlay": _draw_overlay(overlay, ending, path, video, pipeline)}


def _show_frames(show: Callable[..., None], frames: int, done: int) -> None:
    """Show the progress of a video scan. `frames` is the approximate total number of frames, or 0 if unknown."""
    if frames:
        show("scanning, frame", min(done, frames), frames)
    else:
        show(f"scanning, frame {done:,}")


def _draw_overlay(file: str, ending: str, path: str, video: str, options: PipelineOptions) -> dict[str, Any]:
    """Draw an overlay that shows the units kept by pruning, write it to `file`, and return information about it."""
    with progress(True) as show:
        prepare()
        from evoprune.bench import TracedVideo
        from evoprune.session import Session

        show("loading model")
        session = Session.load(options.model, options.pruning)
        show("reading video")
        traced = TracedVideo.trace(session, path, options.sampling, video, encoding(show))
        show("drawing")
        name = session.pruning.name
        budget = session.pruning.budget.recorded
        title = f"{os.path.basename(os.path.abspath(video))}, {name} -b {budget_text(budget)}. {traced.summary}"
        write_bytes(file, traced.draw(title, ending))
    for warning in traced.warnings:
        print_warning(warning, VideoFacts(path=video, damaged=traced.damaged))
    facts = {"file": file, "method": name, "args": session.pruning.method.args, "budget": budget}
    return facts | traced.fates.counts() | {"warnings": traced.warnings}


def lines(facts: dict, indent: int = 0, section: str = "") -> list[str]:
    """Format a nested dictionary as aligned lines, wrapped to the terminal width.

    `section` is the section of `NAMES` that contains the dictionary, or "". Keys inside such a section are printed unchanged.
    """
    output = []
    for key, value in facts.items():
        if section:
            name = ""
            title = key
        else:
            name = key  # selects the format of the value
            title = TITLES.get(key, key.removesuffix("_s").removesuffix("_bytes").replace("_", " "))
        title = " " * indent + title
        if name in ONLY_IF_SET and not value:
            continue
        if name in BLOCKS:
            output += BLOCKS[name](title, value)
        elif isinstance(value, dict) and value and name not in SHOWN:
            if name in ("video", "plan") and facts.get("video", {}).get("container") == "picture":
                value = {key: fact for key, fact in value.items() if fact is not None}  # images have no timestamps
            output += [title, *lines(value, indent + 2, name if name in NAMES else "")]
        else:
            text = _value(name, value)
            # Other values, such as paths, are not wrapped.
            if isinstance(value, list) or name in SHOWN or section not in ("", "environment"):
                output += _folded(f"{title + ' ':<{TITLE}}", text, TITLE)
            else:
                output.append(f"{title + ' ':<{TITLE}}{text}")
    return output


def _folded(title: str, text: str, indent: int) -> list[str]:
    return wrap(
        text,
        page_width(),
        initial_indent=title,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _overlay_lines(title: str, overlay: dict) -> list[str]:
    fates = ", ".join(f"{overlay[fate]:,} {fate}" for fate in ("read", "reused", "merged", "dropped"))
    setting = f"{overlay['method']} -b {budget_text(overlay['budget'])}"
    return [
        f"{title:<{TITLE}}{overlay['file']}",
        f"{'':<{TITLE}}{setting}; {counted(overlay['units'], 'unit')}: {fates}",
    ]


def _preset_lines(title: str, presets: dict[str, dict]) -> list[str]:
    indent = " " * (len(title) - len(title.lstrip()) + 2)
    output = [title]
    for name, preset in presets.items():
        noun = "token" if preset["tokens"] == 1 else "tokens"
        text = f"-b {preset['share']:<5g} {preset['tokens']:>8,} {noun:<6}  KV cache {size(preset['kv_cache_bytes'])}"
        output += _folded(f"{indent}{name:<18}", text, TITLE)
    return output


BLOCKS: dict[str, Callable[[str, Any], list[str]]] = {  # formatters for multi-line facts
    "overlay": _overlay_lines,
    "presets": _preset_lines,
}


def _times(value: list[float]) -> str:
    times = [f"{t:g}" for t in value]
    if len(times) > 8:
        times[4:-2] = ["..."]
    return ", ".join(times) + " s"


def _drops(layers: list[list[int]]) -> str:
    edges = [pair for before, pair in zip([[], *layers], layers, strict=False) if before[1:] != pair[1:]]
    return ", ".join(f"{tokens:,} from layer {layer} on" for layer, tokens in edges)


def _parameters(count: int) -> str:
    if count < 10**9:
        return f"{count:,}"
    return f"{count / 10**9:.2f} billion"


def _layers(value: dict[str, int]) -> str:
    return f"{counted(value['layers'], 'layer')}, hidden size {value['hidden_size']:,}"


SHOWN: dict[str, Callable[[Any], str]] = {  # formatters for single values
    "grid": lambda grid: " x ".join(map(str, grid)) + " units",
    "resized_hw": lambda hw: f"{hw[1]}x{hw[0]}",
    "timestamps_s": _times,
    "tower": _layers,
    "language_model": _layers,
    "parameters": _parameters,
    "language_layers": _drops,
    "duration_s": lambda seconds: f"{seconds:.3f} s ({clock(seconds)})",
    "seconds": lambda seconds: f"{seconds:.3f} s",
}


def _value(name: str, value) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in SHOWN:
        return SHOWN[name](value)
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_s"):
        return f"{value:.3f} s"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)

"""`evoprune inspect`: this machine, or a video and what a model would look at in it."""

import json as jsonlib
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from textwrap import wrap
from typing import Annotated

import typer

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.pipeline.choices import OVERLAYS
from evoprune.pruning.budget import AUTO, DEFAULT, parse_budget_or_auto
from evoprune.report import VideoFacts
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.files import check_writable, write_bytes
from evoprune_cli.render import clock, encoding, print_warning, printable, progress, size

SCHEMA = "evoprune/inspect@1"
WIDTH, TITLE = 80, 22  # columns of a line, and of what stands before its value


def inspect(
    video: Annotated[
        str | None,
        typer.Argument(
            metavar="VIDEO",
            help="A video file, a folder of frames, or - for stdin; without it, a report on this machine.",
            show_default=False,
        ),
    ] = None,
    overlay: Annotated[
        str | None,
        typer.Option(
            "--overlay",
            metavar="FILE",
            help=f"Draw what the model reads of the video, what is reused and what is merged ({', '.join(OVERLAYS)}). "
            "Loads the model; pruning options are for this.",
            show_default=False,
        ),
    ] = None,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    offline: opt.Offline = False,
    budget: opt.Budget = DEFAULT,
    method: opt.MethodName = methods.DEFAULT,
    encoder_budget: opt.EncoderBudget = None,
    method_arg: opt.MethodArg = None,
    seed: opt.Seed = 0,
    fps: opt.Fps = None,
    frames: opt.Frames = None,
    max_frames: opt.MaxFrames = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    start: opt.Start = "0",
    end: opt.End = None,
    decoder: opt.Decoder = "auto",
    scan: Annotated[
        bool,
        typer.Option("--scan", help="Decode the whole video and report damage, true length and variable rate."),
    ] = False,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="First throw out the encoded videos that `ask --cache` keeps on disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Show what is installed, or what is in a video.

    With a video also what a model would look at in it. Loads no weights, except for an overlay.

    \b
    evoprune inspect
    evoprune inspect clip.mp4 --scan
    evoprune inspect clip.mp4 -m Qwen/Qwen2.5-VL-7B-Instruct --fps 1
    evoprune inspect clip.mp4 --overlay clip.png -b 0.1
    """
    facts = {} if video is None else {"video": {"path": video}}
    try:
        if clear_cache:
            if video is not None:
                raise UsageError("--clear-cache is not about a video", "evoprune inspect --clear-cache")
            _clear_cache()
        if video is None:
            if scan:
                raise UsageError("--scan needs a video", "evoprune inspect clip.mp4 --scan")
            if overlay is not None:
                raise UsageError("--overlay needs a video", "evoprune inspect clip.mp4 --overlay clip.png")
            from evoprune.pipeline.inspection import environment_facts

            facts |= environment_facts()
        else:
            sampling = {"fps": fps, "frames": frames, "max_frames": max_frames, "max_visual_tokens": max_visual_tokens}
            which = {"revision": revision, "offline": offline}
            draw, pruning = None, _pruning(budget, method, method_arg, encoder_budget, seed)
            if overlay is not None:
                draw = _Overlay(overlay, which | {"device": device, "dtype": dtype} | pruning, decoder)
                draw.check(video)
            for found in _about(video, model, which, device, sampling, start, end, scan, draw):
                facts |= found
    except BaseException as problem:
        if json and not isinstance(problem, BrokenPipeError | SystemExit):
            print_failure(facts, problem)
            problem.told = True
        raise
    if json:
        _print_json(facts, None)
    else:
        for line in lines(facts):
            print(printable(line, sys.stdout))
    return 0


def _clear_cache() -> None:
    from evoprune.pipeline.cache import Cache, default_folder

    cache = Cache(default_folder())
    try:
        cache.clear()
    except OSError as problem:
        hint = "delete it yourself, or name another folder in EVOPRUNE_CACHE_DIR"
        raise UsageError(f"cannot empty {cache.folder}: {problem.strerror}", hint) from problem


def _about(video, model, which, device, sampling, start, end, scan, draw) -> Iterator[dict]:
    """What a video holds, what a scan tells, what a model would look at, and what it makes of it: each as soon as it is known."""
    from evoprune.pipeline.inspection import plan_facts, video_facts
    from evoprune.video.plan import default_max_visual_tokens, make_plan
    from evoprune.video.probe import probe
    from evoprune.video.sampling import parse_time
    from evoprune.video.source import local_file

    sampling = sampling | {"start_s": parse_time(start), "end_s": parse_time(end) if end else None}
    with local_file(video) as path:
        info = replace(probe(path), path=video)
        yield {"video": video_facts(info)}
        if scan:
            from evoprune.video.scan import scan as scan_video

            yield {"scan": asdict(scan_video(path))}
        from evoprune.pipeline.device import has_cuda
        from evoprune.pipeline.model_folder import describe_model

        config, limits = describe_model(model, **which)
        if sampling["max_visual_tokens"] is None:
            on_cpu = not has_cuda() if device == "auto" else device.startswith("cpu")
            most = default_max_visual_tokens(on_cpu=on_cpu, is_demo=model == "demo")
            sampling = sampling | {"max_visual_tokens": most}
        yield {"plan": {"model": model, **plan_facts(make_plan(info, limits, **sampling), config)}}
        if draw:
            yield {"overlay": draw(path, video, model, sampling)}


def _pruning(budget, method, method_arg, encoder_budget, seed) -> dict:
    """How an overlay's video is pruned, as `VideoQA` takes it, checked as far as can be before anything is loaded."""
    parse_budget_or_auto(budget)
    if not methods.known(method):
        raise UsageError(f"no pruning method {method!r}", f"one of {', '.join(methods.available())}")
    args = opt.settings(method_arg, encoder_budget)
    return {"budget": budget, "method": method, "method_args": args, "seed": seed}


@dataclass(frozen=True)
class _Overlay:
    """Draws what a model makes of a video into `file`; `settings` are those of `VideoQA.load`."""

    file: str
    settings: dict
    decoder: str

    def check(self, video: str) -> None:
        """Raises UsageError where such a file cannot be drawn or must not be written."""
        if self._ending not in OVERLAYS:
            ending = repr(self._ending) if self._ending else "no ending"
            hint = ".png shows grids side by side, .gif and .mp4 one frame after another"
            raise UsageError(f"--overlay {self.file} has {ending}, which cannot be drawn", hint)
        check_writable(self.file)
        folder = os.path.dirname(os.path.abspath(self.file))
        if os.path.exists(video) and any(
            os.path.exists(place) and os.path.samefile(place, video) for place in (self.file, folder)
        ):
            raise UsageError(f"--overlay {self.file} would change the video", "name another place")

    def __call__(self, path: str, video: str, model: str, sampling: dict) -> dict:
        """Draws; what there is to tell of it."""
        with progress(True) as show:
            from evoprune.pipeline.video_qa import VideoQA
            from evoprune.visualize.fates import look_at
            from evoprune.visualize.overlay import as_file

            show("loading model")
            qa = VideoQA.load(model, **self.settings)
            with closing(qa.prepare(path, name=video, decoder=self.decoder, **sampling)) as prepared:
                show("reading video")
                look = look_at(prepared, encoding(show))
            show("drawing")
            told = qa.method.told(qa.asked_budget)
            how = f"{qa.method_name} -b {told if told == AUTO else f'{told:g}'}"
            title = f"{os.path.basename(os.path.abspath(video))}, {how}. {look.summary}"
            write_bytes(self.file, as_file(look, title, self._ending))
        for name in look.warnings:
            print_warning(name, VideoFacts(path=video, damaged=look.damaged))
        share = qa.method.encoder_share(qa.budget)
        counts = look.fates.counts()
        return {
            "file": self.file,
            "method": qa.method_name,
            "args": asdict(qa.method),
            "budget": told,
            "encoder_budget": share,
            **counts,
            "warnings": look.warnings,
        }

    @property
    def _ending(self) -> str:
        return os.path.splitext(self.file)[1].lower()


def print_failure(facts: dict, problem: BaseException) -> None:
    """The JSON line of an inspection that failed, with what was found before it did."""
    _print_json(facts, failure(problem))


def _print_json(facts: dict, error: dict | None) -> None:
    print(jsonlib.dumps({"schema": SCHEMA, **facts, "error": error}, separators=(",", ":")), flush=True)


def lines(facts: dict, indent: int = 0) -> list[str]:
    """Nested facts as aligned lines of at most 80 columns, if their words allow it; values of known units in words."""
    made = []
    for name, value in facts.items():
        title = " " * indent + (
            name if name.isupper() else name.removesuffix("_s").removesuffix("_bytes").replace("_", " ")
        )
        if name == "args" or (name == "encoder_budget" and value is None):
            continue  # for programs
        if name == "presets":
            made.append(title)
            for preset, p in value.items():
                tokens = f"-b {p['budget']:<5g} {p['tokens']:>8,} tokens"
                made.append(f"{' ' * (indent + 2)}{preset:<18}{tokens}  KV cache {size(p['kv_cache_bytes'])}")
        elif isinstance(value, dict) and value:
            made += [title, *lines(value, indent + 2)]
        else:
            text = _value(name, value)
            # A path, or what a file says of itself, stays in one piece.
            parts = (
                wrap(text, WIDTH - TITLE, break_long_words=False, break_on_hyphens=False)
                if isinstance(value, list)
                else [text]
            )
            made += [f"{title if number == 0 else '':<{TITLE}}{part}" for number, part in enumerate(parts or [""])]
    return made


def _value(name: str, value) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "grid":
        return " x ".join(map(str, value)) + " units"
    if name in ("timestamps_s",):
        shown = [f"{t:g}" for t in (value if len(value) <= 8 else [*value[:4], *value[-2:]])]
        return ", ".join(shown if len(value) <= 8 else [*shown[:4], "...", *shown[4:]]) + " s"
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) or "none"
    if name.endswith("_bytes"):
        return size(value)
    if name == "duration_s":
        return f"{value:.3f} s ({clock(value)})"
    if name.endswith("_s") or name == "seconds":
        return f"{value:.3f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

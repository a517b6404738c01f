"""`evoprune inspect`: this machine, or a video and what a model would look at in it."""

import json as jsonlib
import sys
from typing import Annotated

import typer

from evoprune.errors import UsageError
from evoprune_cli import options as opt
from evoprune_cli.render import clock, printable, size


def inspect(
    video: Annotated[
        str | None,
        typer.Argument(
            help="A video file or folder of frames; without it, a report on this machine.", show_default=False
        ),
    ] = None,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    offline: opt.Offline = False,
    fps: opt.Fps = None,
    frames: opt.Frames = None,
    max_frames: opt.MaxFrames = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    start: opt.Start = "0",
    end: opt.End = None,
    scan: Annotated[
        bool,
        typer.Option("--scan", help="Decode the whole video and report damage, true length and variable rate."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON on stdout instead of text.")] = False,
    debug: opt.Debug = False,
) -> int:
    """Show versions and devices; or what a video holds and what a model would look at in it. Loads no weights.

    evoprune inspect

    evoprune inspect clip.mp4 --scan

    evoprune inspect clip.mp4 -m Qwen/Qwen2.5-VL-7B-Instruct --fps 1
    """
    if video is None:
        if scan:
            raise UsageError("--scan needs a video", "evoprune inspect clip.mp4 --scan")
        from evoprune.inspection import environment_facts

        _show(environment_facts(), json)
        return 0
    from dataclasses import asdict

    from evoprune.inspection import plan_facts, video_facts
    from evoprune.plan import default_max_visual_tokens, make_plan
    from evoprune.video.probe import probe
    from evoprune.video.sampling import parse_time

    info = probe(video)
    facts = {"video": video_facts(info)}
    if scan:
        from evoprune.video.scan import scan as scan_video

        facts["scan"] = asdict(scan_video(video))
    from evoprune.models import describe_model, has_cuda

    config, limits = describe_model(model, revision=revision, offline=offline)
    plan = make_plan(
        info,
        limits,
        fps=fps,
        frames=frames,
        start_s=parse_time(start),
        end_s=parse_time(end) if end else None,
        max_frames=max_frames,
        max_visual_tokens=default_max_visual_tokens(on_cpu=not has_cuda(), is_demo=model == "demo")
        if max_visual_tokens is None
        else max_visual_tokens,
    )
    facts["plan"] = {"model": model, **plan_facts(plan, config)}
    _show(facts, json)
    return 0


def _show(facts: dict, json: bool) -> None:
    if json:
        print(jsonlib.dumps(facts, separators=(",", ":")), flush=True)
        return
    for line in lines(facts):
        print(printable(line, sys.stdout))


def lines(facts: dict, indent: int = 0) -> list[str]:
    """Nested facts as aligned lines, values of known units in words."""
    made = []
    for name, value in facts.items():
        title = " " * indent + name.removesuffix("_s").replace("_", " ")
        if name == "presets":
            made.append(title)
            for preset, p in value.items():
                tokens = f"-b {p['budget']:<5g} {p['tokens']:>8,} tokens"
                made.append(f"{' ' * (indent + 2)}{preset:<18}{tokens}  KV cache {size(p['kv_cache_bytes'])}")
        elif isinstance(value, dict) and value:
            made += [title, *lines(value, indent + 2)]
        else:
            made.append(f"{title:<22}{_value(name, value)}")
    return made


def _value(name: str, value) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in ("timestamps_s",):
        shown = [f"{t:g}" for t in (value if len(value) <= 8 else [*value[:4], *value[-2:]])]
        return ", ".join(shown if len(value) <= 8 else [*shown[:4], "...", *shown[4:]]) + " s"
    if isinstance(value, list | dict):
        return ", ".join(map(str, value)) or "none"
    if name == "duration_s":
        return f"{value:.3f} s ({clock(value)})"
    if name.endswith("_s") or name == "seconds":
        return f"{value:.3f} s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

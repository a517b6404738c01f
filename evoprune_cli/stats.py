"""The stats block of an answer: a row for each stage, with its time, a bar, what goes in and what comes out."""

import os
import textwrap

from evoprune.report import STAGES, Report
from evoprune_cli.terminal import WIDTH, columns, note, paint, printable
from evoprune_cli.text import clock, counted, shorten, size

BAR = 12


def print_stats(report: Report, verbose: bool = False) -> None:
    """Prints the block on stderr."""
    for line in stats_block(report, columns(), verbose):
        note(paint(printable(line), "2"))


def stats_block(report: Report, width: int = WIDTH, verbose: bool = False) -> list[str]:
    """The lines of the block, each at most `width` columns wide.

    Args:
        verbose: also the rows of every layer, settings and versions.
    """
    lines = [*_heading(report, width), *_stages(report, width), *_totals(report)]
    if report.compare:
        lines += _side_by_side(report, report.compare)
    if verbose:
        lines += _verbose(report)
    return [piece for line in lines for piece in _folded(line, width)]


def _heading(report: Report, width: int) -> list[str]:
    """The model, the pruning and the video."""
    model, video, pruning = report.model, report.video, report.pruning
    on_cpu = (model.device or "").startswith("cpu")
    threads = f" ({counted(report.env.threads, 'thread')})" if on_cpu and report.env.threads else ""
    kept = 100 * (pruning.kept_ratio or 0)
    fps = f"{video.fps:.4g} fps" if video.fps else "? fps"
    asked = pruning.budget if isinstance(pruning.budget, str) else f"{pruning.budget:g}"
    budget = "" if pruning.method == "none" else f" -b {asked}"
    facts = f"{clock(video.duration_s)}  {video.width}x{video.height}  {fps}  {video.codec}  ({video.decoder})"
    name = printable(os.path.basename(os.path.abspath(video.path)))
    return [
        f"model      {shorten(model.id, max(24, width - 40))}  {model.dtype}  {model.device}{threads}",
        f"pruning    {pruning.method}{budget}: {kept:.1f}% kept, {100 - kept:.1f}% pruned",
        f"video      {shorten(name, max(20, width - 13 - len(facts)))}  {facts}",
        f"{'stage':<11}{'ms':>8}",
    ]


def _stages(report: Report, width: int) -> list[str]:
    """A row for each stage: its milliseconds, a bar, and what goes through it."""
    times, flow = report.time_ms, _flow(report)
    longest = max((getattr(times, stage) or 0 for stage in STAGES), default=0)
    room = width - 21 - max(map(len, flow.values()))  # columns left for the bars
    bar, lines = min(BAR, room - 2) if room >= 6 else 0, []
    for stage in STAGES:
        spent = getattr(times, stage) or 0
        if not spent and (stage not in ("prefill", "generate") or report.tokens.prompt is None):
            continue  # a later question, whose video was timed with the first; or a stage that was not reached
        marks = "#" * (round(bar * spent / longest) if longest else 0)
        lines.append(f"{stage:<11}{spent:>8,.0f}  {marks:<{bar}}{'  ' if bar else ''}{flow[stage]}")
        if stage == "encode" and times.encode_prune:
            lines.append(f"{'  pruning':<11}{times.encode_prune:>8,.0f}")
        if stage == "generate" and (times.pack or 0) >= 1:
            lines.append(f"{'  packing':<11}{times.pack:>8,.0f}  of all stages, the first time only")
    return lines


def _flow(report: Report) -> dict[str, str]:
    """What goes into each stage and what comes out."""
    video, pruning, sampling = report.video, report.pruning, report.sampling
    (pairs, rows, wide), (height, width) = sampling.grid_thw, sampling.resized_hw
    read = f"{video.frames_total:,} frames -> {sampling.frames}" if video.frames_total else f"{sampling.frames} frames"
    if report.cache == "hit":
        read = f"{counted(pruning.visual_tokens_kept, 'token')} from the cache"
    encode = counted(pruning.visual_tokens_in, "unit")
    if pruning.encoder_rows != pruning.visual_tokens_in:
        encode += f" -> {counted(pruning.encoder_rows, 'row')} (live share {pruning.encoder_live_share:.2f})"
    speed = f", {report.rate.generate_tok_s:.1f} tok/s" if report.rate.generate_tok_s else ""
    count = report.tokens
    return {
        "read": read,
        "preprocess": f"{sampling.frames} frames {height}x{width} -> {counted(pairs, 'frame pair')} "
        f"of {rows}x{wide} patches",
        "encode": f"{encode} -> {counted(pruning.visual_tokens_kept, 'token')}",
        "prefill": f"{count.prompt or 0:,} tokens = {count.visual or 0:,} visual + {count.text or 0} text",
        "generate": f"{counted(count.new or 0, 'token')}{speed}",
    }


def _totals(report: Report) -> list[str]:
    """The time to the first token, the time in all, and memory."""
    times, memory = report.time_ms, report.memory
    first = f"(model alone {times.ttft_model:,.0f})" if times.ttft_model is not None else ""
    load = f"load {times.load:,.0f} apart" if times.load is not None else ""
    reached = "first token" + (f"{times.ttft_wall:>8,.0f}" if times.ttft_wall is not None else "  not reached")
    return [
        f"{reached}  {first}  total {times.total or 0:,.0f}  {load}".rstrip(),
        f"memory     peak {size(memory.peak_bytes)}, weights {size(memory.weights_bytes)}",
    ]


def _side_by_side(pruned: Report, full: Report) -> list[str]:
    """Times to the first token and tokens of a question, with and without pruning."""
    rows = (
        ("first token", pruned.time_ms.ttft_wall, full.time_ms.ttft_wall),
        (" model alone", pruned.time_ms.ttft_model, full.time_ms.ttft_model),
        ("tokens", pruned.tokens.visual, full.tokens.visual),
    )
    lines = [f"{'compare':<12}{'pruned':>9}{'full':>9}"]
    for name, ours, theirs in rows:
        cells = "".join(f"{'-' if value is None else f'{value:,.0f}':>9}" for value in (ours, theirs))
        lines.append(f"{name:<12}{cells}" + (f"{theirs / ours:>7.1f}x" if ours and theirs else ""))
    return lines


def _folded(line: str, width: int) -> list[str]:
    """The line in pieces that fit, broken between words, the later ones indented."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, 30), subsequent_indent=" " * 11, drop_whitespace=True) or [line]


def _verbose(report: Report) -> list[str]:
    """Parts of loading in ms, rows of every layer, tokens of every frame pair, settings, versions."""
    env, times = report.env, report.time_ms
    parts = {"tokenizer": times.load_tokenizer, "weights": times.load_weights, "preparing": times.load_prepare}
    return [
        *_wrapped("load", [f"{name}={spent:,.0f}" for name, spent in parts.items() if spent is not None]),
        *_wrapped("rows", [f"{layer}:{rows:,}" for layer, rows in report.pruning.layers]),
        *_wrapped("kept", [f"{n:,}" for n in report.pruning.kept_per_pair]),
        *_wrapped("settings", [f"{k}={v}" for k, v in report.pruning.args.items()] or ["none"]),
        *_wrapped("versions", [f"evoprune {env.evoprune},", f"torch {env.torch},", f"transformers {env.transformers}"]),
        f"{'device':<11}{env.device_name}",
    ]


def _wrapped(title: str, words: list[str]) -> list[str]:
    lines, line = [], f"{title:<10}"
    for word in words:
        if len(line) + 1 + len(word) > WIDTH:
            lines.append(line)
            line = " " * 10
        line += f" {word}"
    return [*lines, line]

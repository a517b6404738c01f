"""A report's statistics as text, with one line per stage: its time, a bar, and a note on its input and output.

Unknown values are omitted, so incomplete reports, such as reports of errors or Hugging Face model calls, can also be printed. In
this module, `report` is a `Report`, or one of its inputs.
"""

import os
import textwrap
from collections.abc import Sequence
from math import ceil, floor
from typing import Any

from evoprune.bundled import DEMOS
from evoprune.util import WIDTH, budget_text, clock, counted, one_line, shorten, size

STAGES = ("plan", "speech", "read", "preprocess", "compile", "encode", "store", "prefill", "generate")
BRIEF_STAGES = ("speech", "compile", "store")  # stages printed only if they take at least 1 ms
BAR = 12
INDENT = " " * 11


def stats_block(report, width: int = WIDTH, verbose: bool = False) -> list[str]:
    """Return a report's statistics as lines of at most `width` columns.

    Args:
        verbose: Whether to include the number of rows per layer, the method settings, and the package versions.
    """
    lines = [
        *_heading_lines(report, width),
        *_stage_lines(report, width),
        *_total_lines(report),
        *_memory_lines(report.memory),
    ]
    if report.compare:
        lines += _comparison_lines(report, report.compare)
    if verbose:
        lines += _verbose_lines(report)
    if report.error:
        lines.append(f"{'error':<11}{report.error['message']}")
    return [piece for line in lines for piece in wrap_line(line, width)]


def summary(report) -> str:
    """Return a one-line summary: token counts, time to first token, total time, and the probability of each choice."""
    tokens = report.tokens
    times = report.time_ms
    read = f"{counted(tokens.prompt or 0, 'token')} read ({tokens.visual or 0:,} visual), {tokens.new or 0:,} written"
    first = "not reached"
    if times.ttft_wall is not None:
        first = f"{times.ttft_wall:,.0f} ms"
    line = f"{read}; first token {first}, total {times.total or 0:,.0f} ms"
    if report.choices:
        line += f"; choices {_choices_text(report.choices)}"
    return line


def _choices_text(choices: Sequence[dict[str, Any]]) -> str:
    """Return the choices with their probabilities, most probable first."""
    ranked = sorted(choices, key=lambda choice: -choice["probability"])
    return ", ".join(f"{one_line(choice['text'])} {choice['probability']:.3f}" for choice in ranked)


def device_text(name: str | None, threads: int | None) -> str:
    """Format a device name for output. For a CPU, the thread count is added."""
    if threads and (name or "").startswith("cpu"):
        return f"{name} ({counted(threads, 'thread')})"
    return str(name)


def _heading_lines(report, width: int) -> list[str]:
    model = report.model
    pruning = report.pruning
    lines = []
    if model.id or model.device:
        name = model.id or "?"
        if os.path.isabs(name):
            name = os.path.basename(os.path.abspath(name))
        name = shorten(name, max(24, width - 40))
        lines.append(f"{'model':<11}{name}  {model.precision}  {device_text(model.device, report.env.threads)}")
    lines += [_input_line(facts, width) for facts in report.inputs or [report] if facts.video.path]
    if pruning.method:
        flags = pruning.method
        if pruning.method != "none":
            flags += f" -b {budget_text(pruning.budget)}"
        lines.append(f"{'pruning':<11}{flags}: {_kept_text(pruning)}")
    return lines


def _input_line(facts, width: int) -> str:
    """Return a line with the name and known properties of a video or image.

    Args:
        facts: One of the report's inputs, or the report itself if it has a single input.
        width: Maximum width of the line, in columns.
    """
    video = facts.video
    medium = getattr(facts, "kind", None) or "video"
    size = f"{video.width}x{video.height}"
    times = size
    if medium == "video":
        fps = f"{video.fps:.4g}" if video.fps else "?"
        times = f"{_duration_text(facts)}  {size}  {fps} fps"
    known = ""
    if video.decoder:
        known = f"  {times}  {video.codec}  ({video.decoder})"
    name = one_line(os.path.basename(os.path.abspath(video.path)))
    return f"{medium:<11}{shorten(name, max(20, width - 11 - len(known)))}{known}"


def _kept_text(pruning) -> str:
    """Describe the percentage of visual tokens kept, and the percentage remaining after each drop in the language model."""
    kept = 100 * (pruning.kept_ratio or 0)
    read = pruning.language_layers or []
    first_layers: dict[int, int] = {}  # maps each token count to the first layer that reads that many tokens
    for layer, tokens in read:
        first_layers.setdefault(tokens, layer)
    if len(first_layers) < 2:
        return f"{kept:.1f}% kept, {100 - kept:.1f}% pruned"
    drops = list(first_layers.items())[1:]
    shares = ", ".join(f"{100 * tokens / pruning.visual_tokens_in:.1f}%" for tokens, _ in drops)
    after = ", ".join(str(layer) for _, layer in drops)
    return f"{kept:.1f}% enter the language model; {shares} left after {after} of its {len(read)} layers"


def _duration_text(report) -> str:
    """Format a video's duration, plus the time span read if it was only part of the video."""
    length = report.video.duration_s
    start = report.sampling.start_s
    end = report.sampling.end_s
    if None in (length, start, end) or (start <= 0.05 and end >= length - 0.05):
        return clock(length)
    return f"{clock(start)}-{clock(end)} of {clock(length)}"


def _stage_lines(report, width: int) -> list[str]:
    times = report.time_ms
    notes = _stage_notes(report)
    spent = {stage: getattr(times, stage) or 0 for stage in STAGES if _is_printed(times, stage)}
    longest = max(spent.values(), default=0) or 1
    room = width - 21 - max((len(notes[stage]) for stage in spent), default=0)  # columns left for the bars
    bar = 0
    gap = ""
    if room >= 6:
        bar = min(BAR, room - 2)
        gap = "  "
    lines = []
    for stage, ms in spent.items():
        marks = "#" * round(bar * ms / longest)
        lines.append(f"{stage:<11}{ms:>8,.0f}  {marks:<{bar}}{gap}{notes[stage]}".rstrip())
        if pruning := getattr(times, f"{stage}_prune", None):
            line = f"{'  pruning':<11}{pruning:>8,.0f}"
            if stage == "encode":
                line += _after_tower_note(report)
            lines.append(line)
        if stage == "generate" and (times.pack or 0) >= 1:
            lines.append(f"{'  packing':<11}{times.pack:>8,.0f}  included in the stages above, once per layer")
        if stage == "preprocess" and (times.overlap or 0) >= 1:
            lines.append(f"{'  overlap':<11}{-times.overlap:>8,.0f}  overlapped with other work")
    if lines:
        lines.insert(0, f"{'stage':<11}{'ms':>8}")
    if times.read:
        lines += _input_lines(report)
    return lines


def _after_tower_note(report) -> str:
    """Return a note that small inputs were pruned only after the vision tower, or an empty string if not applicable."""
    pruning = report.pruning
    if not pruning.after_tower_inputs:
        return ""
    return f"  only after the tower: under {pruning.after_tower_below:,} visual tokens"


def _is_printed(times, stage: str) -> bool:
    """Return True if a stage's time should be printed.

    A stage is omitted if it already ran for an earlier question about the same video, or if it is a brief stage that took less than
    1 ms.
    """
    spent = getattr(times, stage)
    if stage in ("prefill", "generate"):
        return spent is not None
    return bool(spent) and (spent >= 1 or stage not in BRIEF_STAGES)


def _input_lines(report) -> list[str]:
    """Return one line per input with its token counts and times, or an empty list if there is only one input."""
    lines = []
    for number, facts in enumerate(report.inputs, 1):
        kept = facts.pruning
        spent = facts.time_ms
        if len(report.inputs) > 1 and spent.read is not None:
            times = f"read {spent.read:,.0f}, preprocess {spent.preprocess:,.0f}, encode {spent.encode:,.0f} ms"
            tokens = f"{kept.visual_tokens_in or 0:,} visual tokens -> {kept.visual_tokens_kept or 0:,}"
            lines.append(f"{f'input {number}':<11}{tokens}; {times}")
    return lines


def _frames_read(report) -> str:
    """Describe the number of frames in the video, in the time span read (if known), and in the sample."""
    video = report.video
    sampling = report.sampling
    if not video.frames_total:
        return counted(sampling.frames, "frame")
    part = ""
    if "-" in _duration_text(report) and video.fps and video.variable_rate is False:
        # Count the frames visible between start and end. Timestamps are accurate to a hundredth of a frame.
        inside = ceil(sampling.end_s * video.fps - 0.01) - floor(sampling.start_s * video.fps + 0.01)
        part = f"{inside:,} of "
    return f"{part}{counted(video.frames_total, 'frame')} -> {sampling.frames}"


def _stage_notes(report) -> dict[str, str]:
    """Return a note for each stage describing its input and output."""
    pruning = report.pruning
    sampling = report.sampling
    count = report.tokens
    notes = dict.fromkeys(STAGES, "")
    notes["plan"] = "check that it fits into memory and the context"
    notes["compile"] = "kernels, built once per machine, loaded once per process"
    notes["store"] = "to the cache"
    if report.subtitles and report.subtitles.get("speech"):
        notes["speech"] = (
            f"{counted(report.subtitles['lines'], 'line')}, language {report.subtitles['language'] or 'unknown'}"
        )
    if len(report.inputs) > 1:
        notes["read"] = f"{len(report.inputs)} inputs"
    elif sampling.frames:
        height, width = sampling.resized_hw
        still = any(facts.kind == "picture" for facts in report.inputs)
        notes["read"] = _frames_read(report)
        notes["preprocess"] = f"{counted(sampling.frames, 'frame')} of {width}x{height}"
        if still:
            notes["read"] = "an image"
            notes["preprocess"] = f"{width}x{height}"
    if pruning.visual_tokens_kept is not None:
        tokens = counted(pruning.visual_tokens_in, "visual token")
        kept = pruning.visual_tokens_kept
        notes["encode"] = f"{tokens} -> {kept:,}, with {100 * (pruning.encoder_live_share or 0):.0f}% of the work"
        if report.cache == "hit":
            notes["read"] = f"{counted(kept, 'visual token')} from the cache"
    if count.prompt is not None:
        drops = [tokens for _, tokens in pruning.language_layers or []]
        fewer = [f"{tokens:,}" for tokens in dict.fromkeys(drops) if tokens < drops[0]]
        notes["prefill"] = (
            f"{counted(count.prompt, 'token')} read: {count.visual or 0:,} visual + {count.text or 0} text"
        )
        if fewer:
            notes["prefill"] += f", then {', '.join(fewer)} visual"
        notes["generate"] = f"{counted(count.new or 0, 'token')} written"
        if report.rate.generate_tok_s:
            notes["generate"] += f", {report.rate.generate_tok_s:.1f} tok/s"
    return notes


def _total_lines(report) -> list[str]:
    times = report.time_ms
    lines = []
    if report.choices:
        lines.append(f"{'choices':<11}{_choices_text(report.choices)}")
    if times.ttft_wall is not None:
        line = f"{'first token':<11}{times.ttft_wall:>8,.0f}"
        if times.ttft_model is not None:
            line += f"  (encode + prefill: {times.ttft_model:,.0f})"
        lines.append(line)
    elif report.answer is None and report.question is not None and times.total is not None:
        lines.append(f"{'first token':<11}  not reached")
    if times.total is not None:
        line = f"{'total':<11}{times.total:>8,.0f}"
        if times.load is not None and times.startup is None:
            line += f"  (loading the model, not counted: {times.load:,.0f})"
        elif not (report.video.path or report.question):
            line += "  (the whole call)"
        lines.append(line)
    if times.startup is not None:
        line = f"{'startup':<11}{times.startup:>8,.0f}  Python and imports"
        lines.append(line + f"; loading the model: {times.load or 0:,.0f} (not in total)")
    return lines


def _memory_lines(memory) -> list[str]:
    """Return a line with the peak memory and, on a CPU, a second line with the process's private memory and mapped files."""
    if memory.peak_bytes is None:
        return []
    lines = [f"{'memory':<11}peak {size(memory.peak_bytes)}; weights {size(memory.weights_bytes)}"]
    if memory.own_bytes is not None and memory.mapped_bytes is not None:
        files = f"{size(memory.mapped_bytes)} of reclaimable mapped files"
        lines.append(f"{INDENT}now {size(memory.own_bytes)} private, and {files}")
    return lines


def _comparison_lines(pruned, full) -> list[str]:
    """Return lines that compare times and token counts for the same question with and without pruning.

    Only the encoding and prefill times are compared. Read times wouldn't be comparable, because the second run reuses patches from
    the first run.
    """
    rows = (
        ("encode + prefill", pruned.time_ms.ttft_model, full.time_ms.ttft_model),
        ("visual tokens", pruned.tokens.visual, full.tokens.visual),
    )
    lines = [f"{'compare':<16}{'pruned':>9}{'full':>9}"]
    for name, ours, theirs in rows:
        line = f"{name:<16}{_number(ours):>9}{_number(theirs):>9}"
        if ours and theirs:
            line += f"{theirs / ours:>7.1f}x"
        lines.append(line)
    if along := pruned.agreement:
        agree = f"agrees at {along['agree']} of {counted(along['tokens'], 'token')} of the full answer"
        lines.append(f"{'agreement':<16}{agree}, KL {along['kl']:.3f} nats")
    why = "the first run includes the warm-up"
    if pruned.model.id in DEMOS:
        why = "the demo is too small for a speedup"
    return [*lines, f"{why}; to measure: evoprune profile"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def wrap_line(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, 30), subsequent_indent=INDENT, break_on_hyphens=False)


def _verbose_lines(report) -> list[str]:
    """Return the lines specific to verbose reports, such as load times, rows per layer, and settings."""
    env = report.env
    times = report.time_ms
    pruning = report.pruning
    loads = {"tokenizer": times.load_tokenizer, "weights": times.load_weights, "preparing": times.load_prepare}
    grid = ["unknown"]
    if report.sampling.grid_thw:
        pairs, high, wide = report.sampling.grid_thw
        grid = [counted(pairs, "frame pair"), "of", f"{high}x{wide}", "patches"]
    lines = [
        _titled("load", [f"{name}={spent:,.0f}" for name, spent in loads.items() if spent is not None]),
        _titled("grid", grid),
        _titled("rows", [f"{layer}:{rows:,}" for layer, rows in pruning.layers or []]),
    ]
    if read := pruning.language_layers:
        lines.append(_titled("read", [f"{layer}:{tokens:,}" for layer, tokens in read]))
    if work := pruning.language_work:
        lines.append(_titled("work", [f"{layer}:{k:,}/{q:,}/{m:,}" for layer, k, q, m in work]))
    lines.append(_titled("kept", [f"{n:,}" for n in pruning.kept_per_pair or []]))
    if report.subtitles:
        lines.append(_subtitles_line(report.subtitles))
    return [
        *lines,
        _titled("settings", [f"{k}={v}" for k, v in (pruning.args or {}).items()] or ["none"]),
        _titled("versions", [f"evoprune {env.evoprune},", f"torch {env.torch},", f"transformers {env.transformers}"]),
        _titled("device", [str(env.device_name)]),
    ]


def _subtitles_line(subtitles: dict) -> str:
    name = one_line(subtitles["source"])
    lines = f"{subtitles['lines_in_prompt']:,} of {counted(subtitles['lines'], 'line')}"
    count = f"{lines}, {counted(subtitles['tokens'], 'token')}"
    return f"{'subtitles':<11}{shorten(name, WIDTH - 13 - len(count))}: {count}"


def _titled(title: str, words: list[str]) -> str:
    return f"{title:<11}{' '.join(words)}"

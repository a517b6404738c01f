"""What a person reads on stderr: errors, warnings, notes, the stats block. Colour only on a terminal."""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from evoprune.report import STAGES, Report, VideoFacts

WIDTH = 80
BAR = 12
WARNINGS = {
    "equal_scores": "every frame is one even colour, so which units were merged or kept says nothing",
    "random_weights": "the weights are random, so the answer means nothing; times and counts are those of the true dimensions",
    "cache_not_written": "the encoded video could not be stored; `evoprune inspect` names the folder: is it full, or read-only?",
    "damaged_video": "the video is damaged ({damaged:,} of its packets or images); each frame that cannot be decoded was "
    "replaced by the one before it",
    "cut_short": "the video breaks off at {ends}, although its file says that it lasts until {stated}",
    "demo_model": "the demo model knows only coloured shapes and digits; its answer about this video means nothing. "
    "For a real answer: -m Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_overlay": "the demo model knows only coloured shapes and digits; what it merges and selects in this video "
    "says little. For a real model: -m Qwen/Qwen2.5-VL-3B-Instruct",
}


def colourful() -> bool:
    """Whether stderr is a terminal that wants colour (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def columns() -> int:
    """Columns of stderr: those of the terminal, at most 80."""
    if not sys.stderr.isatty():
        return WIDTH
    stated = os.environ.get("COLUMNS", "")
    try:
        found = int(stated) if stated.isdigit() else os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        found = 0
    return min(WIDTH, found) if found > 0 else WIDTH


def _paint(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colourful() else text


def encodable(text: str, stream=None) -> str:
    """The text as a stream (default: stderr) can print it: characters outside its encoding become escapes."""
    encoding = (stream or sys.stderr).encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str, stream=None) -> str:
    """Text as one line without control characters, within the stream's encoding."""
    return encodable("".join(c if c.isprintable() else "?" for c in text), stream)


def note(text: str = "") -> None:
    """Prints a line to stderr. If that fails, for example because the reader is gone, all further lines are dropped."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open to the end)


def print_json(report: Report) -> None:
    """Prints a report as one line on stdout, in plain ASCII where stdout or the text is not valid UTF-8."""
    text = report.to_json()
    try:
        proper = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8" and bool(text.encode("utf-8"))
    except UnicodeEncodeError:  # a path with bytes that are not UTF-8
        proper = False
    print(text if proper else report.to_json(ascii_only=True), flush=True)


def print_error(message: str, hint: str | None) -> None:
    """The two lines of an error."""
    note(f"{_paint('error:', '31;1')} {printable(message)}")
    if hint:
        note(f"{_paint('hint:', '36')} {printable(hint)}")


def print_warning(name: str, video: VideoFacts, more: int | None = None) -> None:
    """Prints a warning about a video; in a batch with its name, and with how many `more` videos it applies to."""
    facts = {"damaged": video.damaged or 0, "ends": clock(video.duration_s), "stated": clock(video.stated_s)}
    text = WARNINGS.get(name, name).format(**facts)
    if more is not None:
        text += f" ({video.path}{f' and {more:,} more' if more else ''})"
    first, *rest = textwrap.wrap(f"warning: {printable(text)}", max(columns(), 30), subsequent_indent=" " * 9)
    note(_paint("warning:", "33;1") + first.removeprefix("warning:"))
    for line in rest:
        note(line)


def tell(text: str) -> None:
    """Prints a sentence on stderr, folded to the terminal's width."""
    for line in textwrap.wrap(printable(text), max(columns(), 30), subsequent_indent="  "):
        note(_paint(line, "2"))


def clock(seconds: float | None) -> str:
    """1:02:03.5, 2:31.4 or 0:06.0."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def roughly(seconds: float) -> str:
    """~40 s, ~12 min or ~9 h: an estimate with one digit or two."""
    if seconds >= 5700:
        return f"~{seconds / 3600:,.0f} h"
    return f"~{seconds / 60:,.0f} min" if seconds >= 95 else f"~{float(f'{seconds:.1g}'):.0f} s"


def shorten(text: str, width: int) -> str:
    """The text with its middle left out where it is too long."""
    if len(text) <= width:
        return text
    head = max(0, (width - 3) // 2)
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def stats_block(report: Report, width: int = WIDTH, verbose: bool = False) -> list[str]:
    """The stats of one question, one line a stage: its time, a bar, what goes in and what comes out."""
    model, video, pruning, sampling, times = report.model, report.video, report.pruning, report.sampling, report.time_ms
    threads = f" ({report.env.threads} threads)" if (model.device or "").startswith("cpu") else ""
    kept = 100 * (pruning.kept_ratio or 0)
    fps = f"{video.fps:.4g} fps" if video.fps else "? fps"
    asked = pruning.budget if isinstance(pruning.budget, str) else f"{pruning.budget:g}"
    budget = "" if pruning.method == "none" else f" -b {asked}"
    grids, rows, columns = sampling.grid_thw
    facts = f"{clock(video.duration_s)}  {video.width}x{video.height}  {fps}  {video.codec}  ({video.decoder})"
    name = printable(os.path.basename(os.path.abspath(video.path)))
    lines = [
        f"model      {shorten(model.id, max(24, width - 40))}  {model.dtype}  {model.device}{threads}",
        f"pruning    {pruning.method}{budget}: {kept:.1f}% kept, {100 - kept:.1f}% pruned",
        f"video      {shorten(name, max(20, width - 13 - len(facts)))}  {facts}",
        f"{'stage':<11}{'ms':>8}",
    ]
    through = f"{pruning.visual_tokens_in:,} units"
    if pruning.encoder_rows != pruning.visual_tokens_in:
        through += f" -> {pruning.encoder_rows:,} rows (live share {pruning.encoder_live_share:.2f})"
    speed = f", {report.rate.generate_tok_s:.1f} tok/s" if report.rate.generate_tok_s else ""
    said = {
        "read": f"{video.frames_total:,} frames -> {sampling.frames}"
        if video.frames_total
        else f"{sampling.frames} frames",
        "preprocess": f"{sampling.frames} frames {sampling.resized_hw[0]}x{sampling.resized_hw[1]}"
        f" -> {grids} grid{'' if grids == 1 else 's'} of {rows}x{columns} patches",
        "encode": f"{through} -> {_tokens(pruning.visual_tokens_kept)}",
        "prefill": f"{report.tokens.prompt or 0:,} tokens = {report.tokens.visual or 0:,} visual + {report.tokens.text or 0} text",
        "generate": f"{_tokens(report.tokens.new or 0)}{speed}",
    }
    if report.cache == "hit":
        said["read"] = f"{_tokens(pruning.visual_tokens_kept)} from the cache"
    longest = max((getattr(times, stage) or 0 for stage in STAGES), default=0)
    room = width - 21 - max(map(len, said.values()))  # columns left for the bars
    bar = min(BAR, room - 2) if room >= 6 else 0
    for stage in STAGES:
        spent = getattr(times, stage) or 0
        if not spent and stage not in ("prefill", "generate"):
            continue  # a later question: the first one's report has the video's time
        marks = "#" * (round(bar * spent / longest) if longest else 0)
        lines.append(f"{stage:<11}{spent:>8,.0f}  {marks:<{bar}}{'  ' if bar else ''}{said[stage]}")
        if stage == "encode" and times.encode_prune:
            lines.append(f"{'  pruning':<11}{times.encode_prune:>8,.0f}")
    first = f"(model alone {times.ttft_model:,.0f})" if times.ttft_model is not None else ""
    load = f"load {times.load:,.0f} apart" if times.load is not None else ""
    lines.append(f"first token{times.ttft_wall or 0:>8,.0f}  {first}  total {times.total or 0:,.0f}  {load}".rstrip())
    lines.append(f"memory     peak {size(report.memory.peak_bytes)}, weights {size(report.memory.weights_bytes)}")
    if report.compare:
        lines += _side_by_side(report, report.compare)
    if verbose:
        lines += _verbose(report)
    return [piece for line in lines for piece in _folded(line, width)]


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
    """Rows of every layer, tokens of every frame pair, settings, versions."""
    env = report.env
    return [
        *_wrapped("rows", [f"{layer}:{rows:,}" for layer, rows in report.pruning.layers]),
        *_wrapped("kept", [f"{n:,}" for n in report.pruning.kept_per_grid]),
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


def _tokens(count: int) -> str:
    return f"{count:,} token{'' if count == 1 else 's'}"


def encoding(show: Callable[..., None]) -> Callable[[str, int, int], None]:
    """A callback for `VideoQA.encode` that shows its progress."""
    named = {"encode": "encoding, frame", "layers": "encoding, layer"}
    return lambda stage, done, total: show(named[stage], done, total)


def print_stats(report: Report, verbose: bool = False) -> None:
    for line in stats_block(report, columns(), verbose):
        note(_paint(printable(line), "2"))


@contextmanager
def progress(active: bool) -> Iterator:
    """Shows a line of progress on stderr while a block runs, on a terminal only. Yields `show(what, done, total)`."""
    if not active or not sys.stderr.isatty():
        yield lambda what, done=0, total=0: None
        return
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("loading", spinner="line") as status:

        def show(what: str, done: int = 0, total: int = 0) -> None:
            status.update(f"{what} {done:,}/{total:,}" if total else what)

        yield show

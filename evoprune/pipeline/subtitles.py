"""Subtitles of the part of a video that is looked at, as text that stands in the prompt between the video and the question."""

from collections.abc import Sequence

from evoprune.errors import UsageError
from evoprune.language.tokenizer import Tokenizer
from evoprune.video.info import (
    AUTO_SUBTITLES,
    NO_SUBTITLES,
    NOTHING_SAID,
    PICTURE,
    VIDEO,
    PromptSubtitles,
    SubtitleLine,
    Subtitles,
    Video,
)
from evoprune.video.probe import read_subtitles
from evoprune.video.sampling import SamplingPlan

TITLE = "Subtitles:"
TOKEN_CHARACTERS = 16  # texts with more characters for each token are not encoded to be counted: it might take minutes


def check_one_file(choice: str, inputs: int) -> None:
    """Raises UsageError where one file of subtitles is given for several inputs."""
    if inputs > 1 and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        hint = "auto takes those beside each video, or in it"
        raise UsageError(f"{choice} holds the subtitles of one video, and there are {inputs} inputs", hint)


def check_picture(info: Video, choice: str) -> None:
    """Raises UsageError where a file of subtitles is given for a picture."""
    if info.kind == PICTURE and choice not in (NO_SUBTITLES, AUTO_SUBTITLES):
        raise UsageError(f"{info.path} is a picture, which has no subtitles", "leave them out, or give the video")


def prompt_subtitles(
    tokenizer: Tokenizer, info: Video, span: SamplingPlan, choice: str, max_tokens: int
) -> PromptSubtitles:
    """Reads the subtitles of a span of a video, and fits them into a number of tokens.

    Args:
        choice: "none", or as of `video.probe.read_subtitles`, whose errors this raises.
        max_tokens: with more, lines are left out, evenly over all.
    """
    if choice == NO_SUBTITLES:
        return NOTHING_SAID
    if info.kind == PICTURE:
        check_picture(info, choice)
        return PromptSubtitles(note=f"{info.path} is a picture")
    return fit(tokenizer, read_subtitles(info, choice, span.start_s, span.end_s), max_tokens)


def subtitles_of(inputs: Sequence[tuple[str, PromptSubtitles]]) -> str:
    """What the prompt has of the subtitles of inputs, each "video" or "picture": of several, under a line that says which it is."""
    if len(inputs) == 1:
        return inputs[0][1].text
    videos = [subtitles.text for kind, subtitles in inputs if kind == VIDEO]
    return "".join(f"Video {number}:\n{text}" for number, text in enumerate(videos, 1) if text)


def fit(tokenizer: Tokenizer, found: Subtitles, max_tokens: int) -> PromptSubtitles:
    """The most lines, evenly over all, that take at most `max_tokens`. No line is cut; longer ones than that are left out."""
    longest = TOKEN_CHARACTERS * max_tokens
    lines = [line for line in found.lines if len(line[2]) <= longest]
    # A line has more than one token, so this many are too many. Then the interval is halved.
    fits, too_many = 0, min(len(lines), max_tokens) + 1
    text, tokens = "", 0
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        block = as_text(_evenly(lines, count))
        needed = len(tokenizer.encode(block)) if len(block) <= longest else max_tokens + 1
        if needed <= max_tokens:
            fits, text, tokens = count, block, needed
        else:
            too_many = count
    return PromptSubtitles(text, found.source, len(found.lines), fits, tokens, tuple(found.warnings), found.note)


def as_text(lines: Sequence[SubtitleLine]) -> str:
    """The lines with their times, under a title, with an empty line at the end."""
    return "\n".join([TITLE, *(f"[{_time(start)}] {text}" for start, _, text in lines), "", ""])


def _time(seconds: float) -> str:
    """1:02:03 or 0:06: the second that has begun."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _evenly(lines: Sequence[SubtitleLine], count: int) -> list[SubtitleLine]:
    """The middle ones of `count` equal shares of the lines."""
    return [lines[(2 * i + 1) * len(lines) // (2 * count)] for i in range(count)]

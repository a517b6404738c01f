"""Moments as text for players and editors: subtitles, and chapters in FFmpeg's format of metadata; both in order of time."""

import re
from collections.abc import Iterable
from operator import attrgetter

from evoprune.moments.search import Moment
from evoprune.util import long_clock

SPECIAL = re.compile(r"[=;#\\\n]")  # characters that mean something in FFmpeg's metadata


def srt(moments: Iterable[Moment]) -> str:
    """Return subtitles (SRT) that show the query of each moment, and its score, while it lasts."""
    blocks = []
    for number, moment in enumerate(_in_order(moments), 1):
        times = f"{_srt_time(moment.start_s)} --> {_srt_time(moment.end_s)}"
        blocks.append(f"{number}\n{times}\n{_line(moment.query)} ({moment.score:.2f})\n")
    return "\n".join(blocks)


def chapters(moments: Iterable[Moment]) -> str:
    """Return FFmpeg's metadata with a chapter for each moment, whose title is the query."""
    lines = [";FFMETADATA1"]
    for moment in _in_order(moments):
        title = SPECIAL.sub(r"\\\g<0>", moment.query)
        lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={round(1000 * moment.start_s)}"]
        lines += [f"END={round(1000 * moment.end_s)}", f"title={title}"]
    return "\n".join(lines) + "\n"


def _in_order(moments: Iterable[Moment]) -> list[Moment]:
    return sorted(moments, key=attrgetter("start_s", "end_s"))


def _srt_time(seconds: float) -> str:
    return long_clock(seconds).replace(".", ",")


def _line(text: str) -> str:
    """Return a text as one line that no reader takes for times."""
    return " ".join(text.split()).replace("-->", "->")

"""Formats moments for video players and editors, as SRT subtitles or as chapters in FFmpeg's metadata format."""

import re
from collections.abc import Iterable
from itertools import chain, pairwise
from operator import attrgetter

from evoprune.moments import Moment
from evoprune.util import long_clock

SPECIAL = re.compile(r"[=;#\\\n]")  # characters that must be escaped in FFmpeg metadata
NO_MOMENT = "-"  # title of the chapters between moments


def srt(moments: Iterable[Moment]) -> str:
    """Return SRT subtitles that show each moment's query and score for the duration of the moment."""
    blocks = []
    for number, moment in enumerate(_in_order(moments), 1):
        times = f"{_srt_time(moment.start_s)} --> {_srt_time(moment.end_s)}"
        blocks.append(f"{number}\n{times}\n{_line(moment.query)} ({moment.score:.2f})\n")
    return "\n".join(blocks)


def chapters(moments: Iterable[Moment], duration_s: float | None = None) -> str:
    """Return chapters in FFmpeg's metadata format, without gaps, because MP4 doesn't allow gaps between chapters.

    A chapter's title is its moment's query. If moments overlap, their queries are joined with " + ". Chapters between moments are
    titled `NO_MOMENT`. If there are no moments, there are no chapters.

    Args:
        duration_s: The video duration in seconds. If None, the last chapter ends with the last moment.
    """
    spans = [(round(1000 * each.start_s), round(1000 * each.end_s), each.query) for each in _in_order(moments)]
    lines = [";FFMETADATA1"]
    if spans:
        borders = {0, *chain.from_iterable(span[:2] for span in spans)}
        if duration_s is not None:
            borders.add(max(*borders, round(1000 * duration_s)))
        for start, end in pairwise(sorted(borders)):
            shown = dict.fromkeys(query for first, stop, query in spans if first <= start < stop)
            title = SPECIAL.sub(r"\\\g<0>", " + ".join(shown) or NO_MOMENT)
            lines += ["[CHAPTER]", "TIMEBASE=1/1000", f"START={start}", f"END={end}", f"title={title}"]
    return "\n".join(lines) + "\n"


def _in_order(moments: Iterable[Moment]) -> list[Moment]:
    return sorted(moments, key=attrgetter("start_s", "end_s"))


def _srt_time(seconds: float) -> str:
    return long_clock(seconds).replace(".", ",")


def _line(text: str) -> str:
    """Return text as a single line without "-->", which SRT would interpret as a time range."""
    return " ".join(text.split()).replace("-->", "->")

"""Parses WebVTT and ASS, and removes markup from the text of subtitles.

Subtitle files are untrusted. All regular expressions take linear time, and errors in a file affect only the cue that contains them.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from html import unescape

# A WebVTT timing line. Everything after the second time consists of settings, which do not matter here.
STAMP = r"(?:([0-9]{1,9}):)?([0-5][0-9]):([0-5][0-9])\.([0-9]{3})(?![0-9])"
WEBVTT_TIMES = re.compile(rf"[ \t\f]*+{STAMP}[ \t\f]*+-->[ \t\f]*+{STAMP}")
ASS_TIME = re.compile(r"[ \t]*+([0-9]{1,4}):([0-9]{1,2}):([0-9]{1,2})\.([0-9]{2})[ \t]*+")
# `REFERENCE` matches character references as in HTML, where the semicolon is optional. In SRT, only references with a semicolon are
# replaced, because the format does not define any.
NAME = r"&(?:#[0-9]{1,32}|#[xX][0-9a-fA-F]{1,32}|[a-zA-Z][a-zA-Z0-9]{0,31})"
REFERENCE = re.compile(f"{NAME};?")
WHOLE_REFERENCE = re.compile(f"{NAME};")
# Names of the fields of an event in ASS, in the order that applies if there is no `Format:` line.
ASS_FIELDS = ("layer", "start", "end", "style", "name", "marginl", "marginr", "marginv", "effect", "text")


def webvtt_cues(text: str) -> Iterator[tuple[float, float, str]]:
    """Yield the start time, end time (both in seconds), and text with markup of each cue in a WebVTT file.

    This is the parser of the standard: a line with an arrow always begins a cue, and an empty line always ends it. Everything
    outside cues is ignored, such as the header, cue identifiers, comments, and styles. A cue with invalid times is left out.
    """
    times = None
    lines: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line and "-->" not in line:
            lines.append(line)
            continue
        if times:
            yield *times, "\n".join(lines)
        lines = []
        times = _webvtt_times(line) if line else None


def _webvtt_times(line: str) -> tuple[float, float] | None:
    found = WEBVTT_TIMES.match(line)
    if not found:
        return None
    numbers = [int(number or 0) for number in found.groups()]
    start, end = (
        hours * 3600 + minutes * 60 + seconds + thousandths / 1000
        for hours, minutes, seconds, thousandths in (numbers[:4], numbers[4:])
    )
    return start, max(start, end)


def webvtt_text(text: str) -> str:
    """Remove the tags from the text of a WebVTT cue, and replace its character references. A `<` without `>` is kept."""
    tagged, last, rest = text.rpartition(">")
    # Every `<` before the last `>` ends at a `>`, so that the search takes linear time.
    plain = re.sub("<[^>]*>", "", tagged + last) + rest
    return REFERENCE.sub(lambda found: unescape(found[0]), plain)


@dataclass(frozen=True)
class EventFormat:
    """The order of the fields in the events of an ASS or SSA file.

    Fields are separated by commas. The text is usually the last field, and is the only field that may contain commas.
    """

    names: tuple[str, ...] = ASS_FIELDS  # in lower case

    @classmethod
    def of(cls, line: str) -> "EventFormat | None":
        """Read a line of an ASS file. Returns None unless it is a `Format:` line that names the times and the text of events."""
        kind, _, fields = line.partition(":")
        names = tuple(name.strip().lower() for name in fields.split(",")) if kind == "Format" else ()
        return cls(names) if {"start", "end", "text"} <= set(names) else None

    @classmethod
    def of_track(cls, header: str) -> "EventFormat":
        """Return the order of the fields in a track's packets: a number, the layer, and the other fields except for the times.

        Args:
            header: The beginning of the ASS file, which Matroska stores in the track's header.
        """
        found = list(filter(None, map(cls.of, header.splitlines())))
        names = found[-1].names if found else ASS_FIELDS
        return cls(("number", "layer", *(name for name in names if name not in ("layer", "marked", "start", "end"))))

    @cached_property
    def text(self) -> int:
        """Index of the text."""
        return self.names.index("text")

    def split(self, event: str) -> list[str] | None:
        """Split an event into one value per field. Returns None if fields are missing."""
        values = event.split(",", self.text)
        after = len(self.names) - 1 - self.text
        if after:
            values[-1:] = values[-1].rsplit(",", after)
        return values if len(values) == len(self.names) else None


def ass_cues(text: str) -> Iterator[tuple[str, float | None, float | None, str]]:
    """Yield each event of an ASS or SSA file as a tuple (line, start, end, text with markup).

    Times are in seconds, or None if they have an unsupported format. Events with missing fields are left out.
    """
    fields = EventFormat()
    for line in text.split("\n"):
        fields = EventFormat.of(line) or fields
        kind, _, event = line.partition(":")
        values = fields.split(event) if kind == "Dialogue" else None
        if values:
            start, end = (_ass_time(values[fields.names.index(name)]) for name in ("start", "end"))
            yield line, start, end, values[fields.text]


def _ass_time(text: str) -> float | None:
    found = ASS_TIME.fullmatch(text)
    if not found:
        return None
    hours, minutes, seconds, hundredths = map(int, found.groups())
    return hours * 3600 + minutes * 60 + seconds + hundredths / 100


def ass_text(text: str, *, hidden: bool = True) -> str:
    """Remove the markup from the text of an event, as stored in ASS or as written by FFmpeg's decoders.

    Args:
        hidden: Whether all text in braces is removed, as in ASS files. Otherwise, only markup is removed.
    """
    drawing = False
    pieces = []
    # FFmpeg writes \{{} for a literal brace. Replace it with a null character, which never occurs in text, until the markup has
    # been removed.
    for piece in re.split(r"(\{[^{}]*\})", text.replace("\\{{}", "\0")):
        if piece.startswith("{") and piece.endswith("}") and (hidden or piece.startswith("{\\")):
            # \p1 and higher switch to drawing commands, and \p0 switches back to text.
            if mode := re.search(r"\\p(\d)", piece):
                drawing = mode[1] != "0"
        elif not drawing:
            pieces.append(piece)
    broken = re.sub(r"\\[Nn]", "\n", "".join(pieces)).replace("\\h", " ")
    return broken.replace("\\\u2060", "\\").replace("\0", "{")  # FFmpeg puts a word joiner after a literal backslash


def srt_text(text: str) -> str:
    """Remove the markup from the text of an SRT cue, as decoded by FFmpeg, and replace its character references."""
    return WHOLE_REFERENCE.sub(lambda found: unescape(found[0]), ass_text(text, hidden=False))


def in_lines(text: str) -> list[str]:
    """Split text into lines without superfluous blanks. Empty lines are left out."""
    return [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]

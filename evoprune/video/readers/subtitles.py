"""Reads subtitles from files next to a video and from a video's text tracks. Image subtitles are rejected.

FFmpeg reads containers and SRT. WebVTT and ASS are read by subtitle_text.py, because FFmpeg's WebVTT reader stops at the first
block without times, and its ASS reader ignores the file's own order of fields.
"""

import io
import os
import re
import stat
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.subtitles.stream import SubtitleStream

from evoprune.errors import LFS, LFS_HINT, VideoError
from evoprune.files import FileMemo
from evoprune.util import missing_hint, shorten, shown
from evoprune.video.info import SubtitleLine, Subtitles
from evoprune.video.input_files import Folder
from evoprune.video.reader_table import FILES, reader_at
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.subtitle_text import (
    EventFormat,
    ass_cues,
    ass_text,
    in_lines,
    srt_text,
    webvtt_cues,
    webvtt_text,
)

Cue = tuple[float, float, list[str]]  # start and end in seconds from the first frame, and lines of text

TEXT_CODECS = ("subrip", "ass", "ssa", "webvtt", "mov_text", "text")
# Maximum size in bytes of a subtitle file, and of all text in a track. A movie's subtitles take about 0.1 MB. Converting text to
# JSON may increase its size sixfold.
MAX_BYTES = 10 * 2**20
LONGEST_LINE = 4000  # in bytes; FFmpeg splits longer lines of an SRT file, even in the middle of a character
DAMAGED = "damaged_subtitles"
HEAD_BYTES = 4096
# Matches runs of accented letters that are too long for Western European words. Such runs appear if text in another script is
# decoded as cp1252.
NO_WESTERN_WORD = re.compile(r"[^\W\d_\x00-\x7f]{4}")
MARKS = {BOM_UTF8: "utf-8-sig", BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}  # encodings by byte order mark
# `TIMES` matches timing lines of SRT and WebVTT in any notation, whereas `SRT_TIMES` matches only timing lines that FFmpeg parses
# correctly. FFmpeg interprets the digits after the seconds as thousandths, regardless of the number of digits, and treats other
# timing lines as text.
TIMES = re.compile(r"^[ \t]*+-?[0-9]++:[0-9:,.; \t]*+(?:[-–—=][-–—= ]*+(?:>|&gt;)|→)[ \t]*+-?[0-9]++:.*+", re.MULTILINE)
CLOCK = r"[0-9]{1,4}:[0-9]{1,2}:[0-9]{1,2}"
SRT_TIMES = re.compile(rf"[ \t]*+{CLOCK}[,.][0-9]{{3}}[ \t]*+-->[ \t]*+{CLOCK}[,.][0-9]{{3}}(?![0-9]).*")
EXAMPLES = {"ass": "0:00:01.50", "srt": "00:00:01,500 --> 00:00:02,000", "webvtt": "00:00:01.500 --> 00:00:02.000"}
HINT = "give a file in SRT, WebVTT or ASS, saved as UTF-8, or a video with a text track; or leave subtitles out"

# Each span of a video needs the same subtitles, so they are kept until a file changes.
_parsed: FileMemo[Subtitles] = FileMemo(2)
_clock_starts: FileMemo[float] = FileMemo(2)
_names: FileMemo[list[str]] = FileMemo(1)  # names in the folder of the latest video


def read(path: str, origin_s: float, choice: str, start_s: float, end_s: float) -> Subtitles:
    """Read a video's subtitles. See `evoprune.video.frames.read_subtitles`.

    Args:
        origin_s: Timestamp of the first video frame on the file's own clock, in seconds.
    """
    file = choice
    why = None
    if choice == "auto":
        try:
            file, why = _beside(path)
        except OSError as error:
            file, why = None, f"the video's folder cannot be listed: {error.strerror}"
    try:
        if file is not None:
            if os.path.realpath(file) != os.path.realpath(path):
                origin_s -= _clock_starts.get(path, lambda: _clock_start(path))
            subtitles = _parsed.get(file, lambda: _from_file(file, origin_s), also=(origin_s, file))
            if subtitles.source is None:
                raise VideoError(f"no subtitles in {file}: {subtitles.note}", HINT)
        elif (reader := reader_at(path)) is not FILES:
            subtitles = Subtitles(note=why or f"no file next to it, and {reader.noun} has no text track")
        else:
            subtitles = _parsed.get(path, lambda: _from_container(path, origin_s, ""), also=(origin_s, None))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        hint = missing_hint(file, HINT) if file else HINT
        problem = f"cannot read subtitles from {shown(file or path)}: {ffmpeg.reason(error)}"
        raise VideoError(problem, hint) from error
    if subtitles.source is None:
        return Subtitles(note=why or subtitles.note)
    lines = [line for line in subtitles.lines if line[0] < end_s and (line[1] > start_s or line[0] >= start_s)]
    return Subtitles(subtitles.source, lines, subtitles.warnings)


def _beside(path: str) -> tuple[str | None, str | None]:
    """Find the subtitle file next to a video.

    A file with the same name as the video is preferred. Otherwise, if exactly one file has a language tag after the video's name,
    that file is used.

    Returns:
        (path, None) if a file was found, (None, reason) if the choice is ambiguous, or (None, None) if there is no subtitle file.
    """
    exact, others = Folder.subtitles_beside(path, lambda folder: _names.get(folder, lambda: os.listdir(folder)))
    if exact:
        return exact[0], None
    if len(others) == 1:
        return others[0], None
    if others:
        return None, f"{len(others)} files next to the video differ in language; choose one"
    return None, None


def _clock_start(path: str) -> float:
    """Return the time on a video's own clock, in seconds, at which players start playback.

    Playback begins with the earliest stream, which may be the audio.
    """
    if reader_at(path) is not FILES:
        return 0.0
    with ffmpeg.open_video(path) as container:
        return (container.start_time or 0) / av.time_base


def _from_file(file: str, origin_s: float) -> Subtitles:
    try:
        status = os.stat(file)
    except FileNotFoundError:
        hint = missing_hint(file, "check the path; auto looks for one next to the video")
        raise VideoError(f"no such subtitle file: {shown(file)}", hint) from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{file} is not a subtitle file", HINT)
    with open(file, "rb") as opened:
        content = opened.read(HEAD_BYTES)
        if b"\0" in content and not content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) and _format(content) != "webvtt":
            return _from_container(file, origin_s, f"{file}, ")
        content += opened.read(MAX_BYTES + 1 - len(content))
    if len(content) > MAX_BYTES:
        hint = "is it a subtitle file? then split it"
        raise VideoError(f"{file} is larger than {MAX_BYTES // 2**20} MiB", hint)
    text, warnings = _decoded(content, file)
    text = re.sub("\r{1,2}\n|\r", "\n", text)
    name = _format(content)
    if name != "webvtt" and "\0" in text:
        raise VideoError(f"{file} is not text", HINT)
    readers = {"webvtt": _webvtt, "ass": _ass, "srt": _srt}
    lines = _lines(_limited(readers[name](text, file, origin_s, warnings)))
    if not lines:
        if content.startswith(LFS):
            raise VideoError(f"{file} is a git-lfs pointer", LFS_HINT)
        raise VideoError(f"{file} contains no subtitles", HINT)
    return Subtitles(file, lines, warnings)


def _format(content: bytes) -> str:
    """Return FFmpeg's name for a subtitle file's format: "webvtt", "ass", or "srt" if the file has no known beginning."""
    start = content[:HEAD_BYTES].decode(_encoding(content), "replace").lstrip()[:16].lower()
    if start.startswith("webvtt"):
        return "webvtt"
    return "ass" if start.startswith("[script info]") else "srt"


def _encoding(content: bytes) -> str:
    """Return the encoding that a file's byte order mark declares, or UTF-8."""
    return next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")


def _decoded(content: bytes, file: str) -> tuple[str, list[str]]:
    """Decode a subtitle file. Returns the text and the warnings.

    Invalid bytes are replaced if the file has a byte order mark, or if it has more valid than invalid non-ASCII characters in
    UTF-8. All other files that are not UTF-8 are read as Windows-1252.
    """
    encoding = _encoding(content)
    try:
        return content.decode(encoding), []
    except UnicodeDecodeError as error:
        text = content.decode(encoding, "replace")
        invalid = text.count("\ufffd") - content.count("\ufffd".encode())
        if encoding != "utf-8" or len(text) - len(text.encode("ascii", "ignore")) > 2 * invalid:
            return text, [DAMAGED]
        text = content.decode("cp1252", "replace")
        proper = re.sub(r"[\n\r\t\xa0\xad]", "", text).isprintable() and "\ufffd" not in text
        if not proper or NO_WESTERN_WORD.search(text):
            raise VideoError(f"{file} is neither UTF-8 nor another recognizable encoding", HINT) from error
        return text, ["subtitles_encoding"]


def _unsupported_times(name: str, file: str, line: str) -> VideoError:
    return VideoError(
        f"the subtitles in {file} have times in an unsupported format: {shorten(line.strip(), 60)}",
        f"write times like {EXAMPLES[name]}",
    )


def _webvtt(text: str, file: str, origin_s: float, warnings: list[str]) -> Iterator[Cue]:
    """Yield the cues of a WebVTT file. Cues with invalid times are left out, as in browsers, and a warning is added.

    Raises:
        VideoError: The file contains times, but none of them are valid.
    """
    cues = 0
    for start, end, said in webvtt_cues(text.replace("\0", "\ufffd")):
        cues += 1
        yield start - origin_s, end - origin_s, in_lines(webvtt_text(said))
    times = TIMES.findall(text)
    if times and not cues:
        raise _unsupported_times("webvtt", file, times[0])
    if len(times) > cues and DAMAGED not in warnings:
        warnings.append(DAMAGED)


def _ass(text: str, file: str, origin_s: float, warnings: list[str]) -> Iterator[Cue]:
    """Yield the cues of an ASS or SSA file. Raises VideoError if a time has an unsupported format."""
    for line, start, end, said in ass_cues(text):
        if start is None or end is None:
            raise _unsupported_times("ass", file, line)
        yield start - origin_s, max(start, end) - origin_s, in_lines(ass_text(said))


def _srt(text: str, file: str, origin_s: float, warnings: list[str]) -> Iterator[Cue]:
    """Yield the cues of an SRT file. Raises VideoError if FFmpeg would misread a timing line or split a long line."""
    lines = [
        line.rstrip() for line in text.split("\n")
    ]  # FFmpeg ends a cue at a line of spaces, but not at an empty line
    text = "\n".join(lines)
    if max(map(len, text.encode().split(b"\n"))) > LONGEST_LINE:
        hint = "is it a subtitle file? then break the line"
        raise VideoError(f"{file} has a line of more than {LONGEST_LINE:,} bytes", hint)
    for line in TIMES.findall(text):
        if not SRT_TIMES.fullmatch(line):
            raise _unsupported_times("srt", file, line)
    with ffmpeg.open_bytes(io.BytesIO(text.encode()), "srt") as container:
        yield from _cues(container, container.streams.subtitles[0], origin_s, warnings)


def _from_container(path: str, origin_s: float, prefix: str) -> Subtitles:
    """Read a container's default text track or, if there isn't one, its only text track. If this fails, `note` explains why."""
    with ffmpeg.open_video(path) as container:
        tracks = list(enumerate(container.streams.subtitles, 1))
        texts = [(number, track) for number, track in tracks if _codec(track) in TEXT_CODECS]
        default = [pair for pair in texts if pair[1].disposition & Disposition.default]
        if not default and len(texts) != 1:
            note = "no file next to the video, and no text track in it"
            if tracks:
                note = (
                    "its subtitles are images, which are not supported; convert them to text, e.g. with Subtitle Edit"
                )
            if texts:
                note = f"{len(texts)} text tracks, none of them marked as default; extract one, e.g. with ffmpeg"
            return Subtitles(note=note)
        number, stream = (default or texts)[0]
        # The index of an MP4 or MOV lets FFmpeg skip the packets of other tracks.
        if container.format.name == ffmpeg.MOV:
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
        if container.format.name == "srt":
            raise VideoError(f"{path} is not text", HINT)
        warnings = []
        cues = list(_limited(_cues(container, stream, origin_s, warnings)))
        name = f"{prefix}track {number}"
        if stream.language:
            name += f" ({stream.language})"
    return Subtitles(name, _lines(cues), warnings)


def _codec(stream: SubtitleStream) -> str | None:
    return stream.codec_context and stream.codec_context.codec.canonical_name


def _cues(container: InputContainer, stream: SubtitleStream, origin_s: float, warnings: list[str]) -> Iterator[Cue]:
    """Yield the cues of a track. If a packet cannot be decoded, a warning is added to `warnings`."""
    # Using Fraction would double the run time
    tick, per = (
        stream.time_base.numerator,
        stream.time_base.denominator,
    )
    text_of = _text_reader(stream)
    for packet in ffmpeg.packets(container, stream, every_stream=True):
        if packet is not None and (packet.pts is None or not packet.size):
            continue
        text = None
        with suppress(av.error.FFmpegError, UnicodeDecodeError):
            text = packet and text_of(packet)
        if text is None:
            if DAMAGED not in warnings:
                warnings.append(DAMAGED)
            continue
        start = packet.pts * tick / per - origin_s
        end = start + max(0, packet.duration or 0) * tick / per
        yield start, end, in_lines(text)


def _text_reader(stream: SubtitleStream) -> Callable[[Packet], str | None]:
    """Return a function that extracts a packet's text without markup, or returns None if the packet is damaged."""
    codec = _codec(stream)
    if codec == "webvtt":
        return lambda packet: webvtt_text(bytes(packet).decode())
    if codec in ("ass", "ssa"):
        fields = EventFormat.of_track((stream.codec_context.extradata or b"").decode("utf-8", "replace"))

        def event(packet: Packet) -> str | None:
            values = fields.split(bytes(packet).decode())
            return values and ass_text(values[fields.text])

        return event

    def decoded(packet: Packet) -> str:
        if codec == "subrip":  # FFmpeg ends the text at an empty line
            packet = Packet(re.sub(rb"\n\s+", b"\n", bytes(packet)))
        texts = [cue.ass.split(b",", 8)[-1].decode("utf-8", "replace") for cue in stream.codec_context.decode(packet)]
        return "\n".join(srt_text(text) if codec == "subrip" else ass_text(text, hidden=False) for text in texts)

    return decoded


def _limited(cues: Iterable[Cue]) -> Iterator[Cue]:
    """Yield cues as long as their text fits into `MAX_BYTES`. Otherwise, raise VideoError."""
    size = 0
    for start, end, lines in cues:
        size += sum(len(line.encode()) for line in lines) + 24  # overhead of a cue in addition to its text
        if size > MAX_BYTES:
            hint = "give a file with only the subtitles you need"
            raise VideoError(f"the subtitles are larger than {MAX_BYTES // 2**20} MiB", hint)
        yield start, end, lines


def _lines(cues: Iterable[tuple[float, float, list[str]]]) -> list[SubtitleLine]:
    """Convert cues to lines, sorted by start time. Repeated lines in rolling captions are merged into a single line."""
    lines: list[list] = []
    on_screen: dict[str, list] = {}  # maps text to the last line that contained it
    for start, end, texts in sorted(cues, key=lambda cue: cue[:2]):
        ffmpeg.alive()
        new = []
        for text in texts:
            before = on_screen.get(text)
            # If the same text reappears within 50 ms, it is the same line, because editors leave at least two frames between lines.
            if before is None or before[1] + 0.05 < start:
                new.append(text)
            else:
                before[1] = max(before[1], end)
        if new:
            lines.append([start, end, " ".join(new)])
            on_screen |= dict.fromkeys(new, lines[-1])
    return [(start, end, text) for start, end, text in lines]

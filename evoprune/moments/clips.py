"""Clips: parts of a video as files of their own."""

import os
import secrets
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from evoprune.errors import EvopruneWarning, UsageError
from evoprune.util import is_url, long_clock
from evoprune.video import CLIP_ENDINGS, HINT, PICTURE, Crash, Video, duration_of, span_of, stream_clip

UNFINISHED = ".part"  # how the name of a clip ends while it is written, behind eight hexadecimal digits
WITHOUT_SOUND = "the file was joined of several, or FFmpeg has no decoder for the sound"
LONGEST_STEM = 50  # characters of a video's name in a clip's, of up to four bytes each


@dataclass(frozen=True)
class Clip:
    """Tell where a clip is, and where it begins in the video, in seconds from the first frame."""

    path: str
    start_s: float


def cut_clip(
    info: Video,
    start_s: float,
    end_s: float,
    folder: str,
    *,
    exact: bool = False,
    title: str = "",
    named_after: str | None = None,
) -> Clip:
    """Write a part of a video into a file of its own, such as film-00-01-02.500.mp4, completely or not at all.

    Packets are copied as they are, from the last keyframe on that is shown at `start_s` or before. So is the sound, unless the file
    format cannot hold it: then it becomes AAC. The file is an MP4, or a Matroska file where players do not expect the codecs in an
    MP4. If there is a file of its name, -2 or more is added. An `EvopruneWarning` says that a clip loses its sound.

    Args:
        info: of `probe`, of a video file.
        start_s, end_s: seconds from the first frame. An end after the video's is the video's end.
        folder: where the clip goes. It is made, with its parents, unless it is there.
        exact: begin and end at these times: the frames are re-encoded, upright and in SDR, as a model sees them; as H.264, or as
            MPEG-4 where PyAV has no encoder of that. The file is an MP4; sound that players do not expect there becomes AAC.
        title: kept in the file.
        named_after: a path or address in place of the video's, for the name.

    Raises:
        UsageError: the start is below 0 or not before the end, or the clip cannot be written.
        VideoError: a picture or a folder; a start after the video's end; packets that cannot be copied; or as
            `isolation.run_task`.
    """
    if not 0 <= start_s < end_s:
        hint = "begin at 0 s, the first frame, or later, and end after that"
        raise UsageError(f"a clip cannot go from {start_s:g} s to {end_s:g} s", hint)
    if info.kind != PICTURE:  # which has no length, and is refused by the reader
        start_s, end_s = span_of(duration_of(info), start_s, end_s)
    how = {"start_s": start_s, "end_s": end_s, "exact": exact, "title": title}
    name = clip_name(named_after or info.path, start_s)
    try:
        with _unfinished(folder, name) as file:
            try:
                facts = _write(info, how, file)
            except Crash:  # in a new process, as an earlier video may have caused it
                file.seek(0)
                file.truncate()
                facts = _write(info, how, file)
            if facts["loses_sound"]:
                warnings.warn(
                    f"{info.path}: its sound is left out of clips ({WITHOUT_SOUND})", EvopruneWarning, stacklevel=2
                )
            file.close()
            return Clip(_placed(file.name, folder, name, facts["ending"]), facts["start_s"])
    except OSError as problem:
        hint = "free some space, or name another folder"
        raise UsageError(f"cannot write a clip into {folder}: {problem.strerror}", hint) from problem


def clip_name(video: str, start_s: float) -> str:
    """Return the name of a clip, without its ending: the video's, and the time in hours, minutes, seconds and milliseconds."""
    name = os.path.basename(os.path.normpath(video))
    if is_url(video):
        name = os.path.basename(urlsplit(video).path)
    stem = os.path.splitext(name)[0][:LONGEST_STEM] or "clip"
    return f"{stem}-{long_clock(start_s).replace(':', '-')}"


@contextmanager
def _unfinished(folder: str, name: str) -> Iterator[BinaryIO]:
    """Provide a new file, which is removed afterwards unless it has got another name."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.{secrets.token_hex(4)}{UNFINISHED}")
    with open(path, "xb") as file:
        try:
            yield file
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _write(info: Video, how: dict[str, Any], file: BinaryIO) -> dict[str, Any]:
    """Write a clip as it is cut; return the facts about it."""
    with closing(stream_clip(info, how)) as pieces:
        facts = next(pieces)
        if facts["ending"] not in CLIP_ENDINGS:  # it becomes part of a name
            raise Crash(f"the decoder crashed on {info.path} (its answer is invalid)", HINT)
        for at, content in pieces:
            file.seek(at)
            file.write(content)
    return facts


def _placed(unfinished: str, folder: str, name: str, ending: str) -> str:
    """Give a file its name, or one with a number where that exists; return its path."""
    for number in count(1):
        added = "" if number == 1 else f"-{number}"
        path = os.path.join(folder, f"{name}{added}{ending}")
        with suppress(FileExistsError):
            open(path, "x").close()  # the name is this clip's from now on
            os.replace(unfinished, path)
            return path

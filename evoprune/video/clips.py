"""Cuts clips out of a video and saves them as separate files."""

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
from evoprune.video.info import CLIP_ENDINGS, Video, span_of
from evoprune.video.sandbox.isolation import HINT, Crash, stream_clip

UNFINISHED = ".part"  # file extension of an unfinished clip, preceded by eight hexadecimal digits
NO_SOUND_REASON = "the file consists of several joined files, or FFmpeg has no decoder for its sound"
# Maximum number of characters to copy from the video's name into a clip's name. Each character may take up to four bytes.
LONGEST_STEM = 50


@dataclass(frozen=True)
class Clip:
    """A video clip that has been saved to a file."""

    path: str
    start_s: float  # start of the clip, in seconds from the video's first frame


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
    """Save part of a video to a new file whose name includes the start time, such as film-00-01-02.500.mp4.

    If a file with this name already exists, a number is appended to the name, starting with -2. If writing fails, the incomplete
    file is deleted.

    By default, packets are copied without re-encoding, starting at the last keyframe displayed at or before `start_s`. The audio is
    copied as well, or converted to AAC if the clip's container does not support its codec. The clip is saved as an MP4 file, or as
    a Matroska file if the video uses a codec that players do not expect in an MP4. An `EvopruneWarning` is issued if the audio has
    to be dropped.

    Args:
        info: The result of `probe` for a video file.
        start_s, end_s: Start and end of the clip in seconds from the video's first frame. If `end_s` is later than the end of the
            video, the clip ends with the video.
        folder: Folder to write the clip to. The folder and its parents are created if they do not exist.
        exact: If True, re-encode the video so that the clip begins and ends exactly at these times. The result is an MP4 with
            frames as a model sees them (upright and in SDR), encoded as H.264, or as MPEG-4 if PyAV has no H.264 encoder. The audio
            is converted to AAC if players do not expect its codec in an MP4.
        title: Title to store in the clip's metadata.
        named_after: Path or URL from which to derive the clip's file name. Defaults to the video's path.

    Raises:
        UsageError: The start time is negative or not before the end time, or the clip cannot be written.
        VideoError: The input is a still image or a folder, the clip would start after the end of the video, or the video's packets
            cannot be copied. See also `isolation.run_task`.
    """
    if not 0 <= start_s < end_s:
        hint = "start at 0 s (the first frame) or later, and end after the start"
        raise UsageError(f"a clip cannot go from {start_s:g} s to {end_s:g} s", hint)
    if not info.is_picture:  # an image has no length, and the reader will reject it
        start_s, end_s = span_of(info.length_s, start_s, end_s)
    how = {"start_s": start_s, "end_s": end_s, "exact": exact, "title": title}
    name = clip_name(named_after or info.path, start_s)
    try:
        with _unfinished(folder, name) as file:
            try:
                facts = _write(stream_clip(info, how), info, file)
            except Crash:  # try again in a new process, because an earlier video may have caused the crash
                file.seek(0)
                file.truncate()
                facts = _write(stream_clip(info, how, fresh=True), info, file)
            if facts["loses_sound"]:
                warnings.warn(f"{info.path}: clips have no sound ({NO_SOUND_REASON})", EvopruneWarning, stacklevel=2)
            file.close()
            return Clip(_placed(file.name, folder, name, facts["ending"]), facts["start_s"])
    except OSError as problem:
        hint = "free some space, or choose another folder"
        raise UsageError(f"cannot write a clip to {folder}: {problem.strerror}", hint) from problem


def clip_name(video: str, start_s: float) -> str:
    """Return a clip's file name without its extension: the video's name plus the start time in hours, minutes, and seconds."""
    name = os.path.basename(os.path.normpath(video))
    if is_url(video):
        name = os.path.basename(urlsplit(video).path)
    stem = os.path.splitext(name)[0][:LONGEST_STEM] or "clip"
    return f"{stem}-{long_clock(start_s).replace(':', '-')}"


@contextmanager
def _unfinished(folder: str, name: str) -> Iterator[BinaryIO]:
    """Create and yield a temporary file for a clip. The file is deleted on exit unless it has been renamed."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"{name}.{secrets.token_hex(4)}{UNFINISHED}")
    with open(path, "xb") as file:
        try:
            yield file
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)


def _write(stream: Iterator, info: Video, file: BinaryIO) -> dict[str, Any]:
    """Write a clip from `stream_clip` to a file piece by piece. Returns the clip's facts (see `cutting.ClipReader`)."""
    with closing(stream) as pieces:
        facts = next(pieces)
        if facts["ending"] not in CLIP_ENDINGS:  # must be validated, because it becomes part of a file name
            raise Crash(f"the decoder crashed on {info.path} (its answer is invalid)", HINT)
        for at, content in pieces:
            file.seek(at)
            file.write(content)
    return facts


def _placed(unfinished: str, folder: str, name: str, ending: str) -> str:
    """Move a finished clip to its final name, adding a number if that name is already taken. Returns the final path."""
    for number in count(1):
        added = "" if number == 1 else f"-{number}"
        path = os.path.join(folder, f"{name}{added}{ending}")
        with suppress(FileExistsError):
            open(path, "x").close()  # reserve the name
            os.replace(unfinished, path)
            return path

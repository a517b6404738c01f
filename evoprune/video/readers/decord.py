"""Frames of a file by decord: front to back only, and refused where decord is known to be wrong.

decord addresses frames by number, and after a jump its numbers are wrong (`get_batch`, `seek_accurate` and `skip_frames` alike)
wherever groups of pictures are open (x265's default), refreshed gradually, or stored out of order in AVI. What it returns in
sequence is right, so every frame up to the last one needed is decoded and converted.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import ModuleType

import numpy as np
from av.video.format import VideoFormat

from evoprune.backend import available_cores
from evoprune.errors import UsageError, VideoError
from evoprune.video.info import Video
from evoprune.video.readers import colour, ffmpeg, pyav

# In other containers it does not return to the beginning (MPEG-TS), or it does not open them at all.
CONTAINERS = (ffmpeg.MOV, "matroska,webm", "avi", "flv")
# Mean difference from PyAV's first frame, in levels of 255, above which it is another frame. 10-bit video and odd sizes
# differ by less than 2.
OTHER_FRAME = 8


def load() -> ModuleType:
    """Return the decord package, with its log output off. Raises UsageError if it is not installed, or does not load."""
    try:
        # PyAV is imported above, before decord: in the other order it would use decord's older libvpx.
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: its libraries are missing or do not load
        raise UsageError(f"decord cannot be loaded: {error}", "use decoder pyav, or pip install decord") from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def check(info: Video) -> None:
    """Raises VideoError for videos that decord cannot read, or would decode wrongly, as far as the metadata shows."""
    if info.codec == "av1":
        raise _refusal(info, "its FFmpeg has no decoder for AV1")
    if info.container not in CONTAINERS:
        raise _refusal(info, f"it does not read {info.container} reliably")
    if info.pix_fmt and colour.may_be_transparent(VideoFormat(info.pix_fmt)):
        raise _refusal(info, "it shows transparent parts as black")
    if info.hdr:
        raise _refusal(info, "it does not map HDR to SDR")
    if info.crop:
        raise _refusal(info, "it does not crop the pictures as the file says")
    if info.clock_restarts:
        raise _refusal(info, "it loses the frames after a restart of the clock")
    if info.mirrored and info.container == ffmpeg.MOV:
        raise _refusal(info, "it turns mirrored videos the wrong way")


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Read as `readers` says, without `damaged`. Raises VideoError also where decord stops at damage or returns other frames."""
    check(info)
    decord = load()
    with ffmpeg.reading(info.path), open(info.path, "rb") as file, _refusing(info):
        with ffmpeg.open_video(info.path) as container:
            matrix = ffmpeg.video_stream(container, info.path).codec_context.colorspace
        if matrix not in colour.USUAL:
            raise _refusal(info, "it takes its matrix of colours for another")
        # By number where the system can, because decord's FFmpeg takes some names for patterns; else by absolute path,
        # because it takes what precedes a colon for a protocol.
        name = f"/dev/fd/{file.fileno()}"
        if not os.path.exists(name):
            name = os.path.abspath(info.path)
        reader = decord.VideoReader(name, num_threads=ffmpeg.thread_count(available_cores()))
        stamps = _stamps(info, reader)
        # One float32 step more, because decord rounds its times to 32 bits.
        begins = stamps - np.spacing(stamps) - ffmpeg.TOLERANCE_S
        at = -1
        rgb = None
        for time in times_s:
            wanted = max(0, int(np.searchsorted(begins, time, side="right")) - 1)
            while at < wanted:
                frame = reader.next()
                if at < 0:
                    with closing(pyav.read(info, (0.0,), ffmpeg.ignore_damage)) as pictures:
                        right = next(pictures).rgb
                    if np.abs(_pixels(info, frame).astype(np.int16) - right).mean() > OTHER_FRAME:
                        raise _refusal(info, "it does not begin with the first frame")
                at = at + 1
                rgb = None
            if rgb is None:
                rgb = _pixels(info, frame)
            yield ffmpeg.Shown(float(stamps[at]), rgb)


def _refusal(info: Video, problem: str) -> VideoError:
    return VideoError(f"decord cannot read {info.path}: {problem}", "use decoder pyav")


@contextmanager
def _refusing(info: Video) -> Iterator[None]:
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # decord raises its own errors, AssertionError, StopIteration and others
        raise _refusal(info, "it does not open it, or stops at damage") from error


def _stamps(info: Video, reader) -> np.ndarray:
    """Return float32 `[frames]`: the time of each frame in seconds from the first, in display order."""
    stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    if len(stamps) == 1:
        return np.zeros_like(stamps)
    # decord counts from the first displayed frame, unless it includes frames that are never displayed. Missing times, as
    # in AVI and in very short Matroska files, are huge numbers.
    if abs(stamps[0]) > ffmpeg.TOLERANCE_S or np.any(np.diff(stamps) < 0):
        raise _refusal(info, "it does not know the times of the frames")
    return stamps


def _pixels(info: Video, frame) -> np.ndarray:
    # The calling program may have set a tensor bridge.
    rows = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
    # Frames of MP4 and related containers are rotated already.
    turn = 0 if info.container == ffmpeg.MOV else info.rotation_deg
    width, height = ffmpeg.turned_size((info.width, info.height), turn)
    if rows.shape[:2] != (height, width):
        raise _refusal(info, "the frames change their size")
    # Rows of slim rotated frames are padded, as if each pixel had more than three bytes.
    rgb = rows.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
    return ffmpeg.rotated(rgb, turn, info.mirrored)

"""Reads frames sequentially using decord. Files that decord is known to decode incorrectly are rejected.

decord addresses frames by number. After a seek (with `get_batch`, `seek_accurate`, or `skip_frames`), its frame numbers are wrong
for files with open groups of pictures (x265's default), gradual refresh, or AVI frames stored out of order. Only sequential reading
yields the correct frames, so every frame up to the last requested frame is decoded and converted.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import ModuleType

import numpy as np
from av.video.format import VideoFormat

from evoprune.backend import Host
from evoprune.errors import UsageError, VideoError
from evoprune.video.info import Video
from evoprune.video.readers import colour, ffmpeg, pyav

# Containers to read with decord. decord cannot return to the beginning of an MPEG-TS file and does not support any other
# containers.
CONTAINERS = (ffmpeg.MOV, ffmpeg.MATROSKA, ffmpeg.AVI, "flv")
# Maximum mean difference between decord's and PyAV's first frames, in levels from 0 to 255. A larger difference means that they are
# different frames. In 10-bit video and with odd frame sizes, the same frame may differ by up to 2.
OTHER_FRAME = 8


def load() -> ModuleType:
    """Import decord and disable its log output. Raises UsageError if decord is not installed or cannot be loaded."""
    try:
        # PyAV must be imported before decord (see above). Otherwise, PyAV would use decord's older version of libvpx.
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # raised if decord or one of its libraries is missing
        raise UsageError(f"decord cannot be loaded: {error}", "use decoder pyav, or pip install decord") from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def check(info: Video) -> None:
    """Raise VideoError if the metadata shows that decord cannot read a video or would decode it incorrectly."""
    if info.codec == "av1":
        raise _refusal(info, "its FFmpeg has no decoder for AV1")
    if info.container not in CONTAINERS:
        raise _refusal(info, f"it does not read {info.container} reliably")
    if info.pix_fmt and colour.may_be_transparent(VideoFormat(info.pix_fmt)):
        raise _refusal(info, "it shows transparent areas as black")
    if info.hdr:
        raise _refusal(info, "it does not map HDR to SDR")
    if info.crop:
        raise _refusal(info, "it ignores the crop that the file states")
    if info.interlaced:
        raise _refusal(info, "it does not deinterlace")
    if info.pixel_aspect:
        raise _refusal(info, "it takes all pixels for square")
    if info.clock_restarts:
        raise _refusal(info, "it loses the frames after the timestamps restart")
    if info.mirrored and info.container == ffmpeg.MOV:
        raise _refusal(info, "it rotates mirrored videos the wrong way")


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Yield the frame on screen at each requested time. See the docstring of the `readers` package.

    decord does not report damage, so `damaged` is never called. VideoError is raised if decord stops at damaged data or starts with
    the wrong frame.
    """
    check(info)
    decord = load()
    with ffmpeg.reading(info.path), open(info.path, "rb") as file, _refusing(info):
        with ffmpeg.open_video(info.path) as container:
            matrix = ffmpeg.video_stream(container, info.path).codec_context.colorspace
        if matrix not in colour.SUPPORTED_MATRICES:
            raise _refusal(info, "it uses the wrong color matrix")
        # If possible, open the file through its descriptor, because decord's FFmpeg interprets some file names as patterns.
        # Otherwise, use the absolute path, because FFmpeg would interpret the part of a relative path before a colon as a protocol.
        name = f"/dev/fd/{file.fileno()}"
        if not os.path.exists(name):
            name = os.path.abspath(info.path)
        reader = decord.VideoReader(name, num_threads=ffmpeg.thread_count(Host().available_cores()))
        stamps = _stamps(info, reader)
        # Add one float32 step to the tolerance, because decord rounds its times to float32.
        begins = stamps - np.spacing(stamps) - info.tolerance_s
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
                        raise _refusal(info, "it does not start with the first frame")
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
    except Exception as error:  # decord raises its own errors, AssertionError, StopIteration, and others
        raise _refusal(info, "it cannot open the file, or stops at damaged data") from error


def _stamps(info: Video, reader) -> np.ndarray:
    """Return all frame timestamps in seconds from the first frame, in display order, as float32 `[frames]`."""
    stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    if len(stamps) == 1:
        return np.zeros_like(stamps)
    # decord's first displayed frame has the timestamp 0, unless decord also lists frames that are never displayed. If the
    # timestamps are unknown, as in AVI and very short Matroska files, decord reports huge numbers.
    if abs(stamps[0]) > info.tolerance_s or np.any(np.diff(stamps) < 0):
        raise _refusal(info, "it does not report the times of the frames")
    return stamps


def _pixels(info: Video, frame) -> np.ndarray:
    # If the calling program has set a decord bridge, frames are tensors instead of decord's own arrays.
    rows = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
    # decord itself has already rotated the frames if the container is MP4 or MOV.
    turn = 0 if info.container == ffmpeg.MOV else info.rotation_deg
    width, height = ffmpeg.turned_size((info.width, info.height), turn)
    if rows.shape[:2] != (height, width):
        raise _refusal(info, "the frame size changes")
    # In narrow rotated frames, decord pads each row, as if a pixel had more than three bytes.
    rgb = rows.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
    return ffmpeg.rotated(rgb, turn, info.mirrored)

"""Frames of a file by decord: front to back only, and nothing where it is known to be wrong.

decord addresses frames by number, and after a jump its numbers are wrong wherever frames depend on others across a
keyframe (`get_batch`, `seek_accurate` and `skip_frames` alike). What it hands out in sequence is right, so every frame up
to the last one needed is decoded and converted.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import ModuleType

import numpy as np

from evoprune.errors import UsageError, VideoError
from evoprune.video.info import Damage, VideoInfo, ignored
from evoprune.video.readers import pyav
from evoprune.video.readers.container import MOV, TOLERANCE_S, reading
from evoprune.video.readers.pixels import turned

# In others it does not find back to the beginning (MPEG-TS), or does not open them at all.
CONTAINERS = (MOV, "matroska,webm", "avi", "flv")
# Mean difference from PyAV's first frame, in levels of 255, beyond which it is another frame: 10 bits and odd sizes make
# less than 2.
OTHER_FRAME = 8


def load() -> ModuleType:
    """The decord package, silenced.

    Raises:
        UsageError: it is not installed, or does not load.
    """
    try:
        # PyAV has been imported above, and must be: its libvpx would otherwise be mixed up with decord's older one.
        import decord
    except (ImportError, OSError, RuntimeError) as error:  # the latter two: its libraries are missing or do not load
        raise UsageError(f"decord cannot be loaded: {error}", "use --decoder pyav, or pip install decord") from error
    decord.logging.set_level(decord.logging.QUIET)
    return decord


def check(info: VideoInfo) -> None:
    """Refuse what decord cannot read, or would show wrongly, as far as the facts about the video tell.

    Raises:
        VideoError: with PyAV as the way out.
    """
    if info.codec == "av1":
        raise _refusal(info, "its FFmpeg has no decoder for AV1")
    if info.container not in CONTAINERS:
        raise _refusal(info, f"it does not read {info.container} reliably")
    if info.mirrored and info.container == MOV:
        raise _refusal(info, "it turns mirrored videos the wrong way")


def read(info: VideoInfo, times_s: Sequence[float], damaged: Damage = ignored) -> Iterator[tuple[float, np.ndarray]]:
    """The picture on screen at each moment, and since when: seconds from the first frame, uint8 `[H, W, 3]` as displayed.

    The same array comes again where the same frame is shown. `times_s` ascend. Nothing is told to `damaged`.

    Raises:
        UsageError: decord is not installed.
        VideoError: decord cannot open or decode the file, stops at damage, or shows other frames than PyAV.
    """
    check(info)
    decord = load()
    with reading(info.path), open(info.path, "rb") as file, _refusing(info):
        # By number where the system can, because its FFmpeg would take some names for patterns; else by absolute path,
        # because it would take what stands before a colon for a protocol.
        numbered = f"/dev/fd/{file.fileno()}"
        reader = decord.VideoReader(numbered if os.path.exists(numbered) else os.path.abspath(info.path))
        stamps = _stamps(info, reader)
        # Half a step more, because decord rounds its times to 32 bits.
        begins = stamps - np.spacing(stamps) - TOLERANCE_S
        at, rgb = -1, None
        for moment in times_s:
            wanted = max(0, int(np.searchsorted(begins, moment, side="right")) - 1)
            while at < wanted:
                frame = reader.next()
                if at < 0:
                    _check_first(info, _pixels(info, frame))
                at, rgb = at + 1, None
            if rgb is None:
                rgb = _pixels(info, frame)
            yield float(stamps[at]), rgb


def _refusal(info: VideoInfo, problem: str) -> VideoError:
    return VideoError(f"decord cannot read {info.path}: {problem}", "use --decoder pyav")


@contextmanager
def _refusing(info: VideoInfo) -> Iterator[None]:
    try:
        yield
    except (VideoError, MemoryError):
        raise
    except Exception as error:  # decord raises whatever comes along: its own errors, AssertionError, StopIteration
        raise _refusal(info, "it does not open it, or stops at damage") from error


def _stamps(info: VideoInfo, reader) -> np.ndarray:
    """float32 `[frames]`: when each frame is shown, in seconds from the first, in the order in which they are shown."""
    stamps = reader.get_frame_timestamp(range(len(reader)))[:, 0]
    if len(stamps) == 1:
        return np.zeros_like(stamps)
    # It counts from the first frame that is shown, unless it includes some that never are. Times that are missing, as in
    # AVI and in very short Matroska files, come out as huge numbers.
    if abs(stamps[0]) > TOLERANCE_S or np.any(np.diff(stamps) < 0):
        raise _refusal(info, "it does not know when the frames are shown")
    return stamps


def _pixels(info: VideoInfo, frame) -> np.ndarray:
    rows = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)  # the host may have set a tensor bridge
    # From MP4 and its relatives frames come turned already.
    turn = 0 if info.container == MOV else info.rotation_deg
    width, height = (info.width, info.height) if turn % 180 == 0 else (info.height, info.width)
    if rows.shape[:2] != (height, width):
        raise _refusal(info, "the frames change their size")
    # Narrow turned frames come with the padding of their rows, as if each pixel had more than three bytes.
    rgb = rows.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
    return turned(rgb, turn, info.mirrored)


def _check_first(info: VideoInfo, rgb: np.ndarray) -> None:
    with closing(pyav.read(info, (0.0,))) as pictures:
        _, right = next(pictures)
    if np.abs(rgb.astype(np.int16) - right).mean() > OTHER_FRAME:
        raise _refusal(info, "it does not begin with the first frame")

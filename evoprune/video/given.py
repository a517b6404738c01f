"""Python inputs other than paths: arrays of frames, Pillow images, bytes, open files, and URLs."""

import io
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from evoprune.errors import UsageError, VideoError
from evoprune.util import brief, is_url, without_password
from evoprune.video.info import TOLERANCE_S, HeldVideo
from evoprune.video.temporary import temporary_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Bytes = bytes | bytearray | memoryview
# Types that Python callers may pass as an input.
Input = Union[str, os.PathLike[str], NDArray[np.uint8], "Tensor", "Image", Bytes, BinaryIO, HeldVideo]
CHUNK_BYTES = 2**20  # chunk size for copying an open file
MOST_LEVELS = 65535  # highest gray level in 16 bits
STORED_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")  # Pillow modes that PNG stores without conversion
RATE_HINT = "frame_rate=30, in frames a second, or times_s=[...], in seconds"


def held_video(
    frames: Any, frame_rate: float | None, times_s: Sequence[float] | None, several: bool = False
) -> HeldVideo:
    """Wrap an array of frames as a video.

    Args:
        frames: uint8 `[T, H, W, 3]`, RGB; an array, or anything that `numpy.asarray` accepts.
        frame_rate: frames per second, or None if `times_s` is given.
        times_s: start time of each frame in seconds, ascending. The first one is the beginning of the video.
        several: True if this is one of several inputs; changes only the hints of errors.

    Raises:
        UsageError: wrong shape or dtype, an invalid rate or invalid times, or not exactly one of the two.
    """
    try:
        array = np.asarray(frames)
    except Exception as problem:  # classes of other packages may raise anything, e.g. tensors on a GPU
        hint = "give an array of numpy; of a tensor: tensor.cpu().numpy()"
        raise UsageError(f"the frames of class {type(frames).__name__} are no array: {problem}", hint) from problem
    shape = list(array.shape)
    if array.ndim == 3 and shape[-1] == 3:
        hint = "of a picture: PIL.Image.fromarray(array)"
        if several:
            hint = f"frames of one video: numpy.stack(list); {hint}"
        raise UsageError(f"an array of shape {shape} is one frame", hint)
    if array.ndim != 4 or shape[-1] != 3:
        hint = "frames are [T, H, W, 3], RGB"
        if array.ndim == 4 and shape[1] == 3:
            hint += "; channels go last by array.transpose(0, 2, 3, 1)"
        raise UsageError(f"an array of shape {shape} is no video", hint)
    if array.dtype != np.uint8:
        hint = "frames are uint8, 0 to 255; of floats up to 1: (array * 255).round().astype('uint8')"
        raise UsageError(f"an array of {array.dtype} is no video", hint)
    if not array.size:
        raise UsageError(f"an array of shape {shape} holds no pixels", "give at least one frame")
    if (frame_rate is None) == (times_s is None):
        problem = "no rate" if frame_rate is None else "a rate and times, which exclude each other"
        raise UsageError(f"an array of {len(array)} frames has {problem}", RATE_HINT)
    if times_s is None:
        return _described(array, tuple(number / frame_rate for number in range(len(array))), frame_rate, 0.0)
    times = _checked(times_s, len(array))
    first = times[0]
    lasted = times[-1] - first
    rate = (len(times) - 1) / lasted if lasted else 1.0  # a single frame lasts for a second
    return _described(array, tuple(time - first for time in times), rate, first)


def _described(array: np.ndarray, frames_s: tuple[float, ...], rate: float, start_s: float) -> HeldVideo:
    """Return the video of an array. Raises UsageError if the frame rate or the duration is not a finite number above 0."""
    if not (0 < rate < math.inf and math.isfinite(frames_s[-1] + 1 / rate)):
        raise UsageError(f"{rate:g} frames a second are no rate of a video", RATE_HINT)
    gaps = [later - earlier for earlier, later in pairwise(frames_s)]
    return HeldVideo(
        path="<array>",
        duration_s=frames_s[-1] + 1 / rate,
        width=array.shape[2],
        height=array.shape[1],
        rotation_deg=0,
        codec="rawvideo",
        pix_fmt="rgb24",
        container="array",
        fps=rate,
        variable_rate=any(abs(gap - 1 / rate) > TOLERANCE_S for gap in gaps),
        frames_total=len(array),
        start_s=start_s,
        held=array,
        frames_s=frames_s,
    )


def _checked(times_s: Any, count: int) -> list[float]:
    """Return the times as Python floats. Raises UsageError unless they are `count` finite, strictly ascending numbers."""
    try:
        times = [float(time) for time in times_s]
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"times_s is {brief(times_s)}, not a list of numbers", RATE_HINT) from None
    if len(times) != count:
        raise UsageError(f"{len(times)} times for {count} frames", "times_s has the time of each frame, in seconds")
    if not all(map(math.isfinite, times)) or any(later <= earlier for earlier, later in pairwise(times)):
        raise UsageError("times_s are not numbers that ascend", "each frame begins after the one before it, in seconds")
    return times


def is_frames(value: Any) -> bool:
    """Return True if the value is an array or a tensor, but not a Pillow image."""
    return hasattr(value, "__array__") and not is_picture(value)


def is_picture(value: Any) -> bool:
    """Return True if the value is a Pillow image. Does not import Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def is_given(value: Any) -> bool:
    """Return True if `local_input` accepts the value and it is not a path or a URL."""
    return isinstance(value, Bytes | HeldVideo) or is_picture(value) or hasattr(value, "read")


def is_temporary(source: Any) -> bool:
    """Return True if `local_input` copies the input to a temporary file."""
    return not isinstance(source, HeldVideo) and (is_given(source) or is_url(source))


def name_of(source: Any) -> str:
    """Return the name of an input for reports and errors. Passwords are removed from URLs."""
    if isinstance(source, HeldVideo):
        return source.path
    if is_picture(source):
        return "<picture>"
    if isinstance(source, Bytes):
        return "<bytes>"
    if hasattr(source, "read"):
        name = getattr(source, "name", None)  # an integer if the file was opened by its descriptor
        if isinstance(name, str) and name:
            return name
        return "<file>"
    return without_password(os.fspath(source))


@contextmanager
def local_input(
    source: Any, *, offline: bool = False, progress: Callable[[int, int], None] | None = None
) -> Iterator[Any]:
    """Yield a path that `probe` can open.

    Paths and `HeldVideo` are yielded unchanged. Any other input is copied to a temporary file, which is deleted afterwards.

    Args:
        offline, progress: see `download.downloaded`.

    Raises:
        UsageError: a file opened in text mode, a picture that PNG cannot hold, or a URL with `offline`.
        VideoError: the input cannot be read or stored, or the download fails.
    """
    if not is_temporary(source):
        yield source
        return
    if is_url(source):
        from evoprune.video.download import downloaded

        with downloaded(source, offline=offline, progress=progress) as path:
            yield path
        return
    with temporary_file(_pieces(source), name_of(source)) as path:
        yield path


def _pieces(source: Any) -> Iterator[bytes]:
    if isinstance(source, Bytes):
        yield bytes(source)
    elif is_picture(source):
        yield _png(source)
    else:
        yield from _read(source)


def _read(file: Any) -> Iterator[bytes]:
    """Yield the content of an open file from its current position. Raises VideoError if a seekable file is already at its end."""
    begun = False
    while True:
        try:
            piece = file.read(CHUNK_BYTES)
        except (OSError, ValueError) as problem:  # such as a closed file
            raise VideoError(f"cannot read {name_of(file)}: {problem}", "open it as open(path, 'rb')") from problem
        if not isinstance(piece, bytes):
            hint = "open it as open(path, 'rb')"
            raise UsageError(f"the open file {name_of(file)} gives {type(piece).__name__}, not bytes", hint)
        if not piece:
            if not begun and _stands(file) > 0:
                said = f"{name_of(file)} is read from where it stands, which is its end"
                raise VideoError(said, "file.seek(0) goes back to its beginning")
            return
        begun = True
        yield piece


def _stands(file: Any) -> int:
    """Return the position of an open file in bytes, or 0 if it is unknown, as for a pipe."""
    try:
        return file.tell()
    except (AttributeError, OSError, ValueError):
        return 0


def _png(picture: Any) -> bytes:
    """Encode a Pillow image as PNG, without loss and with its EXIF data. Raises UsageError for more than 16 bits, VideoError."""
    if picture.mode == "F" or (picture.mode.startswith("I") and not _is_grey(picture)):
        raise UsageError(f"a picture of mode {picture.mode} has more than 16 bits", "give picture.convert('RGB')")
    try:
        if picture.mode not in STORED_MODES:
            mode = "RGBA" if picture.has_transparency_data else "RGB"
            picture = picture.convert(mode)
        content = io.BytesIO()
        picture.save(content, "PNG", compress_level=1, exif=picture.getexif())
    except (OSError, ValueError) as problem:  # the image's file is damaged or closed
        raise VideoError(f"cannot read {name_of(picture)}: {problem}", "is its file complete?") from problem
    return content.getvalue()


def _is_grey(picture: Any) -> bool:
    """Return True if all gray levels of the image fit into 16 bits."""
    least, most = picture.getextrema()
    return least >= 0 and most <= MOST_LEVELS

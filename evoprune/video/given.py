"""Handles inputs that Python callers can pass instead of a path: arrays of frames, Pillow images, bytes, open files, and URLs."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from evoprune.errors import UsageError, VideoError
from evoprune.util import is_url, without_password
from evoprune.video.held import HeldVideo
from evoprune.video.temporary import temporary_file

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Bytes = bytes | bytearray | memoryview
# Input types that Python callers can pass.
Input = Union[str, os.PathLike[str], NDArray[np.uint8], "Tensor", "Image", Bytes, BinaryIO, HeldVideo]
CHUNK_BYTES = 2**20  # chunk size for copying an open file
MOST_LEVELS = 65535  # highest gray level in 16 bits
STORED_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # Pillow modes that PNG stores without conversion


class GivenInput:
    """Wrapper around an input passed by a Python caller, which can have any of the types in `Input`."""

    def __init__(self, value: Any):
        self._value = value

    @property
    def is_frames(self) -> bool:
        """True if the input is an array or tensor of frames, False for everything else, including Pillow images."""
        given = self._value
        return hasattr(given, "__array__") and not isinstance(given, str) and not is_picture(given)

    @property
    def has_content(self) -> bool:
        """True if the input contains the data itself (an image, bytes, an open file, or a `HeldVideo`) instead of a path or URL."""
        return isinstance(self._value, Bytes | HeldVideo) or is_picture(self._value) or hasattr(self._value, "read")

    @property
    def is_temporary(self) -> bool:
        """True if `local` has to copy or download the input to a temporary file."""
        return not isinstance(self._value, HeldVideo) and (self.has_content or is_url(self._value))

    @property
    def name(self) -> str:
        """Input name for reports and error messages. Passwords are removed from URLs."""
        return name_of(self._value)

    @contextmanager
    def local(
        self, *, offline: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[str | os.PathLike[str] | HeldVideo]:
        """Yield a path or `HeldVideo` that `probe` can open.

        A path or a `HeldVideo` is yielded unchanged. Any other input is copied to a temporary file, which is deleted on exit.

        Args:
            offline, progress: See `download.downloaded`.

        Raises:
            UsageError: The input is a file opened in text mode, an image that cannot be stored as a PNG, or a URL while `offline`
                is True.
            VideoError: The input cannot be read or stored, or the download fails.
        """
        if not self.is_temporary:
            yield self._value
        elif is_url(self._value):
            from evoprune.video.download import downloaded

            with downloaded(self._value, offline=offline, progress=progress) as path:
                yield path
        else:
            with temporary_file(_pieces(self._value), self.name) as path:
                yield path


def is_picture(value: Any) -> bool:
    """Return True if a value is a Pillow image, without importing Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def name_of(source: Any) -> str:
    """Return an input's name for reports and error messages. See `GivenInput.name`."""
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


def _pieces(source: Any) -> Iterator[bytes]:
    if isinstance(source, Bytes):
        yield bytes(source)
    elif is_picture(source):
        yield _png(source)
    else:
        yield from _read(source)


def _read(file: Any) -> Iterator[bytes]:
    """Yield an open file's contents in chunks, starting at the current position.

    Raises:
        VideoError: The file cannot be read, or it is seekable and already at its end.
        UsageError: The file was opened in text mode.
    """
    has_read = False
    while True:
        try:
            piece = file.read(CHUNK_BYTES)
        except (OSError, ValueError) as problem:  # for example, the file is closed
            raise VideoError(f"cannot read {name_of(file)}: {problem}", "open it as open(path, 'rb')") from problem
        if not isinstance(piece, bytes):
            hint = "open it as open(path, 'rb')"
            raise UsageError(f"the open file {name_of(file)} returns {type(piece).__name__}, not bytes", hint)
        if not piece:
            if not has_read and _position(file) > 0:
                message = f"nothing to read: {name_of(file)} is already at its end"
                raise VideoError(message, "go back to its beginning: file.seek(0)")
            return
        has_read = True
        yield piece


def _position(file: Any) -> int:
    """Return the current position in an open file in bytes, or 0 for pipes and other non-seekable files."""
    try:
        return file.tell()
    except (AttributeError, OSError, ValueError):
        return 0


def _png(picture: Any) -> bytes:
    """Encode a Pillow image as a PNG, preserving its EXIF data.

    Raises:
        UsageError: The image has more than 16 bits per channel, so PNG cannot store it.
        VideoError: The image cannot be read.
    """
    stored = picture
    try:
        if picture.mode.startswith("I"):
            stored = _in_16_bits(picture)
        elif picture.mode not in (*STORED_MODES, "F"):
            stored = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
        if stored is None or stored.mode == "F":
            raise UsageError(f"an image of mode {picture.mode} has more than 16 bits", "give picture.convert('RGB')")
        content = io.BytesIO()
        stored.save(content, "PNG", compress_level=1, exif=picture.getexif())
    except (OSError, ValueError) as problem:  # the image's file is damaged or closed
        raise VideoError(f"cannot read {name_of(picture)}: {problem}", "is its file complete?") from problem
    return content.getvalue()


def _in_16_bits(picture: Any) -> Any:
    """Return an image with integers of any size in mode "I;16", or None if the integers don't fit."""
    from PIL import Image

    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() > MOST_LEVELS:
        return None
    return Image.fromarray(levels.astype(np.uint16))

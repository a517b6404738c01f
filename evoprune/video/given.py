"""Handles inputs that Python callers can pass instead of a path: arrays of frames, Pillow images, bytes, open files, and URLs."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from evoprune.util import is_url, without_password
from evoprune.video.info import is_held

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from evoprune.video.held import HeldVideo

Bytes = bytes | bytearray | memoryview
# Input types that Python callers can pass.
Input = Union[str, os.PathLike[str], NDArray[np.uint8], "Tensor", "Image", Bytes, BinaryIO, "HeldVideo"]


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
        return (
            is_held(self._value)
            or isinstance(self._value, Bytes)
            or is_picture(self._value)
            or hasattr(self._value, "read")
        )

    @property
    def is_temporary(self) -> bool:
        """True if `local` has to copy or download the input to a temporary file."""
        return not is_held(self._value) and (self.has_content or is_url(self._value))

    @property
    def name(self) -> str:
        """Input name for reports and error messages. Passwords are removed from URLs."""
        return name_of(self._value)

    @contextmanager
    def local(
        self, *, offline: bool = False, progress: Callable[[int, int], None] | None = None
    ) -> "Iterator[str | os.PathLike[str] | HeldVideo]":
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
            from evoprune.video.contents import png_of, read_file
            from evoprune.video.temporary import temporary_file

            if isinstance(self._value, Bytes):
                content = iter([bytes(self._value)])
            elif is_picture(self._value):
                content = iter([png_of(self._value, self.name)])
            else:
                content = read_file(self._value, self.name)
            with temporary_file(content, self.name) as path:
                yield path


def is_picture(value: Any) -> bool:
    """Return True if a value is a Pillow image, without importing Pillow."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(value, pillow.Image)


def name_of(source: Any) -> str:
    """Return an input's name for reports and error messages. See `GivenInput.name`."""
    if is_held(source):
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

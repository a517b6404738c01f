"""Reads the contents of Pillow images and open files, which are then written to temporary files."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

from evoprune.errors import UsageError, VideoError

CHUNK_BYTES = 2**20  # chunk size for copying an open file
MOST_LEVELS = 65535  # highest gray level in 16 bits
STORED_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # Pillow modes that PNG stores without conversion


def read_file(file: Any, name: str) -> Iterator[bytes]:
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
            raise VideoError(f"cannot read {name}: {problem}", "open it as open(path, 'rb')") from problem
        if not isinstance(piece, bytes):
            hint = "open it as open(path, 'rb')"
            raise UsageError(f"the open file {name} returns {type(piece).__name__}, not bytes", hint)
        if not piece:
            if not has_read and _position(file) > 0:
                message = f"nothing to read: {name} is already at its end"
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


def png_of(picture: Any, name: str) -> bytes:
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
        raise VideoError(f"cannot read {name}: {problem}", "is its file complete?") from problem
    return content.getvalue()


def _in_16_bits(picture: Any) -> Any:
    """Return an image with integers of any size in mode "I;16", or None if the integers don't fit."""
    from PIL import Image

    levels = np.asarray(picture)
    if levels.min() < 0 or levels.max() > MOST_LEVELS:
        return None
    return Image.fromarray(levels.astype(np.uint16))

"""The orientation of a picture: the tag in the EXIF data of a JPEG, PNG or WebP file.

FFmpeg reads it too, but PyAV 18 does not report whether the picture is mirrored. Pillow would read all of it, but its import (8 ms,
and 6 ms for the formats) delays the process that reads videos, whose other imports take 140 ms.
"""

import struct
from collections.abc import Iterator

# For every value of the tag, as `pixels.orientation`: clockwise degrees, and whether a left-right flip comes first.
ORIENTATIONS = {
    1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True),
    5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False),
}  # fmt: skip
_TAG = 0x0112


def exif_orientation(content: bytes) -> tuple[int, bool] | None:
    """Clockwise rotation in degrees, and whether a left-right flip comes before it; None without a valid tag."""
    try:
        for block in _exif_blocks(content):
            if found := ORIENTATIONS.get(_orientation_tag(block.removeprefix(b"Exif\0\0"))):
                return found
    except struct.error:  # cut off, or another format
        pass
    return None


def _exif_blocks(content: bytes) -> Iterator[bytes]:
    """The EXIF data in the file."""
    if content.startswith(b"\xff\xd8"):  # JPEG: segments up to the first that holds pixels
        at = 2
        while content[at : at + 1] == b"\xff":
            marker, length = struct.unpack_from(">xBH", content, at)
            if marker == 0xDA:
                return
            if marker == 0xE1 and content.startswith(b"Exif\0\0", at + 4):
                yield content[at + 4 : at + 2 + length]
            at += 2 + length
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        at = 8
        while at + 8 <= len(content):
            length, name = struct.unpack_from(">I4s", content, at)
            if name == b"eXIf":
                yield content[at + 8 : at + 8 + length]
            at += 12 + length  # a checksum follows
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        at = 12
        while at + 8 <= len(content):
            name, length = struct.unpack_from("<4sI", content, at)
            if name == b"EXIF":
                yield content[at + 8 : at + 8 + length]
            at += 8 + length + length % 2


def _orientation_tag(tiff: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
        if tag == _TAG:
            return value
    return None

"""Recognizes image files by their first bytes. Imports no decoders."""

import os
import stat

HEAD_BYTES = 4096
HEADS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF87a": "GIF", b"GIF89a": "GIF",
}  # fmt: skip
BRANDS = {
    b"avif": "AVIF", b"avis": "AVIF",
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC",
}  # fmt: skip


def head_of(path: str) -> bytes:
    """Return up to `HEAD_BYTES` bytes from the beginning of a file, or nothing if it is not a readable regular file."""
    try:
        status = os.stat(path)
        # Reading a file of size 0, such as /proc/kmsg, may block.
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except (OSError, ValueError):
        return b""


def picture_format(head: bytes) -> str | None:
    """Return Pillow's name for an image file's format, or None if the first bytes of the file are no image signature."""
    if head[4:8] == b"ftyp":
        brand = BRANDS.get(head[8:12])
        if brand == "HEIC" and b"avif" in head[16 : head[3]]:
            return "AVIF"
        return brand
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in (12, 40, 52, 56, 64, 108, 124):
        return "BMP"  # the header size is also checked, because the signature is short
    return next((name for start, name in HEADS.items() if head.startswith(start)), None)


def is_sequence(head: bytes) -> bool:
    """Return True if the first bytes of an AVIF file declare an animation."""
    return b"avis" in head[8 : head[3]]

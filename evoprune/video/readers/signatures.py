"""What a file holds, by its first bytes: a picture, or what is no video at all, for the error's message."""

import os

from evoprune.errors import LFS, LFS_HINT, VideoError

HEAD = 4096  # bytes
FORMATS = "MP4, MOV, MKV, WebM, AVI and GIF are read, most others that FFmpeg knows, pictures, and folders of images"
OTHERS = {
    b"#EXTM3U": "a playlist", b"ffconcat version": "a playlist", b"%PDF-": "a PDF document",
    b"PK\x03\x04": "a ZIP archive or an office document", b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive", b"Rar!": "a RAR archive", b"\x7fELF": "a program",
    b"SQLite format 3": "a database", b"\x93NUMPY": "a NumPy array",
    b"\xff\xfe": "a text file", b"\xfe\xff": "a text file",  # in UTF-16
}  # fmt: skip
MEDIA = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"\0\0\1", b"\x30\x26\xb2\x75", b"GIF8", b"YUV4MPEG2")
BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof")  # of MP4 and MOV, after four bytes
# Pictures, by Pillow's names of their formats. HEIC is recognised, and refused.
PICTURES = ("JPEG", "PNG", "WebP", "TIFF", "BMP", "GIF", "AVIF")
PICTURE_HEADS = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF", b"MM\0*": "TIFF", b"GIF87a": "GIF", b"GIF89a": "GIF",
}  # fmt: skip
PICTURE_BRANDS = {b"avif": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC"}
BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # bytes
CONTROL = bytes({*range(32), 127} - set(b"\t\n\r\f\b\x1b"))


def picture_format(path: str) -> str | None:
    """Pillow's name of a picture's format; None if the file does not begin as pictures do."""
    head = _head(path)
    if head[4:8] == b"ftyp":
        brand = PICTURE_BRANDS.get(head[8:12])
        return "AVIF" if brand == "HEIC" and b"avif" in head[16 : head[3]] else brand
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WEBP"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in BMP_HEADERS:
        return "BMP"
    return next((name for start, name in PICTURE_HEADS.items() if head.startswith(start)), None)


def not_a_video(path: str, *, unrecognised: bool) -> VideoError | None:
    """The error for a file that FFmpeg could not read, if it surely holds something else than a video.

    Where FFmpeg recognised nothing in it, whatever does not begin as videos do is none.
    """
    head = _head(path)
    if not head or head.startswith(MEDIA) or head[4:8] in BOXES:
        return None
    found = next((name for start, name in OTHERS.items() if head.startswith(start)), None)
    if found is None and len(head.translate(None, CONTROL)) == len(head):
        found = "a text file"
    if head.startswith(LFS):
        return VideoError(f"{path} is a git-lfs pointer", LFS_HINT)
    if found:
        return VideoError(f"{path} is not a video: it is {found}", FORMATS)
    return VideoError(f"{path} is not a video, or its beginning is damaged", FORMATS) if unrecognised else None


def _head(path: str) -> bytes:
    try:
        # An empty one may be a device that waits (/proc/kmsg).
        if not os.path.isfile(path) or not os.path.getsize(path):
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""

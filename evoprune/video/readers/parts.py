"""Where the parts of a file that was joined byte by byte lie (`cat a.mkv b.mkv`).

FFmpeg reads such a file to the end of its first or second part, or reads all parts by the header of the first. A container states
how long its elements are, so the walk from one to the next touches a few bytes of each. MPEG-TS and MPEG-PS have no header that
begins a part: there the clock tells it (pyav.py).
"""

import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice, pairwise

from evoprune.errors import VideoError

Span = tuple[int, int]  # the first byte of a part, and the one behind its last byte
Peek = Callable[[int, int], bytes]  # so many bytes of a file from a place on, fewer at its end

MOST_PARTS = 1000
AVI_ENTRY_BYTES = 16
PIECE = 2**20  # bytes that are searched at a time
# Elements of Matroska.
EBML, SEGMENT, CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # the object that begins a file
PNG = b"\x89PNG\r\n\x1a\n"
MXF = bytes.fromhex("060e2b34020501010d01020101")  # a partition; that of the file's beginning has a 2 behind it
NUT = b"nut/multimedia container\0"


def spans(path: str) -> list[Span]:
    """Return the parts of a file, in order: one that is the whole file, unless it was joined.

    An MP4 ends in front of the header of a fragment in which it was cut off, because FFmpeg opens none that ends there.

    Raises VideoError: more than `MOST_PARTS`. OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size

        def peek(at: int, count: int) -> bytes:
            return os.pread(file.fileno(), count, at) if at < size else b""

        head = peek(0, 32)
        iso = head[4:8] == b"ftyp"
        walk = _iso if iso else next((walk for start, walk in WALKS.items() if head.startswith(start)), None)
        begins = list(islice(walk(peek), MOST_PARTS + 1)) if walk else []
        if len(begins) > MOST_PARTS:
            hint = "join them with ffmpeg -f concat, or ask about fewer"
            raise VideoError(f"{path} consists of more than {MOST_PARTS:,} files", hint)
        end = _cut_fragment(peek, size) if iso else size
        return list(pairwise([0, *begins[1:], end]))


def _matroska(peek: Peek) -> Iterator[int]:
    """Live recordings do not state how long their segments and clusters are: these are entered."""
    at = 0
    while element := _ebml_element(peek, at):
        name, begin, size = element
        if name == EBML:
            yield at
        if size is None and name not in (SEGMENT, CLUSTER):
            break  # damage, or bytes of another kind
        at = begin + (size or 0)


def _ebml_element(peek: Peek, at: int) -> tuple[int, int, int | None] | None:
    """The name of the element at a byte, where its content begins, and how long it is, None if it does not say; None at the end."""
    head = peek(at, 12)
    if not head or not head[0] & 0xF0:
        return None
    name_bytes = 9 - head[0].bit_length()
    if len(head) <= name_bytes or not head[name_bytes]:
        return None
    size_bytes = 9 - head[name_bytes].bit_length()
    field = int.from_bytes(head[name_bytes : name_bytes + size_bytes], "big")
    largest = 2 ** (7 * size_bytes) - 1
    size = field & largest
    begin = at + name_bytes + size_bytes
    return int.from_bytes(head[:name_bytes], "big"), begin, None if size == largest else size


def _boxes(peek: Peek) -> Iterator[tuple[int, bytes, float]]:
    """Where each box of an MP4 or MOV begins, its kind, and where it ends by its own word: infinity is the end of the file."""
    at = 0
    while len(head := peek(at, 16)) >= 8:
        size, kind = struct.unpack(">I4s", head[:8])
        if size == 1 and len(head) == 16:
            size = int.from_bytes(head[8:], "big")
        if 0 < size < 8:
            break
        end = at + size
        yield at, kind, end if size else math.inf
        if not size:
            break
        at = end


def _iso(peek: Peek) -> Iterator[int]:
    """A part has an index: pieces of a stream may begin with their type alone."""
    begin = None
    for at, kind, _ in _boxes(peek):
        if kind == b"ftyp":
            begin = at
        elif kind == b"moov" and begin is not None:
            yield begin
            begin = None


def _cut_fragment(peek: Peek, size: int) -> int:
    """Where the header of a fragment begins in which a file of that size ends; else that size."""
    return next((at for at, kind, end in _boxes(peek) if kind == b"moof" and size < end), size)


def _riff(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 12)) == 12 and head[:4] == b"RIFF":
        if head[8:] == b"AVI ":  # the further pieces of one large file are called AVIX
            yield at
        at += 8 + int.from_bytes(head[4:8], "little")


def avi_index(path: str, span: Span) -> bytes:
    """Return the index at the end of an AVI: entries of `AVI_ENTRY_BYTES` that begin with the name of a chunk; none without one."""
    with closing(Slice(path, span)) as part:
        part.seek(12)
        while len(head := part.read(8)) == 8:
            length = int.from_bytes(head[4:], "little")
            if head[:4] == b"idx1":
                return part.read(length)
            part.seek(length + length % 2, os.SEEK_CUR)
    return b""


def _flv(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 9)) == 9:
        if head.startswith(b"FLV\x01"):
            yield at
            at += int.from_bytes(head[5:9], "big") + 4
        elif head[0] & 0x1F in (8, 9, 18):  # sound, pictures, or notes
            at += 11 + int.from_bytes(head[1:4], "big") + 4
        else:
            break


def _asf(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 24)) == 24:
        if head.startswith(ASF):
            yield at
        size = int.from_bytes(head[16:], "little")
        if size < 24:
            break
        at += size


def _ivf(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 12)) == 12:
        if head.startswith(b"DKIF"):
            yield at
            at += int.from_bytes(head[6:8], "little") or 32
        else:
            at += 12 + int.from_bytes(head[:4], "little")


def _ogg(peek: Peek) -> Iterator[int]:
    """A part begins with pages that begin streams, one a stream."""
    at, beginning = 0, False
    while len(head := peek(at, 27)) == 27 and head.startswith(b"OggS"):
        begins_stream = bool(head[5] & 2)
        if begins_stream and not beginning:
            yield at
        beginning = begins_stream
        lengths = peek(at + 27, head[26])
        at += 27 + len(lengths) + sum(lengths)


def _png(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 8)) == 8:
        if head == PNG:
            yield at
            at += 8
        else:
            at += 12 + int.from_bytes(head[:4], "big")


def _mxf(peek: Peek) -> Iterator[int]:
    at = 0
    while len(head := peek(at, 25)) == 25:
        if head.startswith(MXF + b"\x02"):
            yield at
        length = head[16]
        if length & 0x80:  # how many bytes the length has
            count = length & 0x7F
            at += 17 + count + int.from_bytes(head[17 : 17 + count], "big")
        else:
            at += 17 + length


def _nut(peek: Peek) -> Iterator[int]:
    """All bytes are searched, because packets cannot be told without decoding their headers."""
    at = 0
    while piece := peek(at, PIECE + len(NUT) - 1):
        found = piece.find(NUT)
        while found >= 0:
            yield at + found
            found = piece.find(NUT, found + 1)
        at += PIECE


# By the first bytes of a file. MP4 and MOV begin with the length of their first box.
WALKS: dict[bytes, Callable[[Peek], Iterator[int]]] = {
    b"\x1aE\xdf\xa3": _matroska, b"RIFF": _riff, b"FLV\x01": _flv, ASF: _asf, b"DKIF": _ivf, b"OggS": _ogg, PNG: _png,
    MXF: _mxf, NUT: _nut,
}  # fmt: skip


class Slice:
    """One part of an open binary file, as a file of its own that FFmpeg can read and seek in."""

    def __init__(self, path: str, span: Span):
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (`close` closes it)
        self._begin, self._end = span
        self._file.seek(self._begin)

    def read(self, count: int) -> bytes:
        left = self._end - self._file.tell()
        return self._file.read(min(count, left)) if left > 0 else b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (self._begin, self._file.tell(), self._end)[whence]
        return self._file.seek(max(self._begin, start + offset)) - self._begin

    def tell(self) -> int:
        return self._file.tell() - self._begin

    def close(self) -> None:
        self._file.close()

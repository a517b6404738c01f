"""Where the parts of a file that was joined byte by byte lie (`cat a.mkv b.mkv`), whatever their containers.

FFmpeg reads such a file to the end of its first or second part, or reads all parts by the header of the first. A container states
how long its elements are, so the walk from one to the next touches a few bytes of each. MPEG-TS and MPEG-PS have no header that
begins a part: there the clock tells it (pyav.py).
"""

import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from itertools import pairwise
from typing import BinaryIO

from evoprune.errors import VideoError
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.ffmpeg import Slice, Span

Peek = Callable[[int, int], bytes]  # so many bytes of a file from a place on, fewer at its end
Step = Callable[[Peek, int], int | None]  # the end of the element that begins at a place, None if that is not known

MOST_PARTS = 1000
MOST_LOOKS = (
    6 * 10**6
)  # into a file: some seconds; then it counts as ended. A day of FLV has two million tags, looked at twice each
BLOCK_BYTES = 4096  # that are read at once: small elements stand close together
HEAD_BYTES = 32
PIECE = 2**20  # bytes that are searched at a time
AVI_ENTRY_BYTES = 16
TS_PACKET_BYTES = 188
BROKEN = (b"moof", b"mdat", b"mfra", b"sidx", b"styp")  # where a fragmented MP4 may break off; others are no boxes
# elements of Matroska that hold others
SEGMENT = 0x18538067
CLUSTER = 0x1F43B675
ENCRYPTED_TRACK = b"encv" + bytes(6)  # the beginning of its entry in the table of formats (stsd)
NUT = b"nut/multimedia container\0"
Y4M = b"YUV4MPEG2 W"
REAL = b".RMF\0\0\0\x12\0"


def spans(path: str) -> list[Span]:
    """Return the parts of a file, in order: one that is the whole file, unless it was joined.

    A part ends where the next one begins. An MP4 ends in front of the header of a fragment in which it was cut off, because FFmpeg
    opens none that ends there.

    Raises VideoError: more than `MOST_PARTS`. OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        peek = _peeks(file)
        size = os.fstat(file.fileno()).st_size
        begins: list[int] = []
        at = 0
        step = None
        while at is not None and peek(at, 1):
            if begun := _container_at(peek, at):
                begins.append(at)
                step = begun
            if len(begins) > MOST_PARTS:
                hint = "join them with ffmpeg -f concat, or ask about fewer"
                raise VideoError(f"{path} consists of more than {MOST_PARTS:,} files", hint)
            end = step and step(peek, at)
            at = end if end and end > at else None
        last = begins[-1] if begins else 0
        end = size
        if step is _box_end:
            end = _cut_fragment(peek, last, size)
        return list(pairwise([0, *begins[1:], end]))


def cut_off(path: str, begin: int) -> bool:
    """Return whether the last part of a file, from that byte on, is an MP4 that ends inside a fragment.

    OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        peek = _peeks(file)
        size = os.fstat(file.fileno()).st_size
        if peek(begin, 8)[4:] != b"ftyp":
            return False
        fragments = False
        kind = b""
        for _, kind, end in _boxes(peek, begin):
            fragments = fragments or kind == b"moof"
            cut = len(kind) < 4 or (kind in BROKEN and end is not None and end > size)
            if fragments and cut:
                return True
        return kind == b"moof"  # its pictures are missing


def has_encrypted_track(path: str, span: Span) -> bool:
    """Return True if the index of an MP4 has an encrypted video track, also in ways that FFmpeg does not report (PIFF).

    OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        for at, kind, end in _boxes(_peeks(file), span[0]):
            if kind == b"moov" and at < span[1]:
                length = min(end or span[1], span[1]) - at
                return ENCRYPTED_TRACK in os.pread(file.fileno(), length, at)
        return False


def _peeks(file: BinaryIO) -> Peek:
    """Return how to look into an open file, which reports progress."""
    size = os.fstat(file.fileno()).st_size
    block = b""
    begin = 0
    looks = 0

    def peek(at: int, count: int) -> bytes:
        nonlocal block, begin, looks
        looks += 1
        if at >= size or looks > MOST_LOOKS:
            return b""
        if not begin <= at <= at + count <= begin + len(block):
            ffmpeg.alive()
            block = os.pread(file.fileno(), max(count, BLOCK_BYTES), at)
            begin = at
        return block[at - begin : at - begin + count]

    return peek


def _container_at(peek: Peek, at: int) -> Step | None:
    """Return how to walk through the container whose header stands at a place; None if there is none."""
    head = peek(at, HEAD_BYTES)
    if head[4:8] == b"ftyp":
        return _box_end if _has_index(peek, at) else None
    if head.startswith(b"RIFF") and head[8:12] != b"AVI ":
        return None  # the further pieces of one large AVI are called AVIX
    if head.startswith(b"OggS") and not head[5] & 2:
        return None  # a page that begins no stream
    if head.startswith(b"G") and all(_is_packet(peek, at, number) for number in range(4)):
        return _packets_end
    if not head.startswith(STARTS):
        return None
    return next((step for start, step in STEPS.items() if head.startswith(start)), None)


def _element_end(peek: Peek, at: int) -> int | None:
    """Find the end of an element of Matroska.

    Live recordings do not state how long their segments and clusters are: these are entered.
    """
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
    if size != largest:
        return begin + size
    if int.from_bytes(head[:name_bytes], "big") in (SEGMENT, CLUSTER):
        return begin
    return None


def _box_end(peek: Peek, at: int) -> int | None:
    """Find the end of a box of MP4 or MOV; one without a length ends with the file."""
    head = peek(at, 16)
    if len(head) < 8:
        return None
    size = int.from_bytes(head[:4], "big")
    if size == 1:
        size = max(16, int.from_bytes(head[8:], "big"))
    if size < 8:
        return None
    return at + size


def _boxes(peek: Peek, at: int) -> Iterator[tuple[int, bytes, int | None]]:
    """Yield the beginning of each box, its kind, which may be cut off, and its end."""
    place: int | None = at
    while place is not None and (head := peek(place, 8)):
        end = _box_end(peek, place)
        yield place, head[4:], end
        place = end


def _has_index(peek: Peek, at: int) -> bool:
    """Return whether the box at a place begins a file: pieces of a stream may begin with their type alone."""
    kinds = (kind for place, kind, _ in _boxes(peek, at) if place > at)
    return next((kind == b"moov" for kind in kinds if kind in (b"moov", b"moof", b"ftyp")), False)


def _cut_fragment(peek: Peek, at: int, size: int) -> int:
    """Find where the header of a fragment begins in which a file of that size ends; else that size."""
    cut = (place for place, kind, end in _boxes(peek, at) if kind == b"moof" and end is not None and end > size)
    return next(cut, size)


def _riff_end(peek: Peek, at: int) -> int | None:
    head = peek(at, 8)
    if not head.startswith(b"RIFF"):
        return None
    return at + 8 + int.from_bytes(head[4:], "little")


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


def _flv_end(peek: Peek, at: int) -> int | None:
    """Find the end of the header, or of a tag: sound, pictures, or notes."""
    head = peek(at, 9)
    if len(head) < 9:
        return None
    if head.startswith(b"FLV"):
        return at + int.from_bytes(head[5:], "big") + 4
    if head[0] & 0x1F not in (8, 9, 18):
        return None
    return at + 11 + int.from_bytes(head[1:4], "big") + 4


def _asf_end(peek: Peek, at: int) -> int | None:
    size = int.from_bytes(peek(at, 24)[16:], "little")
    if size < 24:
        return None
    return at + size


def _ivf_end(peek: Peek, at: int) -> int:
    """Find the end of the header, or of a frame."""
    head = peek(at, 12)
    if head.startswith(b"DKIF"):
        return at + (int.from_bytes(head[6:8], "little") or 32)
    return at + 12 + int.from_bytes(head[:4], "little")


def _ogg_end(peek: Peek, at: int) -> int | None:
    """Find the end of a page; of the pages that begin streams, one a stream, all together."""
    end = _page_end(peek, at)
    if peek(at, 6)[5:] and peek(at, 6)[5] & 2:
        while end is not None and peek(end, 4) == b"OggS" and peek(end, 6)[5] & 2:
            end = _page_end(peek, end)
    return end


def _page_end(peek: Peek, at: int) -> int | None:
    head = peek(at, 27)
    if len(head) < 27 or not head.startswith(b"OggS"):
        return None
    lengths = peek(at + 27, head[26])
    return at + 27 + len(lengths) + sum(lengths)


def _png_end(peek: Peek, at: int) -> int:
    """Find the end of the signature, or of a chunk."""
    head = peek(at, 8)
    if head.startswith(b"\x89PNG"):
        return at + 8
    return at + 12 + int.from_bytes(head[:4], "big")


def _mxf_end(peek: Peek, at: int) -> int | None:
    head = peek(at, 25)
    if len(head) < 17:
        return None
    length = head[16]
    if length & 0x80:  # how many bytes the length has
        count = length & 0x7F
        return at + 17 + count + int.from_bytes(head[17 : 17 + count], "big")
    return at + 17 + length


def _next_start(start: bytes, peek: Peek, at: int) -> int | None:
    """Return the next place with these bytes.

    All bytes are searched, where packets cannot be told without decoding their headers.
    """
    place = at + 1
    while piece := peek(place, PIECE + len(start) - 1):
        found = piece.find(start)
        if found >= 0:
            return place + found
        place += PIECE
    return None


def _is_packet(peek: Peek, at: int, number: int) -> bool:
    return peek(at + number * TS_PACKET_BYTES, 1) == b"G"


def _packets_end(peek: Peek, at: int) -> int | None:
    """Find the end of packets of MPEG-TS in a row, however many files they are of. Looks at few of them."""

    def inside(count: int) -> bool:
        return all(_is_packet(peek, at, number) for number in range(max(0, count - 4), count))

    if not inside(1):
        return None
    most = 1
    while inside(2 * most):
        most *= 2
    return at + TS_PACKET_BYTES * (bisect_left(range(2 * most), True, key=lambda count: not inside(count)) - 1)


def _no_end(peek: Peek, at: int) -> None:
    return None


# By the first bytes of a file. MP4 and MOV begin with the length of their first box.
STEPS: dict[bytes, Step] = {
    b"\x1aE\xdf\xa3": _element_end,
    b"RIFF": _riff_end,
    b"FLV\x01": _flv_end,
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"): _asf_end,
    b"DKIF": _ivf_end,
    b"OggS": _ogg_end,
    b"\x89PNG\r\n\x1a\n": _png_end,
    bytes.fromhex("060e2b34020501010d0102010102"): _mxf_end,
    NUT: partial(_next_start, NUT),
    Y4M: partial(_next_start, Y4M),
    REAL: partial(_next_start, REAL),
    b"\0\0\1\xba": _no_end,  # MPEG-PS
    b"GIF8": _no_end,  # FFmpeg reads all of several
}
STARTS = tuple(STEPS)

"""Parse the header of a GGUF file: its metadata and the list of its tensors. Does not import torch.

GGUF files are untrusted, so every count, length, and offset is checked before it is used. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import os
import stat
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from evoprune.session.gguf.names import MAGIC

VERSIONS = (2, 3)
MAX_ENTRIES = 10_000  # maximum number of metadata entries; Qwen's files have about 40
MAX_TENSORS = 20_000  # maximum number of tensors; the largest Qwen models have about 1,500 per file
MAX_HEADER = 2**26  # maximum size of a header in bytes; Qwen's headers have about 6 MB
MAX_NAME = 1024  # maximum length of a metadata key or tensor name, in bytes
MAX_STRING = 2**20  # maximum length of a string, in bytes
MAX_VALUES = 2**22  # maximum number of array elements in a file; Qwen's vocabularies have about 750,000
MAX_LEVELS = 2  # maximum nesting depth of arrays
MAX_DIMENSIONS = 4
SHORT = 1000  # maximum length of an array to read if the vocabulary isn't needed
# Formats of the number types, for `struct`. Types 8 and 9 are strings and arrays.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Kind:
    """How the values of a tensor are stored: in blocks of `values` values that take `size` bytes."""

    name: str
    values: int
    size: int


# The types of tensors that evoprune reads, by their number in GGUF files.
KINDS = {
    number: Kind(name, values, size)
    for number, name, values, size in (
        (0, "F32", 1, 4), (1, "F16", 1, 2), (30, "BF16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (20, "IQ4_NL", 32, 18), (23, "IQ4_XS", 256, 136), (39, "MXFP4", 32, 17),
    )
}  # fmt: skip
# Names of the types that evoprune does not read, for error messages.
OTHER_KINDS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip


class UnsupportedKind(ValueError):
    """Raised if a tensor has a type that evoprune does not read."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a GGUF file."""

    name: str
    file: Path
    kind: Kind
    shape: tuple[int, ...]  # in PyTorch's order; GGUF files store it in reverse
    offset: int  # position of the first byte in the file
    size: int  # number of bytes


@dataclass(frozen=True)
class Header:
    """The metadata and the tensors of a GGUF file."""

    file: Path
    fields: dict[str, Any]  # numbers, strings, and lists; None for a long list that was skipped
    lengths: dict[str, int]  # number of elements in a list, by its key
    tensors: dict[str, TensorInfo]


def read_header(path: Path, vocabulary: bool = True) -> Header:
    """Read the metadata and the list of tensors.

    Args:
        vocabulary: Whether to read lists of more than `SHORT` elements. Without them, reading a file takes half as long.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is damaged, incomplete, or exceeds a limit.
        UnsupportedKind: If a tensor has a type that evoprune does not read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is not a regular file")
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("it is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Parser(path, content, vocabulary).header()


class _Parser:
    def __init__(self, path: Path, content: mmap.mmap, vocabulary: bool):
        self._path = path
        self._content = content
        self._size = len(content)
        self._end = min(self._size, MAX_HEADER)
        self._at = len(MAGIC)
        self._vocabulary = vocabulary
        self._values = 0  # number of array elements so far

    def header(self) -> Header:
        (version,) = self._numbers("I")
        if version not in VERSIONS:
            if version in (2**24, 2 * 2**24, 3 * 2**24):
                raise ValueError("it is stored in big-endian order, which evoprune does not read")
            raise ValueError(f"its version is {version}, not {' or '.join(map(str, VERSIONS))}")
        tensors, entries = self._numbers("QQ")
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            raise ValueError(f"it has {tensors:,} tensors and {entries:,} metadata entries, which is too many")
        fields: dict[str, Any] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key = self._string(MAX_NAME)
            (kind,) = self._numbers("I")
            if key in fields:
                raise ValueError(f"the entry {key[:80]!r} appears twice")
            fields[key] = self._value(kind, key, lengths)
        return Header(self._path, fields, lengths, self._tensors(tensors, fields.get("general.alignment", 32)))

    def _tensors(self, count: int, alignment: Any) -> dict[str, TensorInfo]:
        found = []
        for _ in range(count):
            name = self._string(MAX_NAME)
            (dimensions,) = self._numbers("I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ValueError(f"the tensor {name[:80]!r} has {dimensions:,} dimensions")
            shape = tuple(reversed(self._numbers("Q" * dimensions)))
            found.append((name, shape, *self._numbers("IQ")))
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise ValueError(f"the alignment of its tensors is {str(alignment)[:40]}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, number, offset in found:
            if (kind := KINDS.get(number)) is None:
                raise UnsupportedKind(OTHER_KINDS.get(number, f"type {number}"))
            if name in tensors:
                raise ValueError(f"the tensor {name[:80]!r} appears twice")
            if min(shape) < 1 or shape[-1] % kind.values or offset % alignment:
                raise ValueError(f"the shape or position of the tensor {name[:80]!r} is invalid")
            size = prod(shape) // kind.values * kind.size
            if start + offset + size > self._size:
                raise ValueError(f"the tensor {name[:80]!r} is cut off")
            tensors[name] = TensorInfo(name, self._path, kind, shape, start + offset, size)
        last = start
        for tensor in sorted(tensors.values(), key=lambda each: each.offset):
            if tensor.offset < last:
                raise ValueError(f"the tensor {tensor.name[:80]!r} overlaps another tensor")
            last = tensor.offset + tensor.size
        return tensors

    @property
    def _ended(self) -> ValueError:
        return ValueError("it ends in its header" if self._end == self._size else "its header is too long")

    def _numbers(self, form: str) -> tuple:
        size = struct.calcsize(f"<{form}")
        if self._at + size > self._end:
            raise self._ended
        values = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += size
        return values

    def _string(self, limit: int = MAX_STRING) -> str:
        (length,) = self._numbers("Q")
        if length > limit or self._at + length > self._end:
            raise ValueError(f"a text in its header has {length:,} bytes")
        text = self._content[self._at : self._at + length]
        self._at += length
        return text.decode("utf-8", "replace")

    def _strings(self, count: int, read: bool) -> list[str] | None:
        """Read a list of strings, or skip it. This loop takes most of the time, because vocabularies have 300,000 strings."""
        content, at, end = self._content, self._at, self._end
        length_at = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            if at + 8 > end:
                raise self._ended
            start = at + 8
            at = start + length_at(content, at)[0]
            if at > end or at - start > MAX_STRING:
                raise ValueError(f"a text in its header has {at - start:,} bytes")
            if read:
                texts.append(content[start:at].decode("utf-8", "replace"))
        self._at = at
        return texts if read else None

    def _value(self, kind: int, key: str, lengths: dict[str, int], level: int = 0) -> Any:
        if kind == STRING:
            return self._string()
        if kind in NUMBERS:
            return self._numbers(NUMBERS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"the entry {key[:80]!r} has the unknown type {kind}")
        inner, count = self._numbers("IQ")
        self._values += count
        if self._values > MAX_VALUES or level >= MAX_LEVELS:
            raise ValueError(f"the list {key[:80]!r} is too long or nested too deeply")
        if not level:
            lengths[key] = count
        read = self._vocabulary or count <= SHORT
        if inner in NUMBERS:
            values = self._numbers(f"{count}{NUMBERS[inner]}")
            return list(values) if read else None
        if inner == STRING:
            return self._strings(count, read)
        return [self._value(inner, key, lengths, level + 1) for _ in range(count)]

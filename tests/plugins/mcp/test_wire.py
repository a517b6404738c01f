"""How the client's messages are split into lines."""

import os
import threading
import tracemalloc

from evoprune_mcp.messages import MAX_BYTES
from evoprune_mcp.wire import split_lines


def split(*parts: bytes):
    """Yield the lines of a pipe that gets these parts one after another."""
    source, target = os.pipe()

    def write():
        with os.fdopen(target, "wb", buffering=0) as file:
            for part in parts:
                file.write(part)

    threading.Thread(target=write, daemon=True).start()
    with os.fdopen(source):
        yield from split_lines(source)


def test_lines_are_complete_however_they_arrive():
    long = b"x" * 200_000
    assert list(split(b"a", b"b\n\nc\r\nd", b"\n" + long + b"\n", b"e")) == [b"ab", b"", b"c\r", b"d", long, b"e"]
    assert list(split(b"a\n")) == [b"a"] and list(split(b"")) == []


def test_a_line_without_an_end_takes_bounded_memory():
    """It is reported once, before it ends, and the line after it is read."""
    tracemalloc.start()
    lines = split(*[b"x" * 2**20] * 32, b"\nnext\n")
    try:
        assert MAX_BYTES < len(next(lines)) < MAX_BYTES + 2**20
        assert list(lines) == [b"next"]
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    finally:
        tracemalloc.stop()

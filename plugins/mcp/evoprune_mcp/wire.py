"""Handles the server process's standard streams and signals."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import BinaryIO

from evoprune_mcp.messages import INVALID_REQUEST, MAX_BYTES, TOO_LONG, checked, error

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CHUNK_BYTES = 2**16


@contextmanager
def real_streams() -> Iterator[list[int]]:
    """Set `sys.stdin` to a copy of stdin that reaches end of file on the first signal, and `sys.stdout` to the real stdout.

    Without the copy, a blocked read from stdin would delay shutdown. The copy contains only valid messages, because all others are
    answered with an error. Meanwhile, anything else that is written to the stdout of this process goes to stderr. When the context
    ends, the first signal is re-raised. A second signal terminates the process immediately.

    Yields:
        A list of the signals received so far, updated as they arrive.
    """
    real_stdin = sys.stdin
    received: list[int] = []
    reader, target = os.pipe()
    writer = os.fdopen(target, "wb", buffering=0)
    # The SDK writes its replies to `replies.buffer`, which has a lock, so its lines and ours don't mix.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", closefd=False)

    def end(number: int, _frame: object) -> None:
        received.append(number)
        for each in usual:
            signal.signal(each, signal.SIG_DFL)
        writer.close()

    handlers = {number: signal.getsignal(number) for number in ENDINGS}
    usual = {number: handler for number, handler in handlers.items() if callable(handler)}  # `nohup` ignores SIGHUP
    for number in usual:
        signal.signal(number, end)
    try:
        sys.stdin = os.fdopen(reader, encoding="utf-8")
        given = (os.dup(0), writer, replies.buffer)
        threading.Thread(target=_filter, args=given, name="evoprune-mcp-stdin", daemon=True).start()
        os.dup2(2, 1)
        with redirect_stdout(replies):
            yield received
    finally:
        os.dup2(replies.fileno(), 1)
        sys.stdin = real_stdin
        for number, handler in usual.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)


def end_at_once(received: Sequence[int]) -> None:
    """Exit the process without Python's cleanup, which could crash a thread that is still running.

    Args:
        received: The signals received by the process, which determine the exit code.
    """
    sys.stderr.flush()
    if signal.SIGINT in received and os.name == "posix":  # so that a surrounding shell loop also stops
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    codes = [130 if number == signal.SIGINT else 143 for number in received]
    os._exit((*codes, 0)[0])


def _filter(source: int, target: BinaryIO, replies: BinaryIO) -> None:
    """Copy the client's valid lines to `target`, and reply to all others, until the source ends or the target is closed."""
    with suppress(OSError, ValueError), target:
        for line in split_lines(source):
            if len(line) > MAX_BYTES:
                accepted, errors = b"", [error(INVALID_REQUEST, TOO_LONG)]
            else:
                accepted, errors = checked(line)
            for each in errors:
                replies.write(json.dumps(each).encode() + b"\n")
                replies.flush()
            while accepted:
                accepted = accepted[target.write(accepted) :]


def split_lines(source: int) -> Iterator[bytes]:
    """Yield the lines of a file. Of a line longer than `MAX_BYTES`, only the beginning is yielded, as soon as it is read."""
    line = bytearray()
    skipping = False  # whether the current line has already been yielded
    while chunk := os.read(source, CHUNK_BYTES):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if not skipping:
                yield bytes(line + end)
            line.clear()
            skipping = False
        if not skipping:
            line += rest
        if len(line) > MAX_BYTES:
            yield bytes(line)
            line.clear()
            skipping = True
    if line:
        yield bytes(line)

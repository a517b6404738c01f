"""Handles the server process's standard streams and signals."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import BinaryIO

ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CHUNK_BYTES = 2**16


@contextmanager
def real_streams() -> Iterator[list[int]]:
    """Set `sys.stdin` to a copy of stdin that reaches end of file on the first signal, and `sys.stdout` to the real stdout.

    Without the copy, a blocked read from stdin would delay shutdown. When the context ends, the first signal is re-raised. A second
    signal terminates the process immediately.

    Yields:
        A list of the signals received so far, updated as they arrive.
    """
    real_stdin = sys.stdin
    received: list[int] = []
    reader, target = os.pipe()
    writer = os.fdopen(target, "wb", buffering=0)

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
        threading.Thread(target=_copy, args=(os.dup(0), writer), name="evoprune-mcp-stdin", daemon=True).start()
        with redirect_stdout(sys.__stdout__):
            yield received
    finally:
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


def _copy(source: int, target: BinaryIO) -> None:
    """Copy data between two streams until the source ends or the target is closed."""
    with suppress(OSError, ValueError), target:
        while chunk := os.read(source, CHUNK_BYTES):
            while chunk:
                chunk = chunk[target.write(chunk) :]

"""A terminal to run commands on, and the text that a person sees on it in the end."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import time


class Screen:
    """A pseudo-terminal with a number of columns. Pass `end` to a program; `finish` returns its output."""

    def __init__(self, columns: int):
        self._ours, self.end = pty.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._seen = b""
        self._reader = threading.Thread(target=self._read)  # otherwise a program with much output would block forever
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # Linux raises this when the other end is closed
                return
            if not part:
                return
            self._seen += part

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 120) -> None:
        """Wait until a pattern has been written `times` times in total."""
        until = time.monotonic() + seconds
        while len(re.findall(pattern, self._seen.decode(errors="replace"), re.DOTALL)) < times:
            assert time.monotonic() < until, self._seen
            time.sleep(0.01)

    def finish(self) -> str:
        """Return all output. Every copy of `end` must be closed before."""
        self._reader.join()
        os.close(self._ours)
        return self._seen.decode()


def visible(written: str) -> list[str]:
    """Return the lines that stay on a terminal: spinners erase themselves, and colours are no text."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            if row == len(lines):
                lines.append("")
        elif part == "\x1b[2K":
            lines[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(match[1] or 1))
        elif not part.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + len(part) :]
            column += len(part)
    while lines and not lines[-1]:
        lines.pop()
    return lines

"""A terminal to run commands on, and what a person sees on it in the end."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
import time


class Screen:
    """A pseudo-terminal so many columns wide. `end` is what a program is given; `finish` tells what it wrote."""

    def __init__(self, columns: int):
        self._ours, self.end = pty.openpty()
        fcntl.ioctl(self.end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self._seen = b""
        self._reader = threading.Thread(target=self._read)  # or a program that writes much would wait for ever
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                return
            if not part:
                return
            self._seen += part

    def press(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def wait_for(self, pattern: str, times: int = 1, seconds: float = 120) -> None:
        """Until something of this pattern was written so many times in all."""
        until = time.monotonic() + seconds
        while len(re.findall(pattern, self._seen.decode(errors="replace"), re.DOTALL)) < times:
            assert time.monotonic() < until, self._seen
            time.sleep(0.01)

    def finish(self) -> str:
        """Everything that was written; every copy of `end` must be closed by now."""
        self._reader.join()
        os.close(self._ours)
        return self._seen.decode()


def visible(written: str) -> list[str]:
    """The lines that stay on a terminal: spinners wipe themselves out, and colour is no text."""
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

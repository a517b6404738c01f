"""Text that arrives piece by piece, on a terminal broken between words."""

import sys
from collections.abc import Callable

from evoprune_cli.terminal import encodable, width_of

TAB = 8


class Wrapped:
    """Writes pieces of a text as they come, each word as soon as the next one begins; a line of `width` columns ends before a word
    that does not fit."""

    def __init__(self, width: int, write: Callable[[str], None]):
        from rich.cells import cell_len

        self._width, self._write, self._cells = width, write, cell_len
        self._column, self._gap, self._word = 0, "", ""
        self._inside = False  # a word that is longer than a line: the terminal breaks it

    def add(self, text: str) -> None:
        """The next piece. Between two wide characters, as of Chinese, a line may end without a space."""
        for character in text:
            if character.isspace():
                self.flush()
                self._inside = False
                self._gap += character
                if character == "\n":
                    self._write(self._gap)
                    self._gap, self._column = "", 0
                continue
            self._word += character
            wide = self._cells(character) > 1
            if wide or self._cells(self._word) >= self._width:
                self.flush()
                self._inside = not wide

    def flush(self) -> None:
        """Writes the word that has begun."""
        if not self._word:
            return
        gap, word = sum(TAB if c == "\t" else 1 for c in self._gap), self._cells(self._word)
        if self._column and not self._inside and self._column + gap + word > self._width:
            self._gap, self._column, gap = "\n", 0, 0
        self._write(self._gap + self._word)
        self._column = self._column + gap + word
        if self._column > self._width:  # the terminal breaks what is longer than a line
            self._column %= self._width
        self._gap = self._word = ""


def print_stream(pieces) -> None:
    """Prints an answer as it is generated, and a newline even when it is interrupted; where stdout is no terminal, as it is."""

    def show(text: str) -> None:
        print(text, end="", flush=True)

    wrapped = Wrapped(width_of(sys.stdout), show) if sys.stdout.isatty() else None
    try:
        for piece in pieces:
            text = encodable(piece, sys.stdout)
            wrapped.add(text) if wrapped else show(text)
    finally:
        if wrapped:
            wrapped.flush()
        print(flush=True)

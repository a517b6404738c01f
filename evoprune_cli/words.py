"""The words of `ask`: which are files, and which is the question."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from evoprune.errors import UsageError, VideoError

STDIN = "-"
USAGE = 'evoprune ask video.mp4 "What happens?"'
# How paths look: a URL, the beginning of a path, or the ending of a file.
PATH = re.compile(r"\S+://\S+|(?:/|\.{1,2}/|~)\S*|\S*\.[A-Za-z0-9]{2,5}")


@dataclass(frozen=True)
class Words:
    """The inputs, and the question if there is one among the words."""

    inputs: tuple[str, ...]
    question: str | None = None

    @classmethod
    def of(cls, words: Sequence[str]) -> "Words":
        """The last of several words is the question, unless there is such a file, or it looks like the name of one."""
        *before, last = words
        if before and not _exists(last) and not PATH.fullmatch(last):
            return cls(tuple(before), last)
        return cls(tuple(words))

    def check(self) -> None:
        """Raises VideoError or UsageError where one of several inputs is no file. A single one is checked when it is opened."""
        if self.inputs.count(STDIN) > 1:
            raise UsageError("standard input is there twice", "it can be read once")
        if len(self.inputs) == 1 and self.question is None and re.search(r"\s", self.inputs[0]):
            (only,) = self.inputs
            if not _exists(only) and not PATH.search(only):
                raise VideoError(f"no such file: {only}", f"the video comes first: {USAGE}")
        missing = [word for word in self.inputs if not _exists(word)] if len(self.inputs) > 1 else []
        if not missing:
            return
        name, last = missing[0], self.inputs[-1]
        if name == self.inputs[0] and not PATH.fullmatch(name):
            raise VideoError(f"no such file: {name}", f"videos and pictures come first: {USAGE}")
        if not PATH.fullmatch(name):
            words, hint = [*missing, *filter(None, [self.question])], f"quote the question: {USAGE}; a second one: -Q"
            if any(word.startswith("-") for word in words):
                hint = "what follows -- is no option: put options before it"
            raise UsageError(f"unexpected extra words: {' '.join(words)}", hint)
        question = f"; to ask it as a question: -Q {name}" if name == last and self.question is None else ""
        raise VideoError(f"no such file: {name}", f"check the path{question}")


def _exists(word: str) -> bool:
    try:
        return word == STDIN or os.path.lexists(word)
    except ValueError:  # not a name that a file can have
        return False

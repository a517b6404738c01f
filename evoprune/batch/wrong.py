"""All that is wrong with the videos and rows of a batch, named in one error."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from evoprune.errors import EvopruneError, UsageError
from evoprune.text import some

MISSING = "download what is on the web first, e.g. with yt-dlp; paths in a file of rows are relative to it"


class Wrong:
    """Collects what is wrong, each with the hint that helps."""

    def __init__(self):
        self._found: list[tuple[str, str]] = []

    def add(self, message: str, hint: str) -> None:
        self._found.append((message, hint))

    @contextmanager
    def noting(self, place: str, hint: str) -> Iterator[None]:
        """Adds what a block raises, with the `place` before it; `hint` is for what has none of its own."""
        try:
            yield
        except (ValueError, EvopruneError) as problem:
            self.add(f"{place}{problem}", getattr(problem, "hint", None) or hint)

    def check(self, paths: Iterable[str] = (), name: str = "") -> None:
        """Raises UsageError if anything was added: it then names missing videos as well.

        Args:
            paths: of the videos.
            name: of the file of rows. Messages begin with it; the error has it once.
        """
        if not self._found:
            return
        missing = [path for path in dict.fromkeys(paths) if not os.path.exists(path)]
        found = [*self._found, *((f"no such file: {path}", MISSING) for path in missing)]
        first, *others = (message for message, _ in found)
        messages = [first, *(message.removeprefix(f"{name}, ") for message in others)]
        raise UsageError(some(messages, "; "), some(list(dict.fromkeys(hint for _, hint in found)), "; "))

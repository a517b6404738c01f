"""All that is wrong with the videos and rows of a batch, named in one error."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from evoprune.errors import EvopruneError, UsageError
from evoprune.text import some


def missing_hint(path: str, in_rows: bool) -> str:
    """What helps where a video is missing. `in_rows`: a file of rows names it."""
    if "://" in path:
        return "download what is on the web first, e.g. with yt-dlp"
    return "paths in a file of rows are relative to it" if in_rows else "check the path"


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
            self.add(f"{place}{getattr(problem, 'message', problem)}", getattr(problem, "hint", None) or hint)

    def check(self, videos: Mapping[str, str], name: str = "") -> None:
        """Raises UsageError if anything was added: it then names missing videos as well.

        Args:
            videos: by their paths, what messages about them begin with: the place of a row, or nothing.
            name: of the file of rows. Messages begin with it; the error has it once.
        """
        if not self._found:
            return
        missing = [path for path in videos if not os.path.exists(path)]
        gone = ((f"{videos[path]}no such file: {path}", missing_hint(path, bool(name))) for path in missing)
        found = [*self._found, *gone]
        first, *others = (message for message, _ in found)
        messages = [first, *(message.removeprefix(f"{name}, ") for message in others)]
        raise UsageError(some(messages, "; "), some(list(dict.fromkeys(hint for _, hint in found)), "; "))

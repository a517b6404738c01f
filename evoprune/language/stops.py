"""Ends an answer at the first stop string."""

from collections.abc import Iterable, Iterator, Sequence


class StopStrings:
    """Ends an answer before its first stop string. Stop strings must not be empty.

    The first stop string is the one completed first. If the same character completes multiple stop strings, the longest one is
    used. This makes the result independent of how the text is split into pieces.

    Attributes:
        found: The stop string that ended the answer, or None.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = stops

    def cut(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """Yield the pieces from `stream_answer` up to the first stop string. Stop strings in reasoning text are ignored.

        Text that may be the beginning of a stop string is held back until the next piece is available.
        """
        held_back = ""
        for piece, thought in pieces:
            if thought:
                yield piece, True
                continue
            held_back += piece
            if self._find_stop(held_back):
                held_back = held_back[: held_back.index(self.found)]
                break
            certain = len(held_back) - self._partial_stop_length(held_back)
            if certain:
                yield held_back[:certain], False
            held_back = held_back[certain:]
        if held_back:
            yield held_back, False

    def _find_stop(self, text: str) -> bool:
        """Return True if the text contains a stop string, and store the first stop string in `found`."""
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            *_, self.found = min(ends)
        return bool(ends)

    def _partial_stop_length(self, text: str) -> int:
        """Return the length of the longest text suffix that may be the beginning of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)

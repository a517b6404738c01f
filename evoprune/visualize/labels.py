"""Words beside the marks of a plot, where they hide least."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from evoprune.visualize.svg import reach, text

Place = tuple[float, float]  # in pixels
Box = tuple[float, float, float, float]  # left, right, top and bottom, in pixels

SIZE, RISE, DROP = 11, 9.5, 3.5  # of the letters in pixels, and how far they reach above and below their baseline
MARGIN = 3  # pixels between words and what they must not touch
OVER_WORDS, AWAY = (
    50.0,
    0.4,
)  # what it costs to cover a label, and to stand a pixel farther from the mark, in covered places


class Labels:
    """Finds room for the labels of one plot, one after another.

    Args:
        room: what no label leaves.
    """

    def __init__(self, room: Box):
        self._room, self._inked, self._boxes = room, [], []

    def avoid(self, places: Iterable[Place], weight: int = 1) -> None:
        """Notes where something is drawn. A label had better cover one place of weight 1 than one of weight 2."""
        self._inked += [place for place in places for _ in range(weight)]

    def avoid_line(self, places: Sequence[Place]) -> None:
        """Notes a line through some places."""
        for (x, y), (u, v) in pairwise(places):
            steps = math.ceil(math.dist((x, y), (u, v)) / 4)
            self.avoid((x + (u - x) * n / steps, y + (v - y) * n / steps) for n in range(steps + 1) if steps)

    def place(self, words: str, marks: Sequence[Place], fill: str, weight: int) -> str:
        """The words as SVG, beside one of the marks."""
        wide = reach(words, SIZE, weight)
        left, bottom = min(_beside(marks, wide), key=lambda place: self._cost(place, wide))[1:]
        self._boxes.append((left, left + wide, bottom - RISE, bottom + DROP))
        return text(left, bottom, words, fill=fill, size=SIZE, weight=weight)

    def _cost(self, place: tuple[float, float, float], wide: float) -> float:
        away, x, y = place
        left, right, top, bottom = x, x + wide, y - RISE, y + DROP
        if left < self._room[0] or right > self._room[1] or top < self._room[2] or bottom > self._room[3]:
            return math.inf
        left, right, top, bottom = left - MARGIN, right + MARGIN, top - MARGIN / 2, bottom + MARGIN / 2
        words = sum(left < box[1] and box[0] < right and top < box[3] and box[2] < bottom for box in self._boxes)
        return sum(left < u < right and top < v < bottom for u, v in self._inked) + OVER_WORDS * words + AWAY * away


def _beside(marks: Sequence[Place], wide: float) -> list[tuple[float, float, float]]:
    """Places of words around marks: the distance from the usual place, and the left and bottom ends."""
    offsets = [(8, 4), (-8 - wide, 4)]  # to the right, to the left
    for dy in (-11, 18, -21, 28, -31, 38):  # above and below, ever farther
        offsets += [(dx, dy) for dx in (-wide / 2, -8, 8 - wide, 8, -8 - wide)]
    return [(abs(dy - 4), x + dx, y + dy) for dx, dy in offsets for x, y in marks]

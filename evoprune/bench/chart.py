"""Charts as SVG, as wide as a page of text: ticks at round numbers, intervals, a legend. The same data give the same bytes."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise, product

from evoprune.bench.svg import COLOURS, GRID, INK, LETTER, SOFT, document, reach, text

__all__ = ["COLOURS", "INK", "Panel", "Point", "Series", "draw", "ticks"]

# All in pixels.
WIDTH, EDGE = 830, 24  # of a chart of one or two panels, a page's width on GitHub, and at its edges
PLOT_WIDTH, PLOT_HEIGHT = 330, 300  # of a panel's plot; the width is the least
ROW_PLOT_WIDTH, ROW = 180, 24  # at least, of a plot of named rows; and from one row to the next
LEFT, GAP, BOTTOM = 62, 74, 58  # left of the first plot, between plots, and below them
CLOSE = 26  # labels that are nearer to one another overlap
MARK = 3.2  # radius of a mark
CAP, ROW_CAP = 5.5, 3  # half the length of the bars at an interval's ends, to be seen beside the mark; and with rows
BESIDE, SPREAD = 7, 28  # from a mark to one that it would hide, and at most from the first of several to the last
LABEL, RISE, DROP = 11, 11, 5  # the letters of labels, and the room that they need above and below their baseline
CUT = 1 / 3  # an axis may start above zero where everything lies above this share of the highest value
# Places of a label to the right and left of a mark, then above and below, ever farther: its left end in widths of the label and in
# pixels, and its baseline.
OFFSETS = [(0, 8, 4), (-1, -8, 4)]
OFFSETS += [
    (w, x, y) for y, (w, x) in product((-11, 18, -21, 28, -31, 38), ((-0.5, 0), (0, -8), (-1, 8), (0, 8), (-1, -8)))
]

Place = tuple[float, float]  # x and y


@dataclass(frozen=True)
class Point:
    """A measured value, its interval from `low` to `high` where that is known, and a label beside it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""

    @classmethod
    def percent(cls, x: float, row: dict, value: str, label: str) -> "Point":
        """A share of a row of results and its interval, in percent."""
        return cls(x, 100 * row[value], 100 * row["low"], 100 * row["high"], label)


@dataclass(frozen=True)
class Series:
    """Points joined by a line. A dashed line is derived, not measured, and has no marks.

    `hollow` marks tell a series from another one of the same colour.
    """

    name: str
    points: tuple[Point, ...]
    colour: str = COLOURS[0]
    dashed: bool = False
    hollow: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot.

    `x_ticks` replace those at round numbers. Unless `from_zero`, the axis of the values with intervals starts at the round number
    below the lowest, where all are above a third of the highest, and its label says so.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[float, ...] | None = None
    from_zero: bool = True

    @property
    def points(self) -> list[Point]:
        return [point for series in self.series for point in series.points]


def ticks(top: float, most: int = 6, low: float = 0.0) -> list[float]:
    """About `most` + 1 round numbers, from 0, or from the one below `low`, to at least `top`."""
    if not top > low:
        return [low, low + 1.0]
    power = 10.0 ** math.floor(math.log10((top - low) / most))
    step = next(power * n for n in (1, 2, 2.5, 5, 10, 20) if power * n * most >= (top - low) * (1 - 1e-9))
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(top / step - 1e-9) + 1)]


def draw(title: str, subtitle: str, panels: Sequence[Panel], legend: bool = True, rows: Sequence[str] = ()) -> str:
    """An SVG document of panels side by side; those whose values have the same label share the axis of the values.

    Args:
        legend: whether there is one; otherwise each series has its name beside one of its points.
        rows: names. With them, values go to the right: a point's `x` is the value with its interval, and `y` is the number of its
            row, the first on top. Only dashed series are lines.
    """
    left, gap, least = (EDGE + max(map(reach, rows)) + 12, GAP / 2, ROW_PLOT_WIDTH) if rows else (LEFT, GAP, PLOT_WIDTH)
    height = ROW * len(rows) if rows else PLOT_HEIGHT
    plot = max(least, (WIDTH - left - EDGE + gap) / max(1, len(panels)) - gap)
    width = math.ceil(left + len(panels) * (plot + gap) - gap + EDGE)
    elements, top = _head(title, subtitle, panels if legend else (), width)
    elements += [text(left - 12, top + ROW * (n + 0.5) + 4, name, anchor="end") for n, name in enumerate(rows)]
    for number, panel in enumerate(panels):
        alike = [other for other in panels if other.y_label == panel.y_label]
        place = left + number * (plot + gap), top, plot, height
        every = ((p.x if rows else p.y, p.low, p.high) for other in alike for p in other.points)
        ends = [end for point in every for end in point if end is not None]
        low, high = min(ends, default=0), max(ends, default=0)
        cut = not any(other.from_zero for other in alike) and low >= CUT * high > 0
        values = ticks(high, low=low if cut else 0.0)
        elements += _Plot(panel, *place, values, len(rows)).drawn(named=not legend)
    return document(title, width, top + height + BOTTOM, elements)


def _head(title: str, subtitle: str, panels: Sequence[Panel], width: int) -> tuple[list[str], int]:
    """Title, subtitle and legend, each in as many lines as it needs; and where the plots begin."""
    elements, y = [], 16
    for words, look in ((title, {"size": 17, "weight": 600}), (subtitle, {"fill": SOFT, "size": 12})):
        letter = LETTER * look["size"] / 12 * (1.1 if "weight" in look else 1.0)  # bold letters are wider
        for line in textwrap.wrap(words, int((width - 2 * EDGE) / letter)):
            y += round(1.35 * look["size"])
            elements.append(text(EDGE, y, line, **look))
    x, y = EDGE, y + 26
    series = {series.name: series for panel in panels for series in panel.series}
    for one in series.values():
        wide = 30 + reach(one.name) + 18
        if x > EDGE and x + wide > width - EDGE:
            x, y = EDGE, y + 20
        elements.append(_line([(x, y - 4), (x + 22, y - 4)], one))
        elements += [] if one.dashed else [_mark((x + 11, y - 4), one)]
        elements.append(text(x + 30, y, one.name))
        x += wide
    return elements, y + (48 if series else 24)


@dataclass
class _Plot:
    """One panel, its place in pixels, and the ticks of its values. With rows, positions go down and values to the right."""

    panel: Panel
    left: float
    top: float
    width: float
    height: float
    values: Sequence[float]
    rows: int
    ink: list[Place] = field(default_factory=list)  # where something is drawn that labels had better not hide

    def __post_init__(self):
        right = max((point.x for point in self.panel.points), default=0)
        self.x_ticks = [] if self.rows else self.panel.x_ticks or ticks(right)
        self.first, self.last = (-0.5, self.rows - 0.5) if self.rows else (0.0, 1.04 * max(right, *self.x_ticks))

    def at(self, position: float, value: float) -> Place:
        """Pixels along the axis of positions and along that of values."""
        along = (position - self.first) / (self.last - self.first)
        share = (value - self.values[0]) / (self.values[-1] - self.values[0])
        if self.rows:
            return self.top + self.height * along, self.left + self.width * share
        return self.left + self.width * along, self.top + self.height * (1 - share)

    def xy(self, along: float, value: float) -> Place:
        return (value, along) if self.rows else (along, value)

    def drawn(self, named: bool) -> Iterable[str]:
        """Its elements; `named`: whether each series has its name beside one of its points."""
        panel, bottom, middle = self.panel, self.top + self.height, self.left + self.width / 2
        yield text(self.left, self.top - (14 if self.rows else 24), panel.title, size=13, weight=600)
        for value in self.values:
            (x, y), end = (self.xy(*self.at(position, value)) for position in (self.first, self.last))
            yield f'<path d="{_stroke((x, y), end)}" stroke="{SOFT if value == self.values[0] else GRID}"/>'
            place = (x, bottom + 19, f"{value:,.6g}", "middle") if self.rows else (x - 8, y + 4, f"{value:,.6g}", "end")
            yield text(*place, fill=SOFT)
        last = -math.inf
        for x, value in ((self.at(value, 0)[0], value) for value in self.x_ticks):
            if x - last >= CLOSE:
                last = x
                yield f'<path d="M{x:.1f} {bottom:.1f}v5" stroke="{SOFT}"/>'
                yield text(x, bottom + 19, f"{value:,.6g}", anchor="middle", fill=SOFT)
        start = "" if self.values[0] == 0 else f" (axis from {self.values[0]:,.6g})"
        yield text(middle, bottom + 44, panel.x_label + start * bool(self.rows), anchor="middle")
        if not self.rows:
            x, y = self.left - 46, self.top + self.height / 2
            yield text(x, y, panel.y_label + start, anchor="middle", transform=f"rotate(-90 {x:.1f} {y:.1f})")
        yield from self._series(named)

    def _series(self, named: bool) -> Iterable[str]:
        """Lines, marks, intervals, and labels where they hide least. A label near a point that has one is left out."""
        spots = self._side_by_side()
        places = [[self.xy(along, value) for along, value, *_ in mine] for mine in spots]
        drawn = list(zip(self.panel.series, spots, places, strict=True))
        for series, _, here in drawn:
            if series.dashed or not self.rows:
                self.ink += _along(here)
                yield _line(here, series)
        cap, marked = ROW_CAP if self.rows else CAP, [each for each in drawn if not each[0].dashed]
        for series, mine, here in marked:
            for (along, _, *ends), place in zip(mine, here, strict=True):
                self.ink += [place] * 12  # a label had better hide a line than a mark
                yield _mark(place, series)
                if ends:
                    bars = [[(along - cap, end), (along + cap, end)] for end in ends]
                    strokes = [[(along, end) for end in ends], *bars]
                    strokes = [[self.xy(*end) for end in stroke] for stroke in strokes]
                    self.ink += chain(*map(_along, strokes))
                    path = "".join(_stroke(*stroke) for stroke in strokes)
                    yield f'<path d="{path}" stroke="{series.colour}" stroke-width="1.4" fill="none"/>'
        labelled: list[Place] = []
        for series, _, here in marked:
            if named and series.name:
                yield self._label(series.name, here, fill=series.colour, weight=600)
            for point, place in zip(series.points, here, strict=True):
                if point.label and all(math.dist(place, other) > CLOSE for other in labelled):
                    labelled.append(place)
                    yield self._label(point.label, [place], fill=series.colour if named else SOFT)

    def _spot(self, point: Point) -> tuple[float, ...]:
        """Pixels along the axis of positions, and along that of values: of the mark and of the ends of its interval."""
        position, value = (point.y, point.x) if self.rows else (point.x, point.y)
        ends = [] if point.low is None or point.high is None else [point.low, point.high]
        return self.at(position, value)[0], *(self.at(position, each)[1] for each in (value, *ends))

    def _side_by_side(self) -> list[list[tuple[float, ...]]]:
        """The spots of each series: side by side, with their intervals, where those of several would hide each other."""

        def hides(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
            (low, high), (start, end) = (sorted(spot[2:]) or (spot[1] - MARK, spot[1] + MARK) for spot in (a, b))
            return abs(a[0] - b[0]) < 2 * MARK and low < end + MARK and start < high + MARK

        spots, crowds = [[self._spot(point) for point in series.points] for series in self.panel.series], []
        for s, series in enumerate(self.panel.series):
            for p in range(0 if series.dashed else len(series.points)):
                near = [crowd for crowd in crowds if any(s != t and hides(spots[s][p], spots[t][q]) for t, q in crowd)]
                crowds = [crowd for crowd in crowds if crowd not in near] + [sorted([(s, p), *chain(*near)])]
        for crowd in crowds:
            middle = sum(spots[s][p][0] for s, p in crowd) / len(crowd)
            step = min(BESIDE, SPREAD / max(1, len(crowd) - 1))
            for number, (s, p) in enumerate(crowd):
                spots[s][p] = (middle + step * (number - (len(crowd) - 1) / 2), *spots[s][p][1:])
        return spots

    def _label(self, words: str, marks: Sequence[Place], **look: str | int) -> str:
        """Words beside one of the marks, where they hide least."""
        wide = reach(words, LABEL, look.get("weight", 400))

        def cost(place: tuple[float, float, float]) -> float:
            x, y, away = place
            inside = self.left <= x and x + wide <= self.left + self.width + EDGE - 2
            if not inside or y - RISE < self.top - 21 or y + DROP > self.top + self.height:
                return math.inf
            return sum(x - 3 < u < x + wide + 3 and y - RISE < v < y + DROP for u, v in self.ink) + 0.4 * away

        places = ((x + w * wide + dx, y + dy, abs(dy - 4)) for w, dx, dy in OFFSETS for x, y in marks)
        x, y, _ = min(places, key=cost)
        self.ink += [(x + wide * n / 20, y - up) for n in range(21) for up in (0, 4, 8)]
        return text(x, y, words, size=LABEL, **look)


def _along(places: Sequence[Place]) -> Iterable[Place]:
    """Places on a line, every four pixels."""
    for (x, y), (u, v) in pairwise(places):
        steps = math.ceil(math.dist((x, y), (u, v)) / 4)
        yield from ((x + (u - x) * n / steps, y + (v - y) * n / steps) for n in range(steps + 1) if steps)


def _stroke(start: Place, end: Place) -> str:
    return f"M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"


def _line(places: Sequence[Place], series: Series) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    look = ' stroke-width="1.6" stroke-dasharray="5 4"' if series.dashed else ' stroke-width="2"'
    return f'<path d="M{path}" fill="none" stroke="{series.colour}" stroke-linejoin="round"{look}/>'


def _mark(place: Place, series: Series) -> str:
    fill, stroke, wide = ("#FFFFFF", series.colour, 1.6) if series.hollow else (series.colour, "#FFFFFF", 1)
    x, y = place
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{MARK}" fill="{fill}" stroke="{stroke}" stroke-width="{wide}"/>'

"""Charts as SVG, as wide as a page of text: ticks at round numbers, intervals, a legend. The same data give the same bytes."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from evoprune.visualize.labels import Labels
from evoprune.visualize.svg import COLOURS, GRID, INK, LETTER, SOFT, document, reach, text

__all__ = ["COLOURS", "INK", "Panel", "Point", "Series", "draw", "draw_rows", "ticks"]

WIDTH, EDGE = 830, 24  # pixels of a chart of one or two panels, a page's width on GitHub, and at its edges
PLOT_WIDTH, PLOT_HEIGHT = 330, 300  # pixels of a panel's plot; the width is the least
ROW_PLOT_WIDTH = 180  # at least, of a plot of named rows
LEFT, GAP, BOTTOM = 62, 74, 58  # pixels left of the first plot, between plots, and below them
CLOSE = 26  # pixels: labels that are nearer to one another overlap
ROW = 24  # pixels from one named row to the next
CUT = 1 / 3  # an axis may start above zero where everything lies above this share of the highest value
MARK, CAP = (
    3.2,
    5.5,
)  # radius of a mark, and half the length of the strokes at an interval's ends, which must be seen beside it
BESIDE, SPREAD = (
    7,
    28,
)  # pixels from a mark to one that it would hide, and at most from the first of several to the last

Place = tuple[float, float]  # in pixels


@dataclass(frozen=True)
class Point:
    """A measured value, its interval from `low` to `high` where that is known, and a label beside it."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


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

    Attributes:
        x_ticks: replace the ticks at round numbers.
        from_zero: whether the axis of the values with intervals starts at zero. If not, it starts at a round number below the
            lowest of them, where all are above a third of the highest, and its label says so.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[float, ...] | None = None
    from_zero: bool = True


def ticks(top: float, most: int = 6, low: float = 0.0) -> list[float]:
    """About `most` + 1 round numbers, from 0, or from the one below `low`, to at least `top`."""
    if not top > low:
        return [low, low + 1.0]
    span = top - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * n for n in (1, 2, 2.5, 5, 10, 20) if power * n * most >= span * (1 - 1e-9))
    return [n * step for n in range(math.floor(low / step + 1e-9), math.ceil(top / step - 1e-9) + 1)]


def draw(title: str, subtitle: str, panels: Sequence[Panel], legend: bool = True) -> str:
    """An SVG document of panels side by side under one legend, or with the name of each series beside one of its points.

    Panels whose values have the same label share the axis of the values.
    """
    plot = max(PLOT_WIDTH, (WIDTH - LEFT - EDGE + GAP) / max(1, len(panels)) - GAP)
    width = math.ceil(LEFT + len(panels) * (plot + GAP) - GAP + EDGE)
    elements, top = _head(title, subtitle, panels if legend else (), width)
    for number, panel in enumerate(panels):
        alike = [other for other in panels if other.y_label == panel.y_label]
        y_ticks = _ticks([(p.y, p.low, p.high) for other in alike for s in other.series for p in s.points], alike)
        elements += _panel(panel, y_ticks, LEFT + number * (plot + GAP), top, plot, named=not legend)
    return document(title, width, top + PLOT_HEIGHT + BOTTOM, elements)


def draw_rows(title: str, subtitle: str, names: Sequence[str], panels: Sequence[Panel]) -> str:
    """An SVG document of named rows, the first on top, with dots and their intervals, in panels side by side.

    A point's `x` is the value, `low` and `high` are its interval, and `y` is the number of its row. The series of a panel are drawn
    a little above one another. A dashed line is drawn through its points. All panels have the same axis.
    """
    left = EDGE + max(map(reach, names), default=0) + 12
    room = (WIDTH - EDGE - left + GAP / 2) / max(1, len(panels)) - GAP / 2
    plot = max(ROW_PLOT_WIDTH, room)
    width = math.ceil(left + len(panels) * (plot + GAP / 2) - GAP / 2 + EDGE)
    elements, top = _head(title, subtitle, panels, width)
    for row, name in enumerate(names):
        elements.append(text(left - 12, top + ROW * (row + 0.5) + 4, name, anchor="end"))
    shared = _ticks([(p.x, p.low, p.high) for panel in panels for s in panel.series for p in s.points], panels)
    for number, panel in enumerate(panels):
        elements += _rows(panel, left + number * (plot + GAP / 2), top, plot, len(names), shared)
    return document(title, width, math.ceil(top + ROW * len(names) + BOTTOM), elements)


def _ticks(values: Iterable[tuple[float, float | None, float | None]], panels: Sequence[Panel]) -> list[float]:
    """The ticks of an axis of values with their intervals."""
    ends = [end for value in values for end in value if end is not None]
    low, high = min(ends, default=0), max(ends, default=0)
    cut = not any(panel.from_zero for panel in panels) and low >= CUT * high > 0
    return ticks(high, low=low if cut else 0.0)


def _axis_label(label: str, found: Sequence[float]) -> str:
    return label if found[0] == 0 else f"{label} (axis from {found[0]:,.6g})"


def _head(title: str, subtitle: str, panels: Sequence[Panel], width: int) -> tuple[list[str], int]:
    """Title, subtitle and legend, each in as many lines as it needs; and where the plots begin."""
    elements, y = [], 16
    for words, size, fill, weight in ((title, 17, INK, 600), (subtitle, 12, SOFT, 400)):
        letter = LETTER * size / 12 * (1.1 if weight > 400 else 1.0)  # bold letters are wider
        for line in textwrap.wrap(words, int((width - 2 * EDGE) / letter)):
            y += round(1.35 * size)
            elements.append(text(EDGE, y, line, fill=fill, size=size, weight=weight))
    x, y = EDGE, y + 26
    series = {series.name: series for panel in panels for series in panel.series}
    for one in series.values():
        wide = 30 + reach(one.name) + 18
        if x > EDGE and x + wide > width - EDGE:
            x, y = EDGE, y + 20
        elements.append(_line([(x, y - 4), (x + 22, y - 4)], one))
        elements += [] if one.dashed else [_mark(x + 11, y - 4, one)]
        elements.append(text(x + 30, y, one.name))
        x += wide
    return elements, y + (48 if series else 24)


def _rows(panel: Panel, left: float, top: float, plot: float, rows: int, x_ticks: Sequence[float]) -> Iterable[str]:
    bottom, first, span = top + ROW * rows, x_ticks[0], x_ticks[-1] - x_ticks[0]

    def at(x: float, row: float) -> tuple[float, float]:
        return left + plot * (x - first) / span, top + ROW * (row + 0.5)

    yield text(left, top - 14, panel.title, size=13, weight=600)
    for value in x_ticks:
        x, _ = at(value, 0)
        yield f'<path d="M{x:.1f} {top}V{bottom:.1f}" stroke="{SOFT if value == first else GRID}"/>'
        yield text(x, bottom + 19, f"{value:,.6g}", anchor="middle", fill=SOFT)
    yield text(left + plot / 2, bottom + 44, _axis_label(panel.x_label, x_ticks), anchor="middle")
    marked = [series for series in panel.series if not series.dashed]
    yield from (_line([at(p.x, p.y) for p in series.points], series) for series in panel.series if series.dashed)
    for number, series in enumerate(marked):
        for point in series.points:
            x, y = at(point.x, point.y + (number - (len(marked) - 1) / 2) * 0.27)
            yield _mark(x, y, series)
            if point.low is not None and point.high is not None:
                (low, _), (high, _) = at(point.low, 0), at(point.high, 0)
                yield _interval(
                    f"M{low:.1f} {y:.1f}H{high:.1f}", [f"M{end:.1f} {y - 3:.1f}v6" for end in (low, high)], series
                )


def _panel(panel: Panel, y_ticks: Sequence[float], left: float, top: float, plot: float, named: bool) -> Iterable[str]:
    right = max((point.x for series in panel.series for point in series.points), default=0)
    x_ticks = ticks(right) if panel.x_ticks is None else panel.x_ticks
    widest = max(right, *x_ticks) * 1.04

    def at(x: float, y: float) -> tuple[float, float]:
        return left + plot * x / widest, top + PLOT_HEIGHT * (1 - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

    yield text(left, top - 24, panel.title, size=13, weight=600)
    for value in y_ticks:
        _, y = at(0, value)
        yield f'<path d="M{left:.1f} {y:.1f}h{plot:.1f}" stroke="{SOFT if value == y_ticks[0] else GRID}"/>'
        yield text(left - 8, y + 4, f"{value:,.6g}", anchor="end", fill=SOFT)
    last = -math.inf
    for value in x_ticks:
        x, y = at(value, y_ticks[0])
        if x - last >= CLOSE:
            last = x
            yield f'<path d="M{x:.1f} {y:.1f}v5" stroke="{SOFT}"/>'
            yield text(x, y + 19, f"{value:,.6g}", anchor="middle", fill=SOFT)
    yield text(left + plot / 2, top + PLOT_HEIGHT + 44, panel.x_label, anchor="middle")
    y, words = top + PLOT_HEIGHT / 2, _axis_label(panel.y_label, y_ticks)
    yield text(left - 46, y, words, anchor="middle", transform=f"rotate(-90 {left - 46:.1f} {y:.1f})")
    yield from _curves(panel, at, Labels((left, left + plot + EDGE - 2, top - 21, top + PLOT_HEIGHT)), named)


class _Spot(NamedTuple):
    """Where a point is drawn, in pixels: its mark, and the upper and lower end of its interval, or of its mark if it has none."""

    x: float
    y: float
    top: float
    bottom: float


def _curves(panel: Panel, at: Callable[[float, float], Place], labels: Labels, named: bool) -> Iterable[str]:
    """Lines, marks, intervals, and labels where they hide least. A label near a point that has one is left out."""
    spots = _side_by_side(panel.series, at)
    for series, mine in zip(panel.series, spots, strict=True):
        places = [(spot.x, spot.y) for spot in mine]
        labels.avoid_line(places)
        yield _line(places, series)
    marked = [(s, mine) for s, mine in zip(panel.series, spots, strict=True) if not s.dashed]
    for series, mine in marked:
        for point, (x, y, top, bottom) in zip(series.points, mine, strict=True):
            labels.avoid([(x, y)], weight=12)  # a label had better hide a line than a mark
            yield _mark(x, y, series)
            if point.low is not None and point.high is not None:
                labels.avoid_line([(x, bottom), (x, top)])
                for end in (bottom, top):
                    labels.avoid_line([(x - CAP, end), (x + CAP, end)])
                ends = [f"M{x - CAP:.1f} {end:.1f}h{2 * CAP}" for end in (bottom, top)]
                yield _interval(f"M{x:.1f} {bottom:.1f}V{top:.1f}", ends, series)
    labelled: list[Place] = []
    for series, mine in marked:
        fill, weight = (series.colour, 600) if named else (SOFT, 400)
        places = [(spot.x, spot.y) for spot in mine]
        if named and series.name:
            yield labels.place(series.name, places, fill, weight)
        for point, place in zip(series.points, places, strict=True):
            if point.label and all(math.dist(place, other) > CLOSE for other in labelled):
                labelled.append(place)
                yield labels.place(point.label, [place], fill, 400)


def _side_by_side(lines: Sequence[Series], at: Callable[[float, float], Place]) -> list[list[_Spot]]:
    """Where the points of each series are drawn: at their values, but side by side where they would hide each other.

    A mark and its interval move together, so that it is seen whose interval it is.
    """
    spots = [[_spot(point, at) for point in series.points] for series in lines]
    keys = [(s, p) for s, series in enumerate(lines) if not series.dashed for p in range(len(series.points))]
    crowds = {key: [key] for key in keys}
    for a, b in combinations(keys, 2):
        if a[0] != b[0] and crowds[a] is not crowds[b] and _hide(spots[a[0]][a[1]], spots[b[0]][b[1]]):
            crowds[a] += crowds[b]
            crowds |= dict.fromkeys(crowds[b], crowds[a])
    for crowd in {id(crowd): crowd for crowd in crowds.values() if len(crowd) > 1}.values():
        middle = sum(spots[s][p].x for s, p in crowd) / len(crowd)
        step = min(BESIDE, SPREAD / (len(crowd) - 1))
        for number, (s, p) in enumerate(sorted(crowd)):
            spots[s][p] = spots[s][p]._replace(x=middle + step * (number - (len(crowd) - 1) / 2))
    return spots


def _spot(point: Point, at: Callable[[float, float], Place]) -> _Spot:
    x, y = at(point.x, point.y)
    if point.low is None or point.high is None:
        return _Spot(x, y, y - MARK, y + MARK)
    return _Spot(x, y, at(point.x, point.high)[1], at(point.x, point.low)[1])


def _hide(a: _Spot, b: _Spot) -> bool:
    return abs(a.x - b.x) < 2 * MARK and a.top < b.bottom + MARK and b.top < a.bottom + MARK


def _interval(path: str, ends: Sequence[str], series: Series) -> str:
    """A stroke with a bar at either end, so that an interval shorter than its mark is seen too."""
    return f'<path d="{path}{"".join(ends)}" stroke="{series.colour}" stroke-width="1.4" fill="none"/>'


def _line(points: Sequence[tuple[float, float]], series: Series) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style = f'stroke="{series.colour}" stroke-width="{1.6 if series.dashed else 2}" stroke-linejoin="round"'
    return f'<path d="M{path}" fill="none" {style}{" stroke-dasharray=" + chr(34) + "5 4" + chr(34) if series.dashed else ""}/>'


def _mark(x: float, y: float, series: Series) -> str:
    fill, stroke, wide = ("#FFFFFF", series.colour, 1.6) if series.hollow else (series.colour, "#FFFFFF", 1)
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{MARK}" fill="{fill}" stroke="{stroke}" stroke-width="{wide}"/>'

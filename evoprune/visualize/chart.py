"""Charts as SVG: axes that start at zero, ticks at round numbers, a legend. The same data give the same bytes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

# Colours that colour-blind readers can distinguish on white (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, SOFT, GRID = "#222222", "#666666", "#E4E4E4"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
PLOT_WIDTH, PLOT_HEIGHT = 330, 300  # pixels of a panel's plot
LEFT, GAP, TOP, BOTTOM = 62, 74, 104, 58  # pixels left of the first plot, between plots, above and below them
LETTER = 6.7  # pixels: the average width of a letter of size 12
CLOSE = 26  # pixels: labels that are nearer to one another overlap
ROW = 20  # pixels from one named row to the next


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
    """Points joined by a line. A dashed line is derived, not measured, and has no marks."""

    name: str
    points: tuple[Point, ...]
    colour: str = COLOURS[0]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot. `x_ticks` replace the ticks at round numbers."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[float, ...] | None = None


def ticks(top: float, most: int = 6) -> list[float]:
    """At most `most` + 1 round numbers, from 0 to at least `top`."""
    if not top > 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / most))
    step = next(power * n for n in (1, 2, 2.5, 5, 10, 20) if power * n * most >= top * (1 - 1e-9))
    return [n * step for n in range(math.ceil(top / step - 1e-9) + 1)]


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """An SVG document of panels side by side with one legend."""
    legend = {series.name: series for panel in panels for series in panel.series}
    right = LEFT + len(panels) * PLOT_WIDTH + (len(panels) - 1) * GAP + 28
    width = max(
        right + 34 + LETTER * max(map(len, legend), default=0) + 16, 24 + LETTER * max(len(subtitle), 1.3 * len(title))
    )
    elements = _opening(title, subtitle, math.ceil(width), TOP + PLOT_HEIGHT + BOTTOM)
    for number, panel in enumerate(panels):
        elements += _panel(panel, LEFT + number * (PLOT_WIDTH + GAP))
    elements += _legend(legend.values(), right)
    return "\n".join([*elements, "</svg>", ""])


def draw_rows(title: str, subtitle: str, names: Sequence[str], panels: Sequence[Panel]) -> str:
    """An SVG document of named rows, the first on top, with dots and their intervals, in panels side by side.

    A point's `x` is the value, `low` and `high` are its interval, and `y` is the number of its row. The series of a panel are drawn
    a little above one another. A dashed line is drawn through its points.
    """
    legend = {series.name: series for panel in panels for series in panel.series}
    left = 24 + LETTER * max(map(len, names), default=0) + 12
    right = left + len(panels) * (PLOT_WIDTH + GAP / 2)
    width = max(
        right + 34 + LETTER * max(map(len, legend), default=0) + 16, 24 + LETTER * max(len(subtitle), 1.3 * len(title))
    )
    bottom = TOP + ROW * len(names)
    elements = _opening(title, subtitle, math.ceil(width), bottom + BOTTOM)
    for row, name in enumerate(names):
        elements.append(_text(left - 12, TOP + ROW * (row + 0.5) + 4, name, anchor="end"))
    for number, panel in enumerate(panels):
        elements += _rows(panel, left + number * (PLOT_WIDTH + GAP / 2), bottom)
    elements += _legend(legend.values(), right)
    return "\n".join([*elements, "</svg>", ""])


def _rows(panel: Panel, left: float, bottom: float) -> Iterable[str]:
    values = [value for series in panel.series for p in series.points for value in (p.x, p.high or 0)]
    x_ticks = ticks(max(values, default=0)) if panel.x_ticks is None else panel.x_ticks
    yield _text(left, TOP - 16, panel.title, size=13, weight=600)
    for value in x_ticks:
        x = left + PLOT_WIDTH * value / x_ticks[-1]
        yield f'<path d="M{x:.1f} {TOP}V{bottom:.1f}" stroke="{GRID if value else SOFT}"/>'
        yield _text(x, bottom + 19, f"{value:,.6g}", anchor="middle", fill=SOFT)
    yield _text(left + PLOT_WIDTH / 2, bottom + 44, panel.x_label, anchor="middle")
    marked = [series for series in panel.series if not series.dashed]

    def at(x: float, row: float) -> tuple[float, float]:
        return left + PLOT_WIDTH * x / x_ticks[-1], TOP + ROW * (row + 0.5)

    yield from (_line([at(p.x, p.y) for p in series.points], series) for series in panel.series if series.dashed)
    for number, series in enumerate(marked):
        for point in series.points:
            x, y = at(point.x, point.y + (number - (len(marked) - 1) / 2) * 0.25)
            if point.low is not None and point.high is not None:
                (low, _), (high, _) = at(point.low, 0), at(point.high, 0)
                yield f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{series.colour}" stroke-width="1.6"/>'
            yield _mark(x, y, series.colour)


def _opening(title: str, subtitle: str, width: int, height: int) -> list[str]:
    """The opening elements of every chart: its size, title and subtitle."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"'
        f' font-family="{FONT}" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#FFFFFF"/>',
        _text(24, 34, title, size=17, weight=600),
        _text(24, 56, subtitle, fill=SOFT),
    ]


def _legend(found: Iterable[Series], left: float) -> Iterable[str]:
    for row, series in enumerate(found):
        y = TOP + 8 + 22 * row
        yield _line([(left, y), (left + 22, y)], series)
        yield from [] if series.dashed else [_mark(left + 11, y, series.colour)]
        yield _text(left + 30, y + 4, series.name)


def _panel(panel: Panel, left: float) -> Iterable[str]:
    points = [point for series in panel.series for point in series.points]
    y_ticks = ticks(max((max(p.y, p.high or 0) for p in points), default=0))
    right = max((p.x for p in points), default=0)
    x_ticks = ticks(right) if panel.x_ticks is None else panel.x_ticks
    widest = max(right, *x_ticks) * 1.04

    def at(x: float, y: float) -> tuple[float, float]:
        return left + PLOT_WIDTH * x / widest, TOP + PLOT_HEIGHT * (1 - y / y_ticks[-1])

    yield _text(left, TOP - 16, panel.title, size=13, weight=600)
    for value in y_ticks:
        _, y = at(0, value)
        yield f'<path d="M{left:.1f} {y:.1f}h{PLOT_WIDTH}" stroke="{GRID if value else SOFT}"/>'
        yield _text(left - 8, y + 4, f"{value:,.6g}", anchor="end", fill=SOFT)
    last = -math.inf
    for value in x_ticks:
        x, y = at(value, 0)
        if x - last >= CLOSE:
            last = x
            yield f'<path d="M{x:.1f} {y:.1f}v5" stroke="{SOFT}"/>'
            yield _text(x, y + 19, f"{value:,.6g}", anchor="middle", fill=SOFT)
    yield _text(left + PLOT_WIDTH / 2, TOP + PLOT_HEIGHT + 44, panel.x_label, anchor="middle")
    y = TOP + PLOT_HEIGHT / 2
    yield _text(left - 46, y, panel.y_label, anchor="middle", transform=f"rotate(-90 {left - 46:.1f} {y:.1f})")

    for series in panel.series:
        yield _line([at(p.x, p.y) for p in series.points], series)
    placed = []
    for series in panel.series:
        for point in () if series.dashed else series.points:
            x, y = at(point.x, point.y)
            if point.low is not None and point.high is not None:
                (_, low), (_, high) = at(point.x, point.low), at(point.x, point.high)
                yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{series.colour}" stroke-width="1.6"/>'
            yield _mark(x, y, series.colour)
            if point.label and all(math.dist((x, y), other) > CLOSE for other in placed):
                placed.append((x, y))
                yield _text(x + 8, y + 15, point.label, fill=SOFT, size=11)


def _line(points: Sequence[tuple[float, float]], series: Series) -> str:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    style = f'stroke="{series.colour}" stroke-width="{1.6 if series.dashed else 2}" stroke-linejoin="round"'
    return f'<path d="M{path}" fill="none" {style}{" stroke-dasharray=" + chr(34) + "5 4" + chr(34) if series.dashed else ""}/>'


def _mark(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" stroke="#FFFFFF" stroke-width="1.5"/>'


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    fill: str = INK,
    size: int = 12,
    weight: int = 400,
    transform: str = "",
) -> str:
    more = f' text-anchor="{anchor}"' * (anchor != "start") + f' fill="{fill}"' * (fill != INK)
    more += f' font-size="{size}"' * (size != 12) + f' font-weight="{weight}"' * (weight != 400)
    more += f' transform="{transform}"' * bool(transform)
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(text)}</text>'

"""SVG charts of labeled points with intervals, connected by lines. Drawn with matplotlib; equal data produces identical bytes."""

import io
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Colors that color-blind readers can distinguish on white (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# INK is used for text and the most important line, SOFT for axes, and PALE for lines drawn next to lines in INK.
INK = "#222222"
SOFT = "#5F5F5F"
PALE = "#8C8C8C"
# Offsets (x, y) to try between a label and its marker, in points, nearest first. A positive x positions the left end of the label;
# a negative x, the right end.
AROUND = (5, 4), (5, -9), (-5, 4), (-5, -9), (7, -3), (-7, -3), (5, 11), (5, -17), (-5, 11), (-5, -17)
ROOM = 3.5  # minimum distance between a label and a marker's center, in points
CUT = 1 / 3  # an axis may start above zero if all values exceed this fraction of the highest value


@dataclass(frozen=True)
class Point:
    """A labeled measurement. `low` and `high` are the ends of its interval, or None if the interval is unknown."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""

    @classmethod
    def percent(cls, x: float, row: dict, value: str, label: str) -> "Point":
        """Create a point from the field `value` of a result row, converting the fraction and its interval to percent."""
        return cls(x, 100 * row[value], 100 * row["low"], 100 * row["high"], label)


@dataclass(frozen=True)
class Series:
    """Points connected by a line.

    A dashed line has no markers and shows derived values rather than measurements. Hollow markers distinguish a series from another
    series of the same color. A series with an empty name has no legend entry.
    """

    name: str
    points: tuple[Point, ...]
    colour: str = COLOURS[0]
    dashed: bool = False
    hollow: bool = False


def lines(
    points: Mapping[str, Sequence[Point]], colours: Mapping[str, str], dashed: Collection[str] = ()
) -> tuple[Series, ...]:
    """Create a series for each name in `points`.

    Args:
        points: The points of the series, keyed by name.
        colours: The colors of some series, keyed by name. All other series cycle through the six default colors, first with filled
            and then with hollow markers.
        dashed: The names of series that show derived values.
    """
    looks = cycle(product((False, True), COLOURS))
    series = []
    for name, line in points.items():
        hollow, colour = (False, colours[name]) if name in colours else next(looks)
        series.append(Series(name, tuple(sorted(line, key=lambda point: point.x)), colour, name in dashed, hollow))
    return tuple(series)


@dataclass(frozen=True)
class Panel:
    """One plot of a chart.

    Attributes:
        x_ticks: Tick positions, or None for ticks at round numbers.
        from_zero: Whether the value axis always starts at zero. If False, it may start near the lowest value, provided that all
            values exceed a third of the highest value. The axis label then says so.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    x_ticks: tuple[float, ...] | None = None
    from_zero: bool = True


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """Draw panels side by side with a shared value axis, and return the chart as an SVG document."""
    from matplotlib import rc_context  # importing it takes half a second
    from matplotlib.figure import Figure

    looks = {"svg.fonttype": "none", "svg.hashsalt": "evoprune", "font.size": 8.5, "axes.edgecolor": SOFT}
    with rc_context(looks | {"xtick.color": SOFT, "ytick.color": SOFT, "text.color": INK, "axes.labelcolor": INK}):
        figure = Figure((830 / 96, 4.6), layout="constrained")
        (every,) = figure.subplots(1, len(panels), squeeze=False, sharey=True)
        points = [point for panel in panels for series in panel.series for point in series.points]
        values = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
        cut = (
            not any(panel.from_zero for panel in panels) and min(values, default=0) >= CUT * max(values, default=0) > 0
        )
        for axes, panel in zip(every, panels, strict=True):
            for series in panel.series:
                _draw_series(axes, series)
            axes.set_title(panel.title, loc="left", fontsize=9.5, fontweight="bold")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_axisbelow(True)
            axes.grid(axis="y", color="#E4E4E4")
            if panel.x_ticks:
                axes.set_xticks(panel.x_ticks, [f"{tick:,.6g}" for tick in panel.x_ticks])
            axes.margins(x=0.1)  # room for labels
            axes.set_xlim(left=0)
            start = axes.yaxis.get_major_locator().tick_values(min(values), max(values))[0] if cut else 0
            axes.set_ylim(start)
        begins = f" (axis from {start:,.3g})" if cut else ""
        for axes, panel in zip(every, panels, strict=True):
            axes.set_xlabel(panel.x_label)
        every[0].set_ylabel(panels[0].y_label + begins)
        figure.supxlabel(textwrap.fill(subtitle, 130), x=0.01, ha="left", fontsize=8.25, color=SOFT)
        named = {name: handle for axes in every for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(  # includes the title, because a separate title would overlap the legend
            named.values(), named, loc="outside upper left", ncols=4, frameon=False, alignment="left",
            title=textwrap.fill(title, 90), title_fontproperties={"size": 12, "weight": "bold"},
        )  # fmt: skip
        figure.draw_without_rendering()  # computes the layout, so that overlapping labels can be detected
        for axes, panel in zip(every, panels, strict=True):
            _label_points(axes, panel)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Creator": "evoprune", "Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(
        "\n <title>", "\n<!-- evoprune -->\n <title>", 1
    )  # identifies files written by evoprune


def _draw_series(axes, series: Series) -> None:
    x = [point.x for point in series.points]
    y = [point.y for point in series.points]
    name = series.name or None
    if series.dashed:
        axes.plot(x, y, "--", color=series.colour, linewidth=1.3, label=name)
        return
    low = [point.low for point in series.points]
    high = [point.high for point in series.points]
    axes.errorbar(
        x,
        y,
        yerr=[_distances(low, y), _distances(high, y)],
        fmt="o-",
        color=series.colour,
        label=name,
        markersize=4.5,
        markerfacecolor="white" if series.hollow else series.colour,
        linewidth=1.6,
        elinewidth=1.1,
        capsize=3,
    )


def _distances(ends: Sequence[float | None], values: Sequence[float]) -> list[float]:
    """Return the distance from each value to one end of its interval, or NaN if this end is unknown."""
    return [math.nan if end is None else abs(end - value) for end, value in zip(ends, values, strict=True)]


def _label_points(axes, panel: Panel) -> None:
    """Place labels next to their points, in series order.

    If possible, a label is placed where it doesn't overlap anything. Otherwise, it is placed where it overlaps only lines and
    intervals or, if there is no such position, omitted.
    """
    every = [(point, series.colour) for series in panel.series for point in series.points if point.label]
    dots = [(point.x, point.y) for series in panel.series if not series.dashed for point in series.points]
    marks = axes.transData.transform(dots or [(math.nan, math.nan)])
    lines = _on_lines(axes, panel)
    pixels = axes.figure.dpi / 72  # in a point
    frame = axes.get_window_extent()
    whole = axes.figure.bbox
    taken = []

    def room(box) -> tuple[bool, bool]:
        """Return whether a box overlaps nothing at all, and whether it overlaps nothing except lines and intervals."""
        inside = max(whole.x0, frame.x0) <= box.x0 and box.x1 <= min(whole.x1, frame.x1 + 4) and frame.y0 <= box.y0
        apart = inside and not box.count_overlaps(taken) and not box.padded(ROOM * pixels).count_contains(marks)
        return apart and not box.count_contains(lines), apart

    for point, colour in every:
        found: list = []  # possible positions, best position last
        for x, y in AROUND:
            side = "left" if x > 0 else "right"
            label = axes.annotate(
                point.label,
                (point.x, point.y),
                (x, y),
                textcoords="offset points",
                ha=side,
                fontsize=8.25,
                color=colour,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            free, apart = room(box)
            if free or (apart and not found):
                found.append((label, box))
            else:
                label.remove()
            if free:
                break
        for label, _ in found[:-1]:
            label.remove()
        taken += [box for _, box in found[-1:]]


def _on_lines(axes, panel: Panel) -> "np.ndarray":
    """Return closely spaced points along the lines and intervals of a plot, in pixels, as an array `[n, 2]`."""
    import numpy as np

    paths = []
    for series in panel.series:
        paths.append([(point.x, point.y) for point in series.points])
        for point in series.points:
            paths.append([(point.x, end) for end in (point.low, point.high) if end is not None])
    steps = np.linspace(0, 1, 200)[:, None]
    places = [np.empty((0, 2))]
    for path in filter(None, paths):
        corners = axes.transData.transform(path)
        places += [start + steps * (end - start) for start, end in pairwise(corners)]
    return np.concatenate(places)

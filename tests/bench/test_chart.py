"""Test the elements, positions and words of charts by parsing them as XML."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes

from evoprune.bench.chart import COLOURS, Panel, Point, Series, draw

pytestmark = pytest.mark.full

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
FAST = Series("fast & <light>", (Point(8, 1.0, 0.9, 1.3), Point(16, 2.0), Point(32, 4.0)), COLOURS[0])
SLOW = Series("slow", (Point(8, 3.0, label="here"), Point(32, 11.0)), COLOURS[1], hollow=True)
IDEAL = Series("ideal", (Point(0, 0), Point(32, 8.0)), COLOURS[2], dashed=True)
PANEL = Panel("Encode", "frames", "seconds", (FAST, SLOW, IDEAL), (8, 16, 32))


def texts(root) -> list[str]:
    return ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]


def marks(root, colour: str) -> list[tuple[float, float]]:
    """Return the positions of round marks with an edge of this colour, with the legend's marks last."""
    round_ones = {f"#{path.get('id')}" for path in root.iter(f"{SVG}path") if path.get("id") and "C" in path.get("d")}
    found = (e for e in root.iter(f"{SVG}use") if e.get(LINK) in round_ones)
    return [(float(e.get("x")), float(e.get("y"))) for e in found if f"stroke: {colour.lower()}" in e.get("style")]


@pytest.mark.parametrize("panels", [[PANEL], [PANEL, PANEL]])
def test_everything_is_drawn(panels):
    root = ElementTree.fromstring(draw("Speed", "two threads", panels))
    words = texts(root)
    for word in ("Speed", "two threads", "fast & <light>", "slow", "ideal"):
        assert words.count(word) == 1
    for word in ("Encode", "frames", "here", "8", "16", "32"):
        assert words.count(word) >= len(panels)
    assert root.find(f"{SVG}title").text == "Speed" and "seconds" in words
    for series in (FAST, SLOW):
        assert len(marks(root, series.colour)) == len(panels) * len(series.points) + 1
    assert not marks(root, IDEAL.colour)
    dashed = {e.get("style") for e in root.iter(f"{SVG}path") if "dasharray" in (e.get("style") or "")}
    assert dashed and all(IDEAL.colour.lower() in style for style in dashed)


def test_points_lie_where_they_should():
    root = ElementTree.fromstring(draw("", "", [PANEL]))
    (x8, y8), (x16, y16), (x32, y32), _ = marks(root, FAST.colour)
    assert x32 - x16 == pytest.approx(2 * (x16 - x8), abs=0.2)
    assert y8 - y16 == pytest.approx((y16 - y32) / 2, abs=0.2) and y8 > y16 > y32


def test_an_axis_starts_near_values_that_all_lie_high_and_says_so():
    high = Series("high", (Point(1, 97.0, 96.6, 97.4), Point(2, 62.0, 60.0, 64.0)))
    low = Series("low", (Point(1, 20.0),))

    def words(*series):
        return texts(ElementTree.fromstring(draw("", "", [Panel("", "x", "accuracy, %", series, from_zero=False)])))

    (said,) = (word for word in words(high) if word.startswith("accuracy, % (axis from "))
    assert 40 < float(said.rpartition(" ")[2].rstrip(")")) <= 60
    assert {"accuracy, %", "0"} <= {*words(high, low)}
    assert "0" in texts(ElementTree.fromstring(draw("", "", [Panel("", "x", "y", (high,))])))


def test_panels_share_their_axis_of_values():
    high, low = (Series("", (Point(1, 95.0), Point(2, y)), COLOURS[0]) for y in (99.0, 44.0))
    panels = [Panel("", "x", "%", (one,), from_zero=False) for one in (high, low)]
    (_, left), _, (_, right), _ = marks(ElementTree.fromstring(draw("", "", panels)), COLOURS[0])
    assert left == right


def test_the_same_data_give_the_same_bytes():
    assert draw("t", "s", [PANEL]) == draw("t", "s", [PANEL])
    assert "nan" not in draw("t", "s", [PANEL, Panel("", "", "", ())])


def test_labels_of_near_points_do_not_touch():
    crowd = Series("crowd", tuple(Point(1 + n / 1000, 3, label=f"-b {n}") for n in range(5)))
    words = texts(ElementTree.fromstring(draw("", "", [Panel("", "", "", (crowd,))])))
    assert [word for word in words if word.startswith("-b")] == ["-b 0", "-b 1"]  # on both sides


@pytest.mark.parametrize("panels", [1, 2])
def test_labels_lie_beside_lines_intervals_and_marks(panels, monkeypatch):
    """Two methods at three budgets whose lines and intervals cross, as in `eval --chart`."""
    kept, real = [], Axes.annotate
    monkeypatch.setattr(Axes, "annotate", lambda *args, **more: kept.append(real(*args, **more)) or kept[-1])
    budgets = ((400, "-b 1"), (100, "-b 0.25"), (40, "-b 0.1"))
    lines = []
    for number, values in enumerate(((88, 84, 70), (88, 83, 72))):
        points = [Point(x, y, y - 6, y + 5, label) for (x, label), y in zip(budgets, values, strict=True)]
        lines.append(Series(f"method {number}", tuple(reversed(points)), COLOURS[number]))
    draw("", "", [Panel("", "x", "%", tuple(lines), from_zero=False)] * panels)
    labels = [label for label in kept if label.axes]  # labels that were not removed
    assert len(labels) >= 5 * panels
    for label in labels:
        box, frame = label.get_window_extent(), label.axes.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1 + 4  # not in the next panel
        others = [other.get_window_extent() for other in labels if other is not label]
        assert not box.count_overlaps(others)
        for line in label.axes.get_lines():
            corners = label.axes.transData.transform(line.get_xydata())
            if line.get_marker() == "o":
                assert not box.count_contains(corners)
            on_line = np.linspace(corners[:-1], corners[1:], 300).reshape(-1, 2)
            assert line.get_linestyle() == "None" or not box.count_contains(on_line), label.get_text()

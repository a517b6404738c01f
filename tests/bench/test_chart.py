"""Charts as XML: what is drawn, where, and with which words."""

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import pytest

from evoprune.bench.chart import COLOURS, LEFT, PLOT_HEIGHT, PLOT_WIDTH, Panel, Point, Series, draw, ticks
from evoprune.bench.svg import reach

SVG = "{http://www.w3.org/2000/svg}"
FAST = Series("fast & <light>", (Point(8, 1.0, 0.9, 1.3), Point(16, 2.0), Point(32, 4.0)), COLOURS[0])
SLOW = Series("slow", (Point(8, 3.0, label="here"), Point(32, 11.0)), COLOURS[1])
IDEAL = Series("ideal", (Point(0, 0), Point(32, 8.0)), COLOURS[2], dashed=True)
PANEL = Panel("Encode", "frames", "seconds", (FAST, SLOW, IDEAL), (8, 16, 32))


def texts(root) -> list[str]:
    return [element.text for element in root.iter(f"{SVG}text")]


def circles(root, series) -> list[tuple[float, float]]:
    """Centres of a series's marks, the one in the legend first."""
    found = (e for e in root.iter(f"{SVG}circle") if e.get("fill") == series.colour)
    return [(float(e.get("cx")), float(e.get("cy"))) for e in found]


@pytest.mark.parametrize("panels", [[PANEL], [PANEL, PANEL]])
def test_everything_is_drawn(panels):
    root = ElementTree.fromstring(draw("Speed", "two threads", panels))
    words = texts(root)
    for word in ("Speed", "two threads", "fast & <light>", "slow", "ideal"):
        assert words.count(word) == 1
    for word in ("Encode", "frames", "seconds", "here", "8", "16", "32"):
        assert words.count(word) >= len(panels)
    assert root.find(f"{SVG}title").text == "Speed"
    for series in (FAST, SLOW):
        assert len(circles(root, series)) == len(panels) * len(series.points) + 1
    assert not circles(root, IDEAL)
    dashed = [e for e in root.iter(f"{SVG}path") if e.get("stroke-dasharray")]
    assert len(dashed) == len(panels) + 1 and {e.get("stroke") for e in dashed} == {IDEAL.colour}


def test_points_lie_where_they_should():
    root = ElementTree.fromstring(draw("", "", [PANEL]))
    _, (x8, y8), (x16, y16), (x32, y32) = circles(root, FAST)
    assert x32 - x16 == pytest.approx(2 * (x16 - x8), abs=0.2)
    assert y8 - y16 == pytest.approx((y16 - y32) / 2, abs=0.2) and y8 > y16 > y32
    assert (y8 - y32) == pytest.approx(PLOT_HEIGHT * 3 / 12, abs=0.2)  # of an axis up to 12
    assert PLOT_WIDTH < x32 - x8 < 830  # one panel has the whole width


def test_nothing_leaves_the_picture():
    long = Series("a method with a very long name -b 0.25", (Point(0, 123456.0), Point(1, 7.0)))
    for panels in ([PANEL], [PANEL, Panel("", "x", "y", (long,))], [Panel("", "x", "y", (long,))]):
        root = ElementTree.fromstring(draw("A title that is longer than the plot is wide " * 2, "x" * 90, panels))
        width, height = float(root.get("width")), float(root.get("height"))
        for element in root.iter(f"{SVG}text"):
            x, reach = float(element.get("x")), len(element.text or "") * 5.5 * int(element.get("font-size", 12)) / 12
            if not element.get("transform"):
                anchor = element.get("text-anchor", "start")
                left = {"start": x, "middle": x - reach / 2, "end": x - reach}[anchor]
                assert left >= 0 and left + reach <= width, element.text
            assert 0 < float(element.get("y")) < height
        for path in root.iter(f"{SVG}path"):
            for x, y in re.findall(r"[ML]([0-9.]+) ([0-9.]+)", path.get("d")):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_an_axis_starts_near_values_that_all_lie_high_and_says_so():
    high = Series("high", (Point(1, 97.0, 96.6, 97.4), Point(2, 62.0, 60.0, 64.0)))
    with_low = Series("low", (Point(1, 20.0),))
    for draw_one in (
        lambda *series: draw("", "", [Panel("", "x", "accuracy, %", series, from_zero=False)]),
        lambda *series: draw(
            "",
            "",
            [Panel("", "accuracy, %", "", tuple(_sideways(s) for s in series), from_zero=False)],
            rows=["a", "b"],
        ),
    ):
        words = texts(ElementTree.fromstring(draw_one(high)))
        assert "accuracy, % (axis from 60)" in words and "60" in words and "0" not in words[3:5] and "40" not in words
        words = texts(ElementTree.fromstring(draw_one(high, with_low)))
        assert "accuracy, %" in words and "0" in words
    assert "0" in texts(ElementTree.fromstring(draw("", "", [Panel("", "x", "y", (high,))])))


def _sideways(series: Series) -> Series:
    return Series(series.name, tuple(Point(p.y, 0, p.low, p.high) for p in series.points))


def test_an_interval_that_is_shorter_than_its_mark_is_seen():
    short = Series("short", (Point(1, 50.0, 49.9, 50.1), Point(2, 100.0)))
    root = ElementTree.fromstring(draw("", "", [Panel("", "", "", (short,))]))
    ((x, _),) = [c for c in circles(root, short)[1:] if c[1] != circles(root, short)[-1][1]]
    radius = max(float(e.get("r")) for e in root.iter(f"{SVG}circle"))
    ends = [e.get("d") for e in root.iter(f"{SVG}path") if e.get("d").count("M") == 3]
    assert len(ends) == 1
    strokes = [tuple(map(float, ends)) for ends in re.findall(r"M([0-9.]+) [0-9.]+L([0-9.]+) ", ends[0])][1:]
    assert len(strokes) == 2 and all(left < x - radius and right > x + radius for left, right in strokes)


def intervals(root, series) -> list[float]:
    """Where the intervals of a series are drawn, from left to right of its points."""
    found = (e for e in root.iter(f"{SVG}path") if e.get("stroke") == series.colour and e.get("d").count("M") == 3)
    return [float(e.get("d")[1:].split()[0]) for e in found]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_mark_lies_on_its_interval_and_beside_those_of_other_series(count):
    """Of one series at the true place; of several around it."""
    series = [
        Series(str(n), (Point(3, 50.0, 40.0, 60.0), Point(9, 20.0 * n, 20.0 * n - 5, 20.0 * n + 5)), COLOURS[n])
        for n in range(count)
    ]
    root = ElementTree.fromstring(draw("", "", [Panel("", "", "", tuple(series))]))
    marks = [[x for x, _ in circles(root, one)[1:]] for one in series]
    assert [intervals(root, one) for one in series] == marks
    crowded, apart = zip(*marks, strict=True)
    assert len(set(apart)) == 1 and sum(crowded) / count == pytest.approx(LEFT + (apart[0] - LEFT) / 3, abs=0.11)
    assert all(right - left == pytest.approx(7, abs=0.11) for left, right in pairwise(crowded))


@pytest.mark.parametrize("panels", [1, 2])
def test_a_chart_is_as_wide_as_a_page_of_text(panels):
    """GitHub shows 830 pixels or so: letters of 11 pixels stay that large."""
    many = tuple(Series(f"a method with a long name {n}", FAST.points) for n in range(9))
    root = ElementTree.fromstring(draw("Speed", "s" * 200, [Panel("", "", "", many)] * panels))
    assert float(root.get("width")) == 830
    assert min(float(e.get("font-size", 12)) for e in root.iter(f"{SVG}text")) >= 11


def test_the_same_data_give_the_same_bytes():
    assert draw("t", "s", [PANEL]) == draw("t", "s", [PANEL])
    assert "nan" not in draw("t", "s", [Panel("", "", "", ())])  # nothing to draw


def test_labels_do_not_touch():
    crowd = Series("crowd", tuple(Point(1 + n / 1000, 3, label=f"-b {n}") for n in range(5)))
    root = ElementTree.fromstring(draw("", "", [Panel("", "", "", (crowd,), tuple(p.x for p in crowd.points))]))
    assert len([word for word in texts(root) if word and word.startswith("-b")]) == 1
    assert "1.001" not in texts(root)


def boxes(root) -> list[tuple[float, float, float, float]]:
    """Left, right, top and bottom of the labels: texts of 11 pixels."""
    made = []
    for element in root.iter(f"{SVG}text"):
        if element.get("font-size") == "11":
            x, y = float(element.get("x")), float(element.get("y"))
            made.append((x, x + reach(element.text, 11, int(element.get("font-weight", 400))), y - 8, y + 2))
    return made


def test_near_points_have_labels_that_neither_touch_nor_hide_them():
    series = tuple(
        Series(name, tuple(Point(x, y, y - 1, y + 1, f"-b {x}") for x in at), colour)
        for name, at, y, colour in (
            ("evoprune", (15, 26, 43), 97, COLOURS[0]),
            ("evoprune-merge", (27, 39, 59), 95, COLOURS[1]),
            ("nothing pruned", (83,), 100, COLOURS[2]),
            ("Hugging Face", (100,), 100, COLOURS[3]),
        )
    )
    panel = Panel("", "", "", series, from_zero=False)
    root = ElementTree.fromstring(draw("", "", [panel, panel], legend=False))
    found = boxes(root)
    assert len(found) >= 2 * 8
    for one, other in combinations(found, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or one[3] <= other[2] or other[3] <= one[2]
    for left, right, top, bottom in found:
        for mark in root.iter(f"{SVG}circle"):
            assert not (left < float(mark.get("cx")) < right and top < float(mark.get("cy")) < bottom)


def test_panels_of_the_same_values_share_their_axis():
    high, low = (Series("", (Point(1, 95.0), Point(2, y))) for y in (99.0, 44.0))
    panels = [Panel("", "x", label, (one,), from_zero=False) for one, label in ((high, "%"), (low, "%"), (high, "s"))]
    root = ElementTree.fromstring(draw("", "", panels, legend=False))
    left, middle, right = (float(e.get("cy")) for n, e in enumerate(root.iter(f"{SVG}circle")) if n % 2 == 0)
    assert left == middle != right


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        (10, [0, 2, 4, 6, 8, 10]),
        (11, [0, 2, 4, 6, 8, 10, 12]),
        (0.3, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (7, [0, 2, 4, 6, 8]),
        (1234, [0, 250, 500, 750, 1000, 1250]),
        (0, [0, 1]),
    ],
)
def test_ticks_are_round_numbers(top, expected):
    assert ticks(top) == pytest.approx(expected)


def test_ticks_are_few_and_reach_the_top():
    for n in range(1, 2000):
        found = ticks(n * 0.037)
        assert 4 <= len(found) <= 7 and found[-1] >= n * 0.037 * (1 - 1e-9) and found[-2] < n * 0.037

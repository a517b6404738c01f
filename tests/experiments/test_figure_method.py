"""The figure of the method says what a run does."""

from xml.etree import ElementTree

import pytest

from experiments.figure_method import BUDGET, CLIP, figure, measure


def words(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")]


@pytest.fixture(scope="module")
def run():
    return measure(CLIP, BUDGET)


def test_the_committed_figure_is_that_of_the_clip(run):
    with open("docs/method.svg", encoding="utf-8") as file:
        assert words(file.read()) == words(figure(run))


def test_the_counts_belong_together(run):
    counts = run.video.fates.counts()
    assert int(run.sizes.sum()) == counts["units"] and int((run.sizes > 0).sum()) == counts["read"]
    assert counts["encoded"] > run.layers[0] > run.layers[1] > counts["read"]
    assert run.layers == (run.layers[0], *[run.layers[1]] * 7) and run.first_layers == 1
    shown = words(figure(run))
    assert [str(size) for size in run.sizes.tolist() if size > 1] == [w for w in shown if w.isdigit()][:-3]
    assert [str(rows) for rows in run.layers[:2]] == [w for w in shown if w.isdigit()][-3:-1]
    assert f"live share {run.live_share:.2f}" in shown


def test_the_words_in_a_box_keep_away_from_its_edge(run):
    """Bold letters of the widest usual font are a sixth wider than the average letter, of 6.7 pixels at size 12."""
    drawn = [e for e in ElementTree.fromstring(figure(run)).iter() if e.get("rx") == "6" or e.tag.endswith("}text")]
    boxes = [e for e in drawn[1:] if e.get("rx")]
    for box in boxes:
        left, wide, top, tall = (float(box.get(name)) for name in ("x", "width", "y", "height"))
        inside = [e for e in drawn if e.get("text-anchor") == "middle" and top < float(e.get("y")) < top + tall]
        lines = [e for e in inside if left < float(e.get("x")) < left + wide]
        assert len(lines) >= 3
        for line in lines:
            wider = 7 / 6 if line.get("font-weight") else 1
            assert wider * 6.7 * len(line.text) * float(line.get("font-size", 12)) / 12 <= wide - 2 * 10, line.text
    assert len(boxes) == 2

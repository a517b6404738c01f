"""The figure of the method agrees with a run."""

from xml.etree import ElementTree

import pytest

from experiments.pictures.figure_method import BUDGET, CLIP, figure, measure


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

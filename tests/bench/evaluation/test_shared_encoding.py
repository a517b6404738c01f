"""Methods share rows where the tower's work is the same: the samples are as without sharing, and the tower runs less often."""

from dataclasses import replace

import pytest

from evoprune import methods
from evoprune.bench.evaluation import run, shared
from evoprune.bench.evaluation.run import Evaluation
from tests.bench.evaluation.test_run import CLIPS, SETTINGS, begun, loaded, videos  # noqa: F401
from tests.threads import one_thread  # noqa: F401

AFTER = tuple(name for name in methods.built_in() if methods.parse(name).acts == "after")
REUSING = ("evoprune", "evoprune:alpha=0", "reuse+divprune", "reuse+scope", "reuse+cdpruner", "evoprune:depth=1")


def samples(loaded, settings, clips) -> list[dict]:  # noqa: F811
    run = begun(loaded, settings, clips)
    run.run()
    return run.samples


@pytest.fixture
def towers(monkeypatch) -> list[tuple]:
    """The reuse, the number of selections between layers and the tokens to keep, each time that a video went through the tower."""
    seen, real = [], shared.encode_rows

    def encode_rows(visual, patches, plan, **how):
        seen.append((plan.reuse, len(plan.row_stages), plan.keep))
        return real(visual, patches, plan, **how)

    monkeypatch.setattr(shared, "encode_rows", encode_rows)
    return seen


@pytest.mark.full
@pytest.mark.parametrize("names", [AFTER, (*REUSING, "evoprune-paper", "downscale", "reuse:threshold=5+divprune")])
def test_shared_rows_give_the_same_samples(loaded, names, monkeypatch, towers):  # noqa: F811
    settings = replace(SETTINGS, methods=names)
    together = samples(loaded, settings, videos(CLIPS[:1]))
    few = len(towers)

    class Alone(shared.SharedRows):
        def encode_rows(self, *args, **how):
            self._held.clear()
            return super().encode_rows(*args, **how)

    monkeypatch.setattr(run, "SharedRows", Alone)
    assert samples(loaded, settings, videos(CLIPS[:1])) == together
    assert len(towers) - few == len(run.variants(settings)) > few


def test_selectors_after_the_same_tower_share_rows(loaded, towers):  # noqa: F811
    settings = replace(SETTINGS, methods=(*REUSING, "divprune", "random", "reuse:threshold=5+divprune"))
    samples(loaded, settings, videos(CLIPS[:1]))
    inside = [(8.0, 2, 24), (8.0, 2, 12)]  # evoprune selects inside the tower, with other rows in each variant
    needs = {methods.parse(name).tokens.needs for name in REUSING[2:]}
    after_reuse = [(8.0, 0, 24)] * len(needs)  # once for selectors that need attention, keys, both or nothing
    assert len(needs) >= 2 and frozenset() in needs  # evoprune:depth=1 shares the rows of reuse+divprune
    other_threshold, after = (5.0, 0, 24), (0.0, 0, 24)  # random shares the rows of divprune
    assert towers == [(0.0, 0, 48), *inside * 2, *after_reuse, after, other_threshold]


def test_methods_with_shared_rows_have_their_own_pruning_times(loaded):  # noqa: F811
    names = ("random", "divprune", "scope", "cdpruner")
    run = Evaluation(replace(SETTINGS, methods=names, timed=True), videos(CLIPS[:1]))
    run.loaded = loaded
    run.run()
    times = {}
    for sample in run.samples:
        times.setdefault((sample["method"], sample["budget"]), set()).add(sample["prune_ms"])
    # One for all questions, unless the selection depends on them; and no two methods share one.
    assert all(len(spent) == (2 if name == "cdpruner" else 1) for (name, _), spent in times.items())
    every = [ms for spent in times.values() for ms in spent]
    assert len(set(every)) == len(every) == 11 and min(every) > 0

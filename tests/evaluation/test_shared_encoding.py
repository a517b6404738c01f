"""Rows shared by methods that would have the tower do the same: everything as without sharing, and the tower runs less often."""

from dataclasses import replace

import pytest

from evoprune import methods
from evoprune.evaluation import run, shared_encoding
from evoprune.evaluation.run import Evaluation
from tests.evaluation.test_run import CLIPS, SETTINGS, begun, loaded, videos  # noqa: F401
from tests.threads import one_thread  # noqa: F401

AFTER = tuple(name for name in methods.available() if methods.get(name).acts == "after")
CHOICES = (
    "evoprune",
    "evoprune:alpha=0",
    "evoprune:choice=divprune",
    "evoprune:choice=scope",
    "evoprune:choice=cdpruner",
)


def samples(loaded, settings, clips) -> list[dict]:  # noqa: F811
    run = begun(loaded, settings, clips)
    run.run()
    return run.samples


@pytest.fixture
def towers(monkeypatch) -> list[tuple]:
    """The method and the tokens to be kept, of each time that a video went through the tower."""
    seen, real = [], shared_encoding.encode_rows

    def encode_rows(visual, patches, grid, method, keep, **how):
        seen.append((method.name, keep))
        return real(visual, patches, grid, method, keep, **how)

    monkeypatch.setattr(shared_encoding, "encode_rows", encode_rows)
    return seen


@pytest.mark.parametrize("names", [AFTER, (*CHOICES, "evoprune-paper", "downscale", "evoprune:block=2")])
def test_samples_are_those_of_rows_of_their_own(loaded, names, monkeypatch, towers):  # noqa: F811
    settings = replace(SETTINGS, methods=names)
    shared = samples(loaded, settings, videos(CLIPS[:1]))
    few = len(towers)

    class Alone(shared_encoding.SharedRows):
        def encode_rows(self, *args, **how):
            self._held.clear()
            return super().encode_rows(*args, **how)

    monkeypatch.setattr(run, "SharedRows", Alone)
    assert samples(loaded, settings, videos(CLIPS[:1])) == shared
    assert len(towers) - few == len(run.variants(settings)) > few


def test_what_shares_rows(loaded, towers):  # noqa: F811
    settings = replace(SETTINGS, methods=(*CHOICES, "divprune", "random", "evoprune:block=2"))
    samples(loaded, settings, videos(CLIPS[:1]))
    kept = [24, 12]
    # In full; then evoprune, whose own choice is made inside the tower, and so each of another setting; then for the choices of
    # others, once more for those that need attention or keys as well; those after the tower; another block.
    alike = [("evoprune", k) for k in kept]
    by_need = {methods.get(name).needs_after for name in CHOICES if "choice" in name}
    assert towers[0][0] == "none" and towers.count(("divprune", 24)) == 1 and ("random", 24) not in towers
    assert sorted(towers[1:]) == sorted([*alike * (2 + len(by_need)), ("divprune", 24), *alike])


def test_each_has_the_pruning_time_of_its_own(loaded):  # noqa: F811
    names = ("random", "divprune", "scope", "cdpruner")
    run = Evaluation(replace(SETTINGS, methods=names, timed=True), videos(CLIPS[:1]))
    run.loaded = loaded
    run.run()
    times = {}
    for sample in run.samples:
        times.setdefault((sample["method"], sample["budget"]), set()).add(sample["prune_ms"])
    # One for all questions, unless what is chosen depends on them; and no two methods share one.
    assert all(len(spent) == (2 if name == "cdpruner" else 1) for (name, _), spent in times.items())
    every = [ms for spent in times.values() for ms in spent]
    assert len(set(every)) == len(every) == 11 and min(every) > 0

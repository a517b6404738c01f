"""The search: everything where there is time, the promising where there is not, and never past the limit."""

import pytest

from evoprune.bench.tuning.search import LEAST, Candidate, Trial, candidates, promising, rungs, search


class World:
    """Candidates whose agreement and speed are known; each trial takes its time on a clock of its own."""

    def __init__(self, count: int, limit: float, cost: float = 1.0):
        self.spent, self.limit, self.cost = 0.0, limit, cost
        self.known = {Candidate(f"m{i}", 0.5): [] for i in range(count)}
        self.tried = []

    def trial(self, candidate: Candidate, video: int) -> Trial:
        number = int(candidate.method[1:])
        self.spent += self.cost
        return Trial(
            100 - number, 100, [], 1 / (1 + number), 2.0, self.cost, 1.0, 1.0
        )  # the later, the faster and the worse

    def run(self, videos: int, goal: float) -> dict[str, int]:
        """Videos that each candidate was tried on."""
        left = lambda: self.limit - self.spent  # noqa: E731
        self.tried = list(search(self.known, videos, goal, self.trial, left, lambda video: self.cost))
        assert self.spent <= self.limit and len(self.tried) == len(set(self.tried))
        return {candidate.method: len(trials) for candidate, trials in self.known.items()}


def test_everything_is_tried_where_there_is_time():
    assert set(World(9, limit=90).run(10, goal=0.95).values()) == {10}


@pytest.mark.parametrize("limit", [18, 30, 45, 60, 89])
def test_the_time_goes_to_the_fastest_that_reach_the_goal(limit):
    found = World(9, limit).run(10, goal=0.955)
    assert all(count >= 2 for count in found.values())
    # m4 is the fastest that agrees often enough, m0 the slowest; m8 agrees least.
    assert found["m4"] == max(found.values()) > found["m8"] or limit == 18
    if limit >= 2 * 9 + 8 * LEAST:
        assert found["m4"] == 10


def test_too_little_time_for_a_first_round():
    found = World(9, limit=4).run(10, goal=0.9)
    assert sum(found.values()) == 4


@pytest.mark.parametrize("videos", [1, 2, 3, 7, 16])
def test_rounds_take_every_video_once(videos):
    assert [video for one in rungs(videos) for video in one] == list(range(videos))


def test_the_most_promising_come_first():
    world = World(5, limit=100)
    world.run(2, goal=0.98)
    assert [candidate.method for candidate in promising(world.known, 0.98)] == ["m2", "m1", "m0", "m3", "m4"]


def test_candidates():
    found = candidates()
    assert len(found) >= 24 and len(set(found)) == len(found) and all(made.budget < 1 for made in found)
    assert {made.method for made in candidates((1.0, 0.2), ["divprune", "none"])} == {
        *(made.method for made in found), "divprune"
    }  # fmt: skip
    assert {made.budget for made in candidates((1.0, 0.2))} == {0.2}
    assert Candidate("evoprune:depth=0.5", 0.25).name == "evoprune:depth=0.5 -b 0.25"

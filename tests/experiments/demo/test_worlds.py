"""Both worlds through one interface."""

import pytest

from evoprune.bundled import DEMOS
from experiments.demo.worlds import QUESTIONS, WORLDS


def test_each_world_has_a_model_and_makes_its_splits():
    assert list(WORLDS) == [demo.world for demo in DEMOS.values()]
    assert all(world.make(split, 3) for world in WORLDS.values() for split in world.splits)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_a_world_makes_clips_and_asks_about_them(world):
    for seed in range(6):
        clip = world.make("validation", seed)
        asked = world.ask(clip, seed)
        assert asked == world.ask(world.make("validation", seed), seed) and 1 <= len(asked) <= QUESTIONS
        for q in asked:
            assert q.groups and (q.answer in q.options if q.options else q.answer)
            assert world.may_hold(seed, q.groups)

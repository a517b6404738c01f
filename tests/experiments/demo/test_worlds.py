"""Both worlds behind one interface."""

import pytest

from evoprune.bundled import DEMOS
from experiments.demo.worlds import FAMILIES, QUESTIONS, SCENES, SHAPES, WORLDS


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


def test_a_clip_of_scenes_is_of_one_family():
    for seed in range(12):
        found = {group for q in SCENES.ask(SCENES.make("heldout", seed), seed) for group in q.groups}
        family, other = ("picture", "video") if seed % 2 == 0 else ("video", "picture")
        assert found & set(FAMILIES[family]) and not found & set(FAMILIES[other])
        assert (
            SCENES.may_hold(seed, [family]) and not SCENES.may_hold(seed, [other]) and SCENES.may_hold(seed, ["open"])
        )
    assert SHAPES.may_hold(1, ["anything"])

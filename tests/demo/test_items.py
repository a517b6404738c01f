"""Clips of a split as questions, made when they are needed and gone afterwards."""

import numpy as np
import pytest

from evoprune.demo.clips import make_clip
from evoprune.demo.items import BLOCK, GROUPS, QUESTIONS, demo_items, groups
from evoprune.demo.questions import TYPES, ask
from evoprune.pipeline import is_demo_clip
from evoprune.video.probe import probe


def test_each_file_lives_as_long_as_it_is_looked_at(tmp_path):
    seen = []
    for video in demo_items("validation", 0, 3, tmp_path):
        assert list(tmp_path.iterdir()) == [video.path] and is_demo_clip(probe(video.path))
        seen.append(video.name)
    assert seen == ["validation-0", "validation-1", "validation-2"] and list(tmp_path.iterdir()) == []
    clips = demo_items("validation", 0, 3, tmp_path)
    next(clips)
    clips.close()
    assert list(tmp_path.iterdir()) == []


def test_questions_are_the_generators_own(tmp_path):
    (video,) = demo_items("heldout", 2, 1, tmp_path)
    seed = 2 * BLOCK
    asked = ask(make_clip("heldout", seed), np.random.default_rng(seed), QUESTIONS)
    assert [(i.question, i.answer, i.type) for i in video.items] == [(q.question, q.answer, q.type) for q in asked]
    assert all(item.id.startswith(video.name) for item in video.items)


def test_groups_tell_needs_flashes_and_the_camera_apart():
    seen = set()
    for seed in range(80):
        clip = make_clip("validation", seed)
        for question in ask(clip, np.random.default_rng(seed), QUESTIONS):
            found = groups(clip, question)
            seen |= set(found)
            assert question.type in GROUPS[found[0]]
            assert ("flash" in found) == question.flash
            assert found[-1] == ("panning" if clip.pan != (0.0, 0.0) else "static")
    assert seen == {*GROUPS, "flash", "panning", "static"}


def test_every_type_is_in_one_group():
    assert sorted(kind for types in GROUPS.values() for kind in types) == sorted(TYPES)


@pytest.mark.parametrize("skip", [{"validation-0"}, {"validation-1"}])
def test_what_is_done_is_not_made_again(tmp_path, skip, monkeypatch):
    made = []
    monkeypatch.setattr(
        "evoprune.demo.items.write_video", lambda clip, path, crf: (made.append(path.stem), path.touch())
    )
    names = [video.name for video in demo_items("validation", 0, 2, tmp_path, skip=skip)]
    assert names == made and set(names) == {"validation-0", "validation-1"} - skip

"""Clips of a split as questions, made when they are needed and gone afterwards."""

import numpy as np
import pytest

from evoprune.bench.evaluation.demo_clips import BLOCK, ClipName, clips_asked, demo_video, seeds
from evoprune.demo.clips import make_clip
from evoprune.demo.questions import GROUPS, TYPES, ask
from evoprune.demo.worlds import QUESTIONS
from evoprune.errors import UsageError
from evoprune.video.info import PICTURE, world_of
from evoprune.video.probe import probe


@pytest.mark.full
def test_each_file_lives_as_long_as_it_is_looked_at(tmp_path):
    for seed in seeds(0, 3):
        with demo_video(ClipName("validation", seed), tmp_path) as video:
            assert list(tmp_path.iterdir()) == [video.path] and world_of(probe(video.path)) == "shapes"
            assert video.name == f"validation-{seed}"
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), demo_video(ClipName("validation", 0), tmp_path):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_seeds_do_not_meet():
    assert seeds(0, 5) == range(5) and seeds(2, 3) == range(2 * BLOCK, 2 * BLOCK + 3)
    assert seeds(0, BLOCK)[-1] < seeds(1, 1)[0]


def test_questions_are_the_generators_own(tmp_path):
    seed = 2 * BLOCK
    with demo_video(ClipName("heldout", seed), tmp_path) as video:
        pass
    asked = ask(make_clip("heldout", seed), np.random.default_rng(seed), QUESTIONS)
    assert [(i.question, i.answer, i.type) for i in video.rows] == [(q.question, q.answer, q.type) for q in asked]
    assert all(item.id.startswith(video.name) for item in video.rows)


def test_groups_tell_needs_flashes_and_the_camera_apart():
    seen = set()
    for seed in range(80):
        clip = make_clip("validation", seed)
        for question in ask(clip, np.random.default_rng(seed), QUESTIONS):
            found = question.groups
            seen |= set(found)
            assert question.type in GROUPS[found[0]]
            assert found[1:-1] in ((), ("flash",))
            assert found[-1] == ("panning" if clip.pan != (0.0, 0.0) else "static")
    assert seen == {*GROUPS, "flash", "panning", "static"}


def test_every_type_is_in_one_group():
    assert sorted(kind for types in GROUPS.values() for kind in types) == sorted(TYPES)


def test_clips_of_scenes_are_chosen_by_family(tmp_path):
    pictures = clips_asked(["scenes"], "validation", 1, 3, ["picture"])
    assert [str(clip) for clip in pictures] == [f"scenes-validation-{BLOCK + seed}" for seed in (0, 2, 4)]
    mixed = clips_asked(["shapes", "scenes"], "validation", 0, 2, ["video"])
    assert [str(clip) for clip in mixed] == [
        "validation-0",
        "validation-1",
        "scenes-validation-1",
        "scenes-validation-3",
    ]
    with demo_video(ClipName("validation", 2, "scenes"), tmp_path, groups=("open",)) as video:
        assert all(row.groups[0] == "picture" and not row.options for row in video.rows)


def test_a_still_of_scenes_is_a_picture_and_is_the_same_file_each_time(tmp_path):
    files = []
    for crf in (18, 18, 33):
        with demo_video(ClipName("validation", 0, "scenes"), tmp_path, crf) as video:
            assert probe(video.path).kind == PICTURE
            files.append(video.path.read_bytes())
    assert files[0] == files[1] and len(files[2]) < len(files[0])


def test_a_split_that_a_world_does_not_have_and_a_block_too_small_are_refused():
    with pytest.raises(UsageError, match="scenes has no split 'portrait'"):
        clips_asked(["scenes"], "portrait", 0, 1)
    with pytest.raises(UsageError, match="holds 50,000"):
        clips_asked(["scenes"], "heldout", 0, 60_000, ["video"])

"""The generators are frozen, with the samples and the words of their questions: figures compare only about the same clips.

Where this fails, something has changed what is drawn or asked; so everything in results/ would have to be measured anew.
"""

import hashlib
import json
import re
from dataclasses import astuple
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from evoprune.batch.rows import Row
from evoprune.bundled import DEMOS, SIGN, WORDS
from evoprune.video.frames import probe, read_frames
from experiments.demo import drawing, questions, samples, scenes_lessons
from experiments.demo.choose_samples import WANTED
from experiments.demo.clips import make_clip
from experiments.demo.samples import CLIPS, SCENE_CLIPS, drawn, scene
from experiments.demo.scenes import asking, compose
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.scenes.asking import OPTIONS
from experiments.demo.scenes.happening import CHECKED_OVER_TIME, GIST, HAPPENING, types_for
from experiments.demo.scenes.looking import CHECKED, LOOKING
from experiments.demo.worlds import FAMILIES, SCENES, SHAPES, WORLDS
from experiments.demo.write import BLOCK

MANY = 1000  # questions: all that can be asked
# Of each split from a seed on: a digest of contents and questions, and the mean of all pixels, of their left half and of their
# upper half, which may differ a little elsewhere.
FROZEN = {
    ("shapes", "train", 0): ("128b1d8c20e571d2", [52.557, 52.576, 52.458]),
    ("shapes", "validation", 0): ("6811c24c2195a386", [61.77, 61.925, 61.632]),
    ("shapes", "heldout", 0): ("cb2c694f6c3e3404", [51.733, 51.442, 51.52]),
    ("shapes", "heldout", 2 * BLOCK): ("0ba4c1f5bb89beae", [68.676, 68.749, 68.656]),
    ("shapes", "portrait", 0): ("60bb491f23b5b7c3", [56.113, 56.103, 56.182]),
    ("scenes", "train", 0): ("88d8dff8d2ac7808", [87.583, 87.281, 87.898]),
    ("scenes", "validation", 0): ("ca0c84e7fd2a183c", [84.976, 85.571, 84.044]),
    ("scenes", "heldout", 100_000): ("b5f83f54df42ea95", [89.28, 88.885, 89.629]),
}  # fmt: skip
TYPES = {
    "shapes": {*questions.TYPES},
    "scenes": {*LOOKING, *CHECKED, *GIST, *HAPPENING, *CHECKED_OVER_TIME},
}


def rounded(value):
    """Numbers to four places, so that the last bits of a sine do not count."""
    if isinstance(value, tuple | list):
        return tuple(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


@cache
def look(world: str, split: str, first: int):
    """The digest, the means, and the types of what is asked."""
    content, means, types = hashlib.sha256(), [], set()
    for seed in range(first, first + 24):
        clip, rng = WORLDS[world].make(split, seed), np.random.default_rng(seed)
        asked = WORLDS[world].ask(clip, seed)
        if world == "shapes":
            asked += questions.ask(clip, rng, MANY)
            frames = drawing.render(clip, [0.2, 0.7 * clip.seconds])
        else:
            asked += asking.ask(clip, rng, MANY, types_for(clip))
            frames = scenes_drawing.render(clip, [0.2, 0.7 * clip.seconds])
        content.update(repr((rounded(astuple(clip)), asked)).encode())
        _, height, width, _ = frames.shape
        means.append([part.mean() for part in (frames, frames[:, :, : width // 2], frames[:, : height // 2])])
        types |= {question.type for question in asked}
    return content.hexdigest()[:16], np.mean(means, 0).round(3).tolist(), types


@pytest.mark.parametrize(("world", "split", "first"), FROZEN, ids=str)
def test_the_generators_are_frozen(world, split, first):
    digest, means = FROZEN[world, split, first]
    found = look(world, split, first)
    assert (found[0], found[1]) == (digest, pytest.approx(means, abs=0.03))


@pytest.mark.parametrize("world", TYPES)
def test_all_types_of_questions_are_among_those(world):
    assert set.union(*(look(*key)[2] for key in FROZEN if key[0] == world)) == TYPES[world]


def test_a_clip_of_scenes_is_of_one_family():
    assert list(WORLDS) == [demo.world for demo in DEMOS.values()]
    for seed in range(12):
        found = {group for q in SCENES.ask(SCENES.make("heldout", seed), seed) for group in q.groups}
        family, other = ("picture", "video") if seed % 2 == 0 else ("video", "picture")
        assert found & set(FAMILIES[family]) and not found & set(FAMILIES[other])
        assert [SCENES.may_hold(seed, [group]) for group in (family, "open", other)] == [True, True, False]
    assert SHAPES.may_hold(1, ["anything"])


def shapes():
    for seed in range(600):
        yield from (q.question for q in questions.ask(make_clip("train", seed), np.random.default_rng(seed), 40))


def scenes():
    """All that can be asked about some clips, one or two in a prompt, in the training of the model for scenes."""
    for seed in (*range(60), 515):  # the last is the first clip of which "What changes its colour?" is asked
        clip, rng = compose.make_clip("train", seed), np.random.default_rng(seed)
        noun = "picture" if clip.is_still else "video"
        taught = scenes_lessons.LOOKING if clip.is_still else scenes_lessons.LOOKING | scenes_lessons.HAPPENING
        for kind in (*types_for(clip).values(), *taught.values()):
            for draft in kind.make(clip, rng):
                options = (draft.answer, *draft.wrong) if len(draft.wrong) >= OPTIONS - 1 else ()
                yield Row("", (), (), draft.text, options=options[:OPTIONS]).prompt
        yield from (f"In the {which} {noun}: " for which in ("first", "second"))


@pytest.mark.parametrize("asked", [shapes, scenes])
def test_the_words_are_those_of_the_generator(asked):
    found = {word for question in asked() for word in re.findall(r"\w+", question)}
    found = {word.lower() for word in found if asked is shapes or not SIGN.fullmatch(word)}
    assert found == WORDS[asked.__name__]


def difference(path: str, drawn_frames: np.ndarray, times: list[float]) -> float:
    """Of a file's frames: grain that the codec has smoothed."""
    found = np.concatenate([chunk.frames for chunk in read_frames(probe(path), times)])
    return np.abs(found.astype(int) - drawn_frames).mean()


@pytest.mark.parametrize("name", CLIPS)
def test_the_clips_come_from_their_seeds(name):
    clip, times = drawn(name, CLIPS[name][0]), [0.0, 5.0]
    assert difference(f"samples/{name}", drawing.render(clip, times), times) < 6
    assert name not in WANTED or WANTED[name][0](clip)


def test_the_scene_comes_from_its_seed():
    (name,) = SCENE_CLIPS
    times = [0.0, 5.0]
    assert difference(f"samples/scenes/{name}", scenes_drawing.render(scene(name), times), times) < 6


def test_the_questions_are_those_of_the_clips():
    assert list(map(json.loads, Path("samples/questions.jsonl").read_text().splitlines())) == samples.questions()


def test_an_option_is_not_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        samples.main(["--help"])
    assert ended.value.code == 0 and "folder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

"""The samples are what their seeds draw."""

import json
from pathlib import Path

import numpy as np
import pytest

from evoprune.video.frames import probe, read_frames
from experiments.demo import drawing, samples
from experiments.demo.choose_samples import WANTED
from experiments.demo.samples import CLIPS, SCENE_CLIPS, drawn, questions, scene
from experiments.demo.scenes import drawing as scenes_drawing


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
    assert list(map(json.loads, Path("samples/questions.jsonl").read_text().splitlines())) == questions()


def test_an_option_is_not_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        samples.main(["--help"])
    assert ended.value.code == 0 and "folder" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())

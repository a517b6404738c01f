"""Clips of a split as files and questions: lossless or compressed, made on demand and deleted afterwards."""

import shlex
import subprocess
import sys

import numpy as np
import pytest

from evoprune.bench import EvalSettings, Evaluation
from evoprune.bench.questions import load_questions
from evoprune.bundled import DEMOS
from evoprune.errors import UsageError
from evoprune.video import probe, read_chunks
from experiments.demo import drawing
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.worlds import SCENES, SHAPES
from experiments.demo.write import BLOCK, ClipName, clips_asked, demo_video, demo_videos, main, seeds


def test_the_files_hold_every_pixel_and_evaluate_reads_the_questions(tmp_path, capsys):
    for world, count, render, fps in ((SHAPES, 1, drawing.render, 12), (SCENES, 2, scenes_drawing.render, 8)):
        folder = tmp_path / world.name
        main([str(folder), "--world", world.name, "--split", "validation", "--block", "3", "--clips", str(count)])
        path = folder / "questions.jsonl"
        assert capsys.readouterr().out == f"{path}\n"
        asked = load_questions(path)
        assert len(asked) == count
        for seed, video in zip(seeds(3, count), asked, strict=True):
            clip, info = world.make("validation", seed), probe(video.path)
            still = info.is_picture
            worlds = [demo.world for demo in DEMOS.values() if demo.made(info.tags)]
            assert worlds == [world.name] and still == (video.path.suffix == ".png")
            times = [clip.seconds / 2] if still else [i / fps for i in range(round(clip.seconds * fps))]
            assert still or (info.frames_total, info.duration_s) == (len(times), clip.seconds)
            drawn = render(clip, times)
            found = np.concatenate([chunk.pixels.copy() for chunk in read_chunks(info, times)])
            assert found.shape == drawn.shape and (found == drawn).all()
            questions = world.ask(clip, seed)
            made = [(row.question, row.options, row.answer, row.type, row.groups) for row in video.rows]
            assert made == [(q.question, q.options, q.answer, q.type, q.groups) for q in questions]


def test_compressed_files_are_those_of_the_experiments(tmp_path):
    main([str(tmp_path), "--split", "validation", "--clips", "2", "--compressed", "--group", "time,space"])
    named = load_questions(tmp_path / "questions.jsonl")
    with demo_videos(clips_asked("shapes", "validation", 0, 2), ["time", "space"]) as videos:
        assert [v.path.read_bytes() for v in videos] == [v.path.read_bytes() for v in named]
        samples = []
        for each in (videos, named):
            run = Evaluation(EvalSettings("x", (0.25,), ("evoprune",)), each)
            run.load()
            run.run()
            samples.append(
                [{name: s[name] for name in ("id", "answer", "right", "budget", "groups")} for s in run.samples]
            )
        assert samples[0] == samples[1] and not any(s["warnings"] for s in run.samples)
    assert not any(video.path.exists() for video in videos)


def test_what_cannot_be_written_is_said(tmp_path):
    command = f"ulimit -f 2; exec {shlex.quote(sys.executable)} -m experiments.demo.write {shlex.quote(str(tmp_path))} --clips 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1 and "error: cannot write a clip" in done.stderr and "TMPDIR" in done.stderr


def test_each_file_lives_as_long_as_it_is_looked_at(tmp_path):
    for seed in seeds(0, 3):
        with demo_video(ClipName("validation", seed), tmp_path) as video:
            assert list(tmp_path.iterdir()) == [video.path] and DEMOS["demo"].made(probe(video.path).tags)
            assert video.name == f"validation-{seed}"
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError), demo_video(ClipName("validation", 0), tmp_path):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_clips_of_scenes_are_chosen_by_family(tmp_path):
    pictures = clips_asked("scenes", "validation", 1, 3, ["picture"])
    assert [str(clip) for clip in pictures] == [f"scenes-validation-{BLOCK + seed}" for seed in (0, 2, 4)]
    videos = clips_asked("scenes", "validation", 0, 2, ["video"])
    assert [str(clip) for clip in videos] == ["scenes-validation-1", "scenes-validation-3"]
    with demo_video(ClipName("validation", 2, "scenes"), tmp_path, groups=("open",)) as video:
        assert all(row.groups[0] == "picture" and not row.options for row in video.rows)


def test_a_split_that_a_world_does_not_have_and_a_block_too_small_are_refused():
    with pytest.raises(UsageError, match="scenes has no split 'portrait'"):
        clips_asked("scenes", "portrait", 0, 1)
    with pytest.raises(UsageError, match="a block contains 50,000 such clips"):
        clips_asked("scenes", "heldout", 0, 60_000, ["video"])

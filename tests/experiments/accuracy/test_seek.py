"""experiments.accuracy.seek: where sampling times are moved, what is read there, and what a table says of the answers."""

import json
from functools import partial

import av
import pytest

from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.video.frames import probe, read_frames
from evoprune.video.plan import SamplingPlan, even_times, plan_sampling
from experiments.accuracy import seek
from experiments.accuracy.seek import (
    BUDGETS,
    KEYFRAME_S,
    MOVES,
    RATES,
    at_keyframes,
    at_random,
    difference,
    main,
    parts,
    table,
)
from experiments.demo.write import ClipName, demo_video


def sampling(seconds: float, count: int, start_s: float = 0.0) -> SamplingPlan:
    return SamplingPlan(start_s, start_s + seconds, even_times(start_s, start_s + seconds, count), count)


@pytest.mark.parametrize(
    ("plan", "moved"),
    [
        (sampling(2, 4), (0.0, 0.75, 1.0, 1.75)),  # a part ends before the keyframe that the next one begins with
        (sampling(2, 2), (0.0, 1.0)),
        (sampling(6, 4), (1.0, 2.0, 4.0, 5.0)),
        (sampling(8, 6), (1.0, 2.0, 3.0, 5.0, 6.0, 7.0)),
        (sampling(8, 2), (2.0, 6.0)),
        (sampling(1, 2, start_s=0.25), (0.5, 1.0)),
    ],
)
def test_a_time_is_moved_to_the_nearest_keyframe_in_its_part(plan, moved):
    assert at_keyframes(plan, 0) == pytest.approx(moved)


def test_random_times_stay_in_their_parts_and_are_the_same_each_time():
    plan = sampling(7, 14)
    drawn = at_random(plan, 3)
    assert all(start <= time_s < end for time_s, (start, end) in zip(drawn, parts(plan), strict=True))
    assert drawn == at_random(plan, 3) != at_random(plan, 4)


@pytest.mark.parametrize(
    "clip", [ClipName("validation", 6_400_000), ClipName("validation", 6_400_001, "scenes")], ids=str
)
def test_times_are_moved_to_the_keyframes_of_the_file_as_the_option_moves_them(clip, tmp_path):
    with demo_video(clip, tmp_path, keyframe_s=KEYFRAME_S) as video:
        info = probe(video.path)
        with av.open(str(video.path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.pts is not None]
            found = [float(packet.pts * packet.time_base) for packet in packets if packet.is_keyframe]
        assert found == [number * KEYFRAME_S for number in range(len(found))] and len(found) >= 4
        for fps in RATES:
            plan = plan_sampling(info.duration_s, fps=fps)
            option = {"seek": "keyframes", "part_s": plan.seconds_per_frame}
            by_option = [time_s for chunk in read_frames(info, plan.times_s, **option) for time_s in chunk.times_s]
            by_times = [time_s for chunk in read_frames(info, at_keyframes(plan, 0)) for time_s in chunk.times_s]
            assert by_option == by_times


def test_other_frames_are_read_than_the_prompt_is_made_for(tmp_path, monkeypatch):
    read = []

    def reading(info, times_s, **options):
        read.append(times_s)
        return read_frames(info, times_s, **options)

    monkeypatch.setattr(seek, "read_frames", reading)
    monkeypatch.setattr(seek, "RATES", (0.75,))
    demo = load_model(ModelOptions("demo", dtype="fp32"))
    job = ClipName("validation", 6_400_000), ["fast"]
    exact, keyframes, random = seek.lines_of(demo, (), tmp_path, job)
    assert [line["times"] for line in (exact, keyframes, random)] == [*MOVES]
    assert read[:2] == [(0.75, 2.25, 3.75, 5.25), (1, 2, 4, 5)]
    assert (exact["moved"], keyframes["moved"], random["moved"]) == (0, 4, 4) and keyframes["moved_s"] == 1
    assert all(len(line["right"]) == len(line["answers"]) == 6 for line in (exact, keyframes, random))


def test_the_error_of_a_difference_is_that_over_clips():
    right = [[True, True], [True, True], [False, False], [True, False]]
    others = [[True, False], [True, False], [True, False], [True, False]]
    mean, error = difference(right, others)  # one more, one more, one fewer, as many
    assert mean == 12.5 and error == pytest.approx(100 * (2.75 / 3 / 4) ** 0.5 / 2)


def line(clip: str, times: str, right: list[bool], budget: str) -> dict:
    moved = 0 if times == "exact" else 4
    counts = {"frames": 8, "moved": moved, "moved_s": moved / 4}
    return {"clip": clip, "fps": 2.0, "times": times, "budget": budget, "right": right} | counts


def test_the_command_prints_the_tables(tmp_path, capsys):
    given = [
        line(clip, times, [True, times != "random"], budget) | {"groups": [["video"], ["video", "moment"]]}
        for clip in "ab" for budget in BUDGETS for times in MOVES
    ]  # fmt: skip
    path = tmp_path / "scenes.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in given))
    main([str(path)])
    printed = capsys.readouterr().out
    assert all(row in printed for row in table(given))
    assert "| 2 frames/s | `-b full` | 4 | 100.0 | 100.0 | +0.0 ± 0.0 | 50.0 | -50.0 ± 0.0 |" in printed
    assert "| 2 frames/s | all: moment | 6 | 100.0 | 100.0 | +0.0 ± 0.0 | 0.0 | -100.0 ± 0.0 |" in printed
    assert "| 2 frames/s | keyframes | 50% | 0.25 s |" in printed


def fake(model: str, groups, folder: str):
    return partial(_answered, model)


def _answered(model: str, job: seek.Job) -> list[dict]:
    clip, budgets = job
    return [{"clip": str(clip), "model": model, "budget": budget} for budget in budgets]


def test_a_run_does_what_its_file_lacks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seek, "start", fake)
    asked = ["-o", str(tmp_path / "runs" / "scenes.jsonl"), "--world", "scenes", "--block", "64"]
    main([*asked, "--clips", "1", "-b", "fast"])
    main([*asked, "--clips", "2", "-b", "fast,full"])
    lines = seek.read(tmp_path / "runs" / "scenes.jsonl")
    first, second = (f"scenes-validation-{seed}" for seed in (6_400_001, 6_400_003))  # those of videos
    found = [(line["clip"], line["budget"]) for line in lines]
    assert found == [(first, "fast"), (first, "full"), (second, "fast"), (second, "full")]
    assert {line["model"] for line in lines} == {"demo-scenes"}
    assert capsys.readouterr().out.splitlines() == ["1 of 1", "1 of 2", "2 of 2"]
    main([*asked, "--clips", "2"])
    assert len(seek.read(tmp_path / "runs" / "scenes.jsonl")) == 6

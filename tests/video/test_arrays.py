"""Tests of `evoprune.read_frames`, which reads frames from any input into one array and returns their times."""

import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evoprune
from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.video.frames import frame_times, probe
from evoprune.video.plan import SamplingOptions, plan_sampling
from evoprune.video.temporary import temporary_file
from tests.video.files import number_of, numbered_frames, write_image, write_video
from tests.video.kinds import KINDS, write_kind


@pytest.fixture(scope="module")
def clip(folder):
    """A video that lasts 25.6 s, with 10 numbered frames per second and a keyframe every second."""
    return write_video(folder / "arrays.mp4", numbered_frames(256), options={"sc_threshold": "0"})


def numbers(frames):
    return [number_of(rgb) for rgb in frames]


def test_times_get_the_frames_on_screen_and_their_own_times(clip):
    frames, times_s = evoprune.read_frames(clip, [-1, 0.25, 0.29, 3, 9.25, 9.25, 99])
    assert frames.dtype == np.uint8 and frames.shape == (7, 48, 64, 3) and frames.flags.c_contiguous
    assert numbers(frames) == [0, 2, 2, 30, 92, 92, 255]
    assert times_s.dtype == np.float64
    np.testing.assert_allclose(times_s, [0, 0.2, 0.2, 3, 9.2, 9.2, 25.5], atol=1e-9)


def test_arrays_of_times_and_of_none(clip):
    assert numbers(evoprune.read_frames(str(clip), np.array([1.05, 2.05], np.float32))[0]) == [10, 20]
    frames, times_s = evoprune.read_frames(clip, [])
    assert frames.shape == (0, 48, 64, 3) and times_s.shape == (0,)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"frames": 4}, [32, 96, 160, 224]),  # the middles of the four parts, which last 6.4 s each
        ({"frames": 1}, [128]),
        ({"frames": 3, "start_s": 10, "end_s": 13}, [105, 115, 125]),
        ({"fps": 1, "start_s": 10, "end_s": 13}, [105, 115, 125]),
        ({"fps": 0.01}, [128]),
        ({"fps": np.float32(1), "start_s": -2}, [241, 251]),
    ],
)
def test_equal_parts(clip, how, expected):
    frames, times_s = evoprune.read_frames(clip, **how)
    assert numbers(frames) == expected
    np.testing.assert_allclose(times_s, np.array(expected) / 10, atol=1e-9)


def test_an_even_number_is_sampled_as_for_a_model(clip):
    planned = plan_sampling(probe(clip).duration_s, SamplingOptions(frames=6, start_s=3, end_s=17)).times_s
    alone = evoprune.read_frames(clip, planned)
    spread = evoprune.read_frames(clip, frames=6, start_s=3, end_s=17)
    assert all(np.array_equal(a, b) for a, b in zip(alone, spread, strict=True))


def test_keyframes_near_the_middles_are_read_on_request(clip):
    frames, times_s = evoprune.read_frames(clip, frames=4, seek="keyframes")
    assert all(number % 10 == 0 for number in numbers(frames))
    np.testing.assert_allclose(times_s, np.array(numbers(frames)) / 10, atol=1e-9)
    assert np.abs(times_s - [3.2, 9.6, 16, 22.4]).max() < 3.2


@pytest.mark.full
def test_large_frames_come_in_several_chunks(folder):
    path = write_video(folder / "large.mp4", numbered_frames(30, 1088, 1920), gop=30)
    frames, _ = evoprune.read_frames(path, frames=30)
    assert frames.nbytes > 2**27 and numbers(frames) == list(range(30))


def test_a_folder_and_a_picture(tmp_path):
    for i, rgb in enumerate(numbered_frames(6)):
        write_image(tmp_path / f"{i}.png", rgb)
    frames, times_s = evoprune.read_frames(tmp_path, [0, 2.6])
    assert numbers(frames) == [0, 5] and times_s.tolist() == [0, 2.5]
    assert numbers(evoprune.read_frames(tmp_path, frames=3, frame_rate=1)[0]) == [1, 3, 5]
    for how in ({"frames": 64}, {"fps": 2}, {"times_s": [0.5]}):
        frames, times_s = evoprune.read_frames(tmp_path / "3.png", **how)
        assert numbers(frames) == [3] and times_s.tolist() == [0]
    with pytest.raises(UsageError, match="no start or end"):
        evoprune.read_frames(tmp_path / "3.png", frames=1, end_s=2)


@pytest.mark.parametrize("clip", ["clip.mp4"])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({}, "neither times nor frames nor fps"),
        ({"times_s": [1], "frames": 2}, "times cannot be combined"),
        ({"times_s": [1], "start_s": 1.0}, "times cannot be combined"),
        ({"times_s": [1], "seek": "auto"}, "times cannot be combined"),
        ({"times_s": [2, 1]}, "ascend"),
        ({"times_s": [float("nan")]}, "ascend"),
        ({"times_s": [0, float("inf")]}, "ascend"),
        ({"times_s": 0.5}, "times_s is 0.5, not"),
        ({"times_s": ["soon"]}, "not numbers"),
        ({"times_s": [10**400]}, "not numbers"),
        ({"frames": 2, "fps": 1}, "cannot be combined"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 2.5}, "frames is 2.5, not a whole number"),
        ({"frames": True}, "frames is True, not"),
        ({"fps": "2"}, "fps is '2', not a number"),
        ({"fps": 2, "start_s": None}, "start_s is None, not a number"),
        ({"frames": 2, "seek": "fast"}, "unknown seek"),
        ({"frames": 2, "decoder": "ffmpeg"}, "unknown decoder"),
        ({"frames": 2, "frame_rate": -1}, "above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(monkeypatch, tmp_path, clip, how, says):
    write_video(tmp_path / clip, numbered_frames(2))
    monkeypatch.chdir(tmp_path)
    folder = how.get("frame_rate") is not None
    if folder:
        write_image(tmp_path / "0.png", numbered_frames(1)[0])
    with pytest.raises(UsageError, match=says) as caught:
        evoprune.read_frames("." if folder else clip, **how)
    assert caught.value.hint


def test_more_times_than_a_request_can_hold_are_refused_before_anything_is_read(tmp_path):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(tmp_path / "0.png")
    with pytest.raises(UsageError, match="more than 2,097,152 frames") as caught:
        evoprune.read_frames(tmp_path / "missing", (number * 1e-9 for number in count()))
    assert caught.value.hint
    for how in ({"frames": 4_000_000}, {"fps": 1e7}):
        with pytest.raises(UsageError, match="000,000 frames are requested at once") as caught:
            evoprune.read_frames(tmp_path, **how)
        assert caught.value.hint


@pytest.mark.parametrize("rate", [1e308, 1e300, 1e-300])
def test_extreme_times_and_rates_of_a_folder(rate, tmp_path):
    for number in range(2):
        write_image(tmp_path / f"{number}.png", numbered_frames(2)[number])
    frames, times_s = evoprune.read_frames(tmp_path, [-1e308, -1.0, 0.0, 0.0, 1e308], frame_rate=rate)
    assert [number_of(rgb) for rgb in frames] == [0, 0, 0, 0, 1] and times_s.tolist() == [0, 0, 0, 0, 1 / rate]
    with pytest.raises(VideoError, match="no usable duration") as caught:
        evoprune.read_frames(tmp_path, frames=2, frame_rate=1e-308)
    assert caught.value.hint


@pytest.mark.parametrize("path", [None, b"clip.mp4", 3, ["clip.mp4"]])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(UsageError, match="not a path"):
        evoprune.read_frames(path, frames=2)


def test_files_that_cannot_be_read(tmp_path, clip):
    with pytest.raises(VideoError, match="no such file"):
        evoprune.read_frames(tmp_path / "gone.mp4", frames=2)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(VideoError, match="text file"):
        evoprune.read_frames(tmp_path / "text.mp4", [0])
    with pytest.raises(VideoError, match="is after the end of"):
        evoprune.read_frames(clip, frames=2, start_s=100)


@pytest.mark.parametrize("how", [{"frames": 10**15}, {"fps": 1e300}, {"times_s": [0.0] * 200}])
def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(monkeypatch, clip, how):
    monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _: 2**20)
    with pytest.raises(OutOfMemory, match=r"frames of 64x48 take .*iB, but only 1 MiB are available") as caught:
        evoprune.read_frames(clip, **how)
    assert "start_s" in caught.value.hint and caught.value.stage == "read"


def test_no_torch_is_imported(clip):
    code = f"import sys, evoprune; evoprune.read_frames({str(clip)!r}, frames=2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_recipe_of_the_guide(clip, monkeypatch):
    page = Path("docs/guide.md").read_text(encoding="utf-8")
    (recipe,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "read_frames" in code)
    names: dict = {}
    monkeypatch.chdir(clip.parent)
    exec(recipe.replace("clip.mp4", clip.name), names)
    assert names["frames"].shape == (64, 48, 64, 3) and len(names["times_s"]) == 64


# The times of all frames, and files in memory.


@pytest.mark.few(20)
@pytest.mark.parametrize("name", KINDS)
def test_frame_times_are_those_of_the_frames(folder, name):
    info, kind = probe(write_kind(folder, name)), KINDS[name]
    found = frame_times(info)
    assert len(found.times_s) == kind.frames - kind.hidden and found.times_s == sorted(found.times_s)
    again = evoprune.read_frames(info.path, [time + 1e-3 for time in found.times_s])
    np.testing.assert_allclose(again[1], found.times_s, atol=1e-6)
    assert numbers(again[0]) == list(range(kind.hidden, kind.frames))


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "vp9.webm", "h264.avi", "h264.ts"])
def test_the_header_counts_the_frames(folder, name):
    assert frame_times(probe(write_kind(folder, name))).stated == 40


def test_bytes_are_read_as_the_file_is(clip, tmp_path, monkeypatch):
    right = evoprune.read_frames(clip, frames=5)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with temporary_file([clip.read_bytes()], "the video") as path:
        found = evoprune.read_frames(path, frames=5)
    assert all(np.array_equal(a, b) for a, b in zip(found, right, strict=True))
    assert not Path(path).exists() and not [*tmp_path.iterdir()]


def test_an_error_about_bytes_names_no_file():
    for content, says in ((b"", "the video is empty"), (b"no video", "the video is not a video: it is a text file")):
        with pytest.raises(VideoError, match=says), temporary_file([content], "the video") as path:
            probe(path)
        assert not Path(path).exists()

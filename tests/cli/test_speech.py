"""`--speech`, with a stand-in for faster-whisper."""

import json
import sys

import pytest

from tests.speech import LoudModel, write_sounding
from tests.video.files import numbered_frames, write_video


@pytest.fixture
def clip(tmp_path):
    return str(write_sounding(tmp_path / "clip.mp4", 10.0, [(1.0, 2.0), (5.0, 7.0)]))


def test_ask_says_what_was_transcribed(cli, clip, speech_model):
    result = cli("ask", clip, "Who speaks?", "-n", "1", "--speech", speech_model, "-v")
    assert result.code == 0 and f"speech: {speech_model}, 2 lines" in result.err.replace("\n", "")
    assert "language de" in result.err and "is not read" not in result.err
    record = cli("ask", clip, "Who speaks?", "-n", "1", "--speech", speech_model, "--json").record
    assert record["subtitles"]["language"] == "de" and record["time_ms"]["speech"] is not None


def test_without_sound_a_warning_says_so(cli, tmp_path, speech_model):
    silent = str(write_video(tmp_path / "silent.mp4", numbered_frames(10)))
    result = cli("ask", silent, "What?", "-n", "1", "--speech", speech_model)
    assert result.code == 0 and "silent.mp4 has no sound" in " ".join(result.err.split())


def test_what_is_missing_is_named(cli, clip, speech_model, monkeypatch, tmp_path):
    result = cli("ask", clip, "What?", "--speech", "huge")
    assert result.code == 2 and "there is no speech model 'huge'" in result.err and "hint: use auto, tiny" in result.err
    assert "did you mean" not in cli("ask", clip, "What?", "--speech", "./nope").err  # a path is not like "none"
    for wrong, right in (("bsae", "base"), ("large-v3", "large-v3-turbo"), ("Tiny", "tiny"), ("non", "none")):
        result = cli("ask", clip, "What?", "--speech", wrong)
        assert result.code == 2 and f"hint: did you mean {right}? use auto, " in result.err
    monkeypatch.setattr("evoprune.session.speech.cached_folder", lambda name, revision: None)
    result = cli("ask", clip, "What?", "--speech", "tiny", "--offline")
    assert result.code == 4 and "hf download Systran/faster-whisper-tiny" in " ".join(result.err.split())
    monkeypatch.delitem(sys.modules, "faster_whisper")
    monkeypatch.setattr("evoprune.video.sound.find_spec", lambda name: None)
    result = cli("ask", clip, "What?", "--speech", "tiny")
    assert result.code == 2 and "[speech]'" in result.err


def test_find_gives_each_segment_its_lines(cli, clip, speech_model, monkeypatch):
    from evoprune.session import OpenInputs

    said = []
    encode = OpenInputs.encode
    monkeypatch.setattr(
        OpenInputs, "encode", lambda self, *given: said.append(self.plans[0].subtitles.text) or encode(self, *given)
    )
    result = cli("find", clip, "a red star", "--speech", speech_model, "--segment", "4", "-q")
    assert result.code == 0 and len(LoudModel.calls) == 1
    assert "[0:01]" in said[0] and "[0:05]" in said[1] and "[0:01]" not in said[1]


def test_batch_and_eval_transcribe(cli, clip, speech_model, tmp_path):
    out = tmp_path / "out.jsonl"
    result = cli("batch", clip, "-Q", "Who?", "-m", "demo", "-n", "1", "--speech", speech_model, "-o", str(out))
    assert result.code == 0 and json.loads(out.read_text())["subtitles"]["lines"] == 2
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"video": clip, "question": "What colour is the square?", "answer": "red"}))
    result = cli("eval", "--data", str(rows), "-b", "0.5", "--speech", speech_model, "--json")
    assert result.code == 0 and LoudModel.loads == 1

"""Test transcribed lines in prompts, in reports and in the cache, using a stand-in for faster-whisper."""

from types import SimpleNamespace

import numpy as np
import pytest

from evoprune.errors import ModelError
from evoprune.session import speech
from evoprune.session.ahead import read_ahead
from evoprune.session.cache import Cache
from evoprune.session.loading.model import load_model
from evoprune.video import probe
from evoprune.video_qa import VideoQA
from tests.speech import LoudModel, write_sounding
from tests.threads import one_thread  # noqa: F401
from tests.video.files import numbered_frames, write_video

BURSTS = [(1.0, 2.0), (5.0, 7.0)]


@pytest.fixture(scope="module")
def qa(saved):
    return VideoQA(load_model(str(saved), dtype="fp32", pack=False), budget=0.5)


@pytest.fixture
def clip(tmp_path):
    return write_sounding(tmp_path / "clip.mp4", 10.0, BURSTS)


def lines_of(encoded):
    return encoded.plan.subtitles.text


def test_what_is_said_is_in_the_prompt_and_in_the_report(qa, clip, speech_model):
    told = []
    encoded = qa.encode(clip, frames=4, speech=speech_model, progress=lambda *step: told.append(step))
    assert lines_of(encoded) == "Subtitles:\n[0:01] loud for 1 s\n[0:05] loud for 2 s\n\n"
    facts = encoded.report.subtitles
    assert (facts["speech"], facts["language"], facts["lines"]) == (speech_model, "de", 2)
    assert ("speech", 0, 10) in told
    answer = encoded.ask("Who speaks?", max_new_tokens=1)
    str(answer)
    report = answer.report
    times = report.time_ms
    assert times.speech > 0 and "sound_ignored" not in report.warnings
    stages = ("plan", "speech", "read", "preprocess", "compile", "encode", "store", "prefill")
    assert sum(getattr(times, stage) or 0 for stage in stages) - times.overlap <= times.ttft_wall * 1.05 + 5
    again = qa.encode(clip, frames=2, speech=speech_model)
    assert lines_of(again) == lines_of(encoded) and LoudModel.loads == 1  # kept in memory
    assert qa.encode(clip, frames=4).report.subtitles is None


def test_only_the_span_is_transcribed(qa, clip, speech_model):
    encoded = qa.encode(clip, frames=2, speech=speech_model, start_s=4, end_s=6)
    assert lines_of(encoded) == "Subtitles:\n[0:05] loud for 1 s\n\n"
    assert LoudModel.calls[0][0] == pytest.approx(2, abs=0.01)


def test_subtitles_take_precedence(qa, clip, speech_model, tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "AUTO", speech_model)
    assert "loud" in lines_of(qa.encode(clip, frames=2, speech="auto"))
    clip.with_suffix(".srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello\n")
    LoudModel.calls.clear()
    for given in ({"speech": "auto"}, {"speech": speech_model, "subtitles": "auto"}):
        encoded = qa.encode(clip, frames=2, **given)
        assert "Hello" in lines_of(encoded) and encoded.report.subtitles["speech"] is None
    assert not LoudModel.calls


def test_without_sound_a_warning_says_so(qa, tmp_path, speech_model):
    silent = write_video(tmp_path / "silent.mp4", numbered_frames(10))
    encoded = qa.encode(silent, frames=2, speech=speech_model)
    assert "no_sound" in encoded.report.warnings and encoded.report.subtitles is None
    assert "no_sound" not in qa.encode(silent, frames=2, speech="auto").report.warnings
    array = np.zeros((4, 56, 56, 3), np.uint8)
    assert "no_sound" in qa.encode(array, frame_rate=2.0, speech=speech_model).report.warnings


def test_if_nobody_speaks_there_are_no_lines(qa, tmp_path, speech_model):
    still = write_sounding(tmp_path / "still.mp4", 3.0, [])
    encoded = qa.encode(still, frames=2, speech=speech_model)
    facts = encoded.report.subtitles
    assert lines_of(encoded) == "" and (facts["lines"], facts["language"]) == (0, None)
    answer = encoded.ask("Who speaks?", max_new_tokens=1)
    str(answer)
    assert "sound_ignored" not in answer.report.warnings


def test_a_transcript_is_cached_by_content(qa, clip, speech_model, tmp_path):
    cache = Cache(tmp_path / "cache")
    first = qa.encode(clip, frames=2, speech=speech_model, cache=cache)
    calls = len(LoudModel.calls)
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(clip.read_bytes())
    second = qa.encode(copy, frames=2, speech=speech_model, cache=cache)
    assert lines_of(second) == lines_of(first) and len(LoudModel.calls) == calls
    assert second.report.subtitles["language"] == "de" and second.report.cache == "hit"
    qa.encode(copy, frames=2, speech=speech_model, start_s=4, cache=cache)
    assert len(LoudModel.calls) > calls
    (entry, *_) = sorted((tmp_path / "cache" / "speech").iterdir())
    damaged = bytearray(entry.read_bytes())
    damaged[-20] ^= 1
    for each in (tmp_path / "cache" / "speech").iterdir():
        each.write_bytes(damaged)
    third = tmp_path / "third.mp4"
    third.write_bytes(clip.read_bytes())
    assert lines_of(qa.encode(third, frames=2, speech=speech_model, cache=cache)) == lines_of(first)


def test_a_file_that_is_replaced_while_it_is_heard_leaves_no_transcript(qa, clip, speech_model, tmp_path, monkeypatch):
    heard = speech._transcribed

    def replaced(*given):
        yield from heard(*given)
        write_sounding(tmp_path / "new.mp4", 10.0, [(8.0, 9.0)]).replace(clip)

    monkeypatch.setattr(speech, "_transcribed", replaced)
    sampling, options = SimpleNamespace(speech=speech_model), SimpleNamespace(offline=True, cores=None)
    cache = Cache(tmp_path / "cache")
    speech.speech_of(probe(clip), sampling, (0.0, 10.0), options, cache=cache)
    assert not (tmp_path / "cache" / "speech").exists()


def test_a_failed_transcription_is_released_without_stopping_the_next_one(clip, speech_model):
    options = SimpleNamespace(offline=True, cores=None)
    wanted = speech._SpeechRequest.of(probe(clip), SimpleNamespace(speech=speech_model), (0.0, 10.0), options)
    LoudModel.problem = RuntimeError("no memory")
    failed = wanted.begin()
    with pytest.raises(ModelError):
        list(failed.read().chunks())
    LoudModel.problem = None
    following = wanted.begin()
    assert following is not failed
    wanted.release(failed)
    assert any(piece.lines for piece in following.read().chunks())
    wanted.release(following)


def test_long_sound_is_cut_where_it_is_quiet(tmp_path, speech_model):
    bursts = [(float(a), a + 4.0) for a in range(0, 300, 5)]
    path = write_sounding(tmp_path / "long.mkv", 300.0, bursts, codec="pcm_s16le", rate=16_000, layout="mono")
    info = probe(path)
    windows = list(speech._windows(info, 0.0, 300.0))
    assert all(len(samples) <= 120 * 16_000 for _, samples, _ in windows) and len(windows) == 3
    ends = [at_s + len(samples) / 16_000 for at_s, samples, _ in windows]
    assert all(4.0 <= end % 5 <= 5.0 or end % 5 < 0.1 for end in ends[:-1])
    assert [at_s for at_s, _, _ in windows[1:]] == pytest.approx(ends[:-1])


def test_the_language_is_that_of_the_first_words(qa, tmp_path, speech_model):
    path = write_sounding(tmp_path / "a.mkv", 300.0, [(150.0, 151.0), (290.0, 291.0)], codec="pcm_s16le", rate=16_000)
    encoded = qa.encode(path, frames=2, speech=speech_model)
    assert [language for _, language in LoudModel.calls] == [None, "de"]
    assert "[2:30] loud" in lines_of(encoded) and "[4:50] loud" in lines_of(encoded)


def test_a_model_that_fails_is_named(qa, clip, speech_model):
    LoudModel.problem = RuntimeError("unsupported model version")
    with pytest.raises(ModelError, match="speech model failed: unsupported model version"):
        qa.encode(clip, frames=2, speech=speech_model)
    LoudModel.problem = None
    assert "loud" in lines_of(qa.encode(clip, frames=2, speech=speech_model))  # it is tried again


def test_offline_nothing_is_downloaded(qa, speech_model, monkeypatch):
    monkeypatch.setattr(speech, "cached_folder", lambda name, revision: None)
    monkeypatch.setattr(speech, "fetch", lambda *given: pytest.fail("downloads"))
    with pytest.raises(ModelError, match=r"base is not on this machine(.|\n)*hf download Systran/faster-whisper-base"):
        speech.check_offline("auto", True)
    speech.check_offline(speech_model, True)
    speech.check_offline("tiny", False)


def test_transcription_begins_before_the_model_is_loaded(saved, clip, speech_model):
    with read_ahead(clip, str(saved), frames=2, speech=speech_model) as ahead:
        qa = VideoQA.load(str(saved), dtype="fp32", ahead=ahead)
        encoded = qa.encode(clip, frames=2, speech=speech_model)
    assert "loud" in lines_of(encoded) and LoudModel.loads == 1 and len(LoudModel.calls) == 1

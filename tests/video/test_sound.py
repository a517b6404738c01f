"""Tests of reading sound for speech recognition: times, spans, gaps, damage, and files without sound."""

import re
import sys
from types import ModuleType

import numpy as np
import pytest

from evoprune.errors import UsageError
from evoprune.util import install_hint
from evoprune.video import SamplingOptions, probe, read_audio
from evoprune.video.sandbox import isolation
from tests.speech import loud_parts, write_sounding
from tests.video.files import numbered_frames, write_video

BURSTS = [(1.0, 2.0), (5.0, 5.5), (8.0, 9.5)]


def heard(path, start_s=0.0, end_s=1e9):
    """Return the start and end of each loud part of a file, rounded to 0.1 s, and the number of damaged packets."""
    found = []
    damaged = 0
    for piece in read_audio(probe(path), start_s, end_s):
        assert piece.samples.dtype == np.float32 and len(piece.samples) <= 30 * 16_000
        damaged = piece.damaged
        found += loud_parts(piece.samples, piece.start_s)
    return [(round(a, 1), round(b, 1)) for a, b in found], damaged


def near(found, wanted):
    return len(found) == len(wanted) and np.abs(np.subtract(found, wanted)).max(initial=0) < 0.16


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {}),
        ("a.mkv", {"codec": "libopus", "rate": 48_000}),
        ("a.mkv", {"codec": "pcm_s16le", "layout": "mono", "rate": 8000}),
        ("a.ts", {"codec": "aac", "rate": 48_000}),
        ("a.avi", {"codec": "libmp3lame"}),
        ("a.webm", None),
    ],
)
def test_sound_comes_with_its_times(tmp_path, name, how):
    if how is None:
        path = write_video(tmp_path / name, numbered_frames(10), codec="libvpx-vp9")
        assert heard(path) == ([], 0) and not list(read_audio(probe(path), 0, 1))
        return
    path = write_sounding(tmp_path / name, 10.0, BURSTS, **how)
    found, damaged = heard(path)
    assert near(found, BURSTS) and not damaged


def test_only_the_span_is_read(tmp_path):
    path = write_sounding(tmp_path / "a.mp4", 60.0, [(10.0, 11.0), (30.0, 32.0), (50.0, 51.0)])
    found, _ = heard(path, 20.0, 31.0)
    assert near(found, [(30.0, 31.0)])
    (piece,) = read_audio(probe(path), 20.0, 31.0)
    assert abs(piece.start_s - 20.0) < 0.001 and abs(piece.end_s - 31.0) < 0.001
    assert [len(p.samples) for p in read_audio(probe(path), 0.0, 60.0)][:2] == [480_000, 480_000]


def test_times_count_from_the_first_frame(tmp_path):
    path = write_sounding(tmp_path / "late.mkv", 12.0, BURSTS, video_from_s=4.0)
    assert near(heard(path)[0], [(1.0, 1.5), (4.0, 5.5)])
    path = write_sounding(tmp_path / "late-sound.mkv", 12.0, BURSTS, sound_from_s=4.0)
    assert near(heard(path)[0], BURSTS[1:])


def test_a_gap_in_the_sound_moves_nothing(tmp_path):
    path = write_sounding(tmp_path / "gap.mkv", 10.0, BURSTS, codec="pcm_s16le", gap=(2.5, 4.5))
    assert near(heard(path)[0], BURSTS)


def test_of_a_cut_or_damaged_file_the_rest_is_heard(tmp_path):
    path = write_sounding(tmp_path / "a.ts", 10.0, BURSTS)
    content = bytearray(path.read_bytes())
    path.write_bytes(content[: len(content) * 2 // 3])
    found, _ = heard(path)
    assert near(found[:1], BURSTS[:1]) and len(found) < 3
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(reversed(content[middle : middle + 2000]))
    path.write_bytes(content)
    found, _ = heard(path)
    assert near([found[0], found[-1]], [BURSTS[0], BURSTS[-1]])


def test_packets_that_cannot_be_decoded_are_counted(tmp_path):
    path = write_sounding(tmp_path / "a.avi", 10.0, BURSTS, codec="libmp3lame")
    content = bytearray(path.read_bytes())
    at = content.find(b"01wb", len(content) // 2)
    content[at + 8 : at + 400] = b"\xff" * 392
    path.write_bytes(content)
    found, damaged = heard(path)
    assert near([found[0], found[-1]], [BURSTS[0], BURSTS[-1]]) and damaged


def test_a_worker_that_is_left_early_is_not_kept(tmp_path):
    path = write_sounding(tmp_path / "a.mp4", 70.0, [(1.0, 2.0)])
    info = probe(path)
    before = len(isolation._idle)
    pieces = read_audio(info, 0.0, 70.0)
    next(pieces)
    pieces.close()
    assert len(isolation._idle) <= before
    assert sum(len(piece.samples) for piece in read_audio(info, 0.0, 70.0)) == pytest.approx(70 * 16_000, abs=2000)


def test_a_speech_model_is_checked_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_whisper", ModuleType("faster_whisper"))
    assert SamplingOptions(speech="tiny").speech == "tiny"
    for wrong, said in (("huge", "no speech model 'huge'"), (tmp_path, "has no model.bin")):
        with pytest.raises(UsageError, match=said):
            SamplingOptions(speech=wrong)
    monkeypatch.delitem(sys.modules, "faster_whisper")
    monkeypatch.setattr("evoprune.video.sound.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape(f"not installed\nhint: {install_hint('speech')}")):
        SamplingOptions(speech="tiny")

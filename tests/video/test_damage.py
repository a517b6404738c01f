from dataclasses import replace

import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.decode import read_frames
from evoprune.video.probe import probe
from tests.video.files import numbered_frames, numbers, spoil, write_video


def test_a_damaged_packet_leaves_the_frame_before_it_on_screen(folder):
    whole = write_video(folder / "intra.mp4", numbered_frames(30), gop=1)
    info = probe(spoil(whole, folder / "spoilt.mp4", {4, 11, 12}))
    right = list(range(30))
    right[4], right[11], right[12] = 3, 10, 10
    assert numbers(info, [0.05 + 0.1 * i for i in range(30)]) == right


def test_a_damaged_beginning_is_skipped(folder):
    whole = write_video(folder / "intra2.mp4", numbered_frames(30), gop=1)
    info = probe(spoil(whole, folder / "spoilt2.mp4", {0, 1}))
    assert numbers(info, [0.0, 0.05]) == [2, 2]


def test_nothing_to_decode_is_an_error(folder):
    whole = write_video(folder / "whole.mp4", numbered_frames(30))
    info = replace(probe(whole), path=str(spoil(whole, folder / "ruined.mp4", range(30))))
    with pytest.raises(VideoError, match=r"ruined.mp4 can be decoded"):
        list(read_frames(info, [0.5]))


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4"])
def test_a_cut_file_gives_what_it_has(ending, folder):
    how = {"container_options": {"movflags": "faststart"}} if ending == "mp4" else {}
    whole = write_video(folder / f"uncut.{ending}", numbered_frames(256), **how)
    cut = folder / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    got = numbers(probe(cut), np.arange(0.05, 25.6, 0.1))
    left = max(got)
    assert 40 < left < 250
    assert got[: left - 2] == list(range(left - 2))  # the last packet may be torn
    assert got[-1] in (left, left - 1)
    # The whole file's facts, from before it was cut, lead to the same frames.
    assert numbers(replace(probe(whole), path=str(cut)), [1.05, 24.95])[0] == 10

from pathlib import Path

import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames
from tests.decoders import EVERY, needs_decord
from tests.video.files import number_of, numbers, pixels
from tests.video.kinds import KINDS, table, write_kind


def moments_in(info):
    return sorted([-1.0, 0.0, *np.linspace(0, info.duration_s, 23), 99.0])


@needs_decord
@pytest.mark.few(8)
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.decord_refuses])
def test_both_decoders_show_the_same_frames(name, folder):
    info = probe(write_kind(folder, name))
    right, got = (list(read_frames(info, moments_in(info), decoder=d)) for d in ("pyav", "decord"))
    times = [[t for chunk in chunks for t in chunk.times_s] for chunks in (right, got)]
    assert times[1] == pytest.approx(times[0], abs=1e-6)
    assert [number_of(rgb) for rgb in pixels(got)] == [number_of(rgb) for rgb in pixels(right)]
    difference = np.abs(pixels(got).astype(int) - pixels(right))
    # Half-covered pixels of colour at odd edges, and more than 8 bits, are rounded differently.
    assert difference.max() <= 2 or (name == "odd.webm" or ("_10" in name and difference.mean() < 2))


@pytest.mark.few(10)
@pytest.mark.parametrize("decoder", EVERY)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_answered_or_refused(name, decoder, folder, capfd):
    kind, path = KINDS[name], write_kind(folder, name)
    capfd.readouterr()  # what encoders print
    info = probe(path)
    times = [0.0, info.duration_s / 2, info.duration_s]
    reason = kind.decord_refuses if decoder == "decord" else None
    if reason:
        with pytest.raises(VideoError) as caught:
            list(read_frames(info, times, decoder=decoder))
        assert caught.value.exit_code == 3
        assert reason in caught.value.message and info.path in caught.value.message
        assert caught.value.hint == "use decoder pyav"
    else:
        first, middle, last = numbers(info, times, decoder=decoder)
        assert (first, last) == (kind.hidden, kind.frames - 1)
        assert first <= middle <= last
    assert capfd.readouterr() == ("", "")


def test_the_results_hold_this_table():
    page = Path(__file__).parents[2] / "results" / "video.md"
    assert table() in page.read_text(encoding="utf-8")

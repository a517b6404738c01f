import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import choose_decoder, probe, read_chunks
from evoprune.video.readers import decord as backend
from evoprune.video.readers.ffmpeg import Shown
from tests.video.files import number_of, numbered_frames, numbers, pixels, spoil, write_image, write_video
from tests.video.kinds import HEVC, OPEN_GOP

decord = pytest.importorskip("decord")


@pytest.mark.parametrize(
    "problem", [None, "raise OSError('libdecord.so: not found')", "raise RuntimeError('no files')"]
)
def test_without_decord_pyav_is_offered(problem, tmp_path, in_process, monkeypatch):
    monkeypatch.delitem(sys.modules, "decord")
    if problem:
        (tmp_path / "decord.py").write_text(problem)
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "decord", None)  # None makes Python's import of the module fail
    with pytest.raises(UsageError, match="decord cannot be loaded") as caught:
        choose_decoder("decord")
    assert "use decoder pyav" in caught.value.hint
    assert choose_decoder("auto") == choose_decoder("pyav") == "pyav"


def smooth_frames(height, width):
    y, x = np.mgrid[0:height, 0:width]
    for i in range(6):
        rgb = [40 + 150 * x / width + 4 * i, 60 + 120 * y / height, 200 - 100 * (x + y) / (width + height)]
        yield np.stack(rgb, -1).astype(np.uint8)


SMOOTH = {
    "smooth.mp4": {},
    "smooth_444.mp4": {"pix_fmt": "yuv444p"},
    "smooth_full.mp4": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "smooth_hd.mp4": {"options": {"colorspace": "bt709", "color_primaries": "bt709", "color_trc": "bt709"}},
    "smooth_10.mp4": {"pix_fmt": "yuv420p10le"},
    "smooth_hevc_10.mkv": HEVC | {"pix_fmt": "yuv420p10le"},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_colours_agree(name, folder):
    info = probe(write_video(folder / name, smooth_frames(96, 128), **SMOOTH[name]))
    times = [0.05 + 0.1 * i for i in range(6)]
    right, got = (pixels(read_chunks(info, times, decoder=d)).astype(int) for d in ("pyav", "decord"))
    difference = np.abs(got - right)
    assert difference.mean() < 2 if "10" in info.pix_fmt else difference.max() <= 2


@pytest.mark.few(6)
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (20, 16), (182, 322)])
def test_padding_of_turned_frames_is_cut_off(size, rotation, folder):
    info = probe(write_video(folder / "padded.mp4", smooth_frames(*size), rotation=rotation))
    right, got = (pixels(read_chunks(info, [0.0, 0.3], decoder=d)).astype(int) for d in ("pyav", "decord"))
    assert np.abs(got - right).max() <= 2


def test_why_frames_are_read_in_sequence(folder):
    path = write_video(folder / "jumped.mkv", numbered_frames(60), **HEVC)
    wanted = list(range(3, 60, 7))
    jumped = decord.VideoReader(str(path)).get_batch(wanted).asnumpy()
    assert [number_of(rgb) for rgb in jumped] != wanted
    assert numbers(probe(path), [i / 10 for i in wanted], decoder="decord") == wanted


def test_times_of_hours_are_not_off_by_rounding(folder):
    displayed = [0.0, 1234.567, 5000.003, 9999.987, 20000.017]
    info = probe(write_video(folder / "hours.mkv", numbered_frames(5), pts=displayed))
    assert numbers(info, displayed, decoder="decord") == numbers(info, displayed) == [0, 1, 2, 3, 4]
    between = [(a + b) / 2 for a, b in pairwise(displayed)]
    assert numbers(info, between, decoder="decord") == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["intra.mp4", "groups.mp4"])
def test_damage_is_refused_with_a_way_out(name, folder, capfd):
    whole = write_video(folder / f"whole_{name}", numbered_frames(30), gop=1 if name == "intra.mp4" else 10)
    info = probe(spoil(whole, folder / f"damaged_{name}", {4, 11}))
    times = [0.05 + 0.1 * i for i in range(30)]
    assert len(numbers(info, times)) == 30
    with pytest.raises(VideoError, match="stops at damage") as caught:
        numbers(info, times, decoder="decord")
    assert (caught.value.exit_code, caught.value.hint) == (3, "use decoder pyav")
    assert capfd.readouterr() == ("", "")


def test_what_decord_cannot_read_is_refused_before_it_is_opened(folder, tmp_path):
    write_image(tmp_path / "0.png", numbered_frames(1)[0])
    hdr = {"pix_fmt": "yuv420p10le", "options": {"colorspace": "bt2020nc", "color_trc": "smpte2084"}}
    files = {"refused.mkv": {"codec": "libsvtav1"}, "refused_hdr.mp4": hdr}
    for path in (*(write_video(folder / name, numbered_frames(2), **how) for name, how in files.items()), tmp_path):
        for refusing in (choose_decoder, lambda name, info: read_chunks(info, [0.0], decoder=name)):
            with pytest.raises(VideoError) as caught:
                refusing("decord", probe(path))
            assert (caught.value.exit_code, caught.value.hint) == (3, "use decoder pyav")


@pytest.mark.parametrize("matrix", ["bt2020c", "YCgCo", "ICtCp"])
def test_matrices_that_decord_takes_for_others_are_refused(matrix, folder):
    options = {"x264-params": f"colormatrix={matrix}"}
    info = probe(write_video(folder / f"{matrix}.mp4", smooth_frames(48, 64), options=options))
    refusal = "HDR" if info.hdr else "matrix"
    with pytest.raises(VideoError, match=refusal) as caught:
        numbers(info, [0.0], decoder="decord")
    assert caught.value.hint == "use decoder pyav"


def test_other_frames_than_pyavs_are_refused(folder, in_process, monkeypatch):
    info = probe(write_video(folder / "other.mp4", numbered_frames(10)))
    other = SimpleNamespace(read=lambda *_: (Shown(0.0, rgb) for rgb in numbered_frames(10)[9:]))
    monkeypatch.setattr(backend, "pyav", other)
    with pytest.raises(VideoError, match="does not start with the first frame"):
        numbers(info, [0.5], decoder="decord")


def test_pixels_are_arrays_whatever_bridge_the_host_has_set(folder, in_process):
    info = probe(write_video(folder / "bridge.mp4", numbered_frames(10), **OPEN_GOP))
    decord.bridge.set_bridge("torch")
    try:
        assert numbers(info, [0.05, 0.75], decoder="decord") == [0, 7]
    finally:
        decord.bridge.reset_bridge()


def test_a_file_that_vanished_or_changed_is_an_error(folder):
    path = write_video(folder / "vanishing.mp4", numbered_frames(3))
    info = probe(path)
    write_video(path, numbered_frames(3, 96, 128))
    with pytest.raises(VideoError, match="the frame size changes"):
        numbers(info, [0.0], decoder="decord")
    path.unlink()
    with pytest.raises(VideoError, match=r"cannot read .*vanishing.mp4: No such file"):
        numbers(info, [0.0], decoder="decord")

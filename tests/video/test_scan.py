import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, scan
from tests.video.files import numbered_frames, spoil, write_image, write_video
from tests.video.kinds import KINDS, write_kind


@pytest.mark.few(12)
@pytest.mark.parametrize("name", KINDS)
def test_whole_files(name, folder):
    kind, path = KINDS[name], write_kind(folder, name)
    found, info = scan(path), probe(path)
    assert (found.frames, found.damaged) == (kind.frames - kind.hidden, 0)
    assert found.duration_s == pytest.approx(info.duration_s, abs=1e-3)
    # FFmpeg's writer of program streams leaves one step out.
    assert found.variable_rate == (name.startswith("vary") or name == "mpeg2.mpg")
    assert found.stated_s is None or found.stated_s == pytest.approx(found.duration_s, rel=0.25)
    assert found.largest_gap_s <= found.keyframe_max_s <= found.duration_s + 1e-4
    assert found.keyframe_median_s <= found.keyframe_max_s
    assert found.seconds > 0


def test_intervals(tmp_path):
    displayed = [0.0, 0.1, 0.2, 0.9, 1.0, 1.1]
    found = scan(write_video(tmp_path / "gap.mp4", numbered_frames(6), pts=displayed))
    assert found.largest_gap_s == pytest.approx(0.7)
    assert found.variable_rate
    steady = {"options": {"sc_threshold": "0"}}
    found = scan(write_video(tmp_path / "a.mp4", numbered_frames(45), gop=10, **steady))
    assert (found.keyframe_median_s, found.keyframe_max_s, found.largest_gap_s) == (1.0, 1.0, 0.1)
    found = scan(write_video(tmp_path / "b.mp4", numbered_frames(45), gop=1000, **steady))
    assert (found.keyframe_median_s, found.keyframe_max_s) == (4.5, 4.5)


def test_a_single_frame(tmp_path):
    found = scan(write_video(tmp_path / "one.mp4", numbered_frames(1)))
    assert (found.frames, found.largest_gap_s, found.variable_rate) == (1, 0.0, False)
    assert found.duration_s == found.keyframe_max_s == pytest.approx(0.1)


def test_rounded_times_are_not_variable(tmp_path):
    path = write_video(tmp_path / "rounded.mkv", numbered_frames(40), pts=[i / 30 for i in range(40)])
    assert not scan(path).variable_rate


def test_damage_is_counted_and_explains_gaps(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(30), gop=1)
    found = scan(spoil(whole, tmp_path / "spoilt.mp4", {4, 11, 12}))
    assert (found.frames, found.damaged, found.variable_rate) == (27, 3, False)
    assert found.largest_gap_s == pytest.approx(0.3)
    assert found.duration_s == pytest.approx(3.0)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "avi", "webm"])
def test_a_cut_file_is_shorter_than_it_states(ending, tmp_path):
    how = {"mp4": {"container_options": {"movflags": "faststart"}}, "webm": {"codec": "libvpx-vp9"}}
    whole = write_video(tmp_path / f"whole.{ending}", numbered_frames(60), **how.get(ending, {}))
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    found = scan(path)
    assert found.duration_s < found.stated_s - 0.5
    assert found.frames < 60
    assert probe(path).duration_s == pytest.approx(found.duration_s, abs=0.5)


def test_a_folder(tmp_path):
    for i, rgb in enumerate(numbered_frames(8)):
        write_image(tmp_path / f"{i}.png", rgb)
    (tmp_path / "3.png").write_bytes(b"damaged")
    found = scan(tmp_path, folder_fps=4)
    assert (found.frames, found.damaged, found.duration_s, found.variable_rate) == (7, 1, 2.0, False)
    assert (found.largest_gap_s, found.keyframe_median_s, found.keyframe_max_s) == (0.5, 0.25, 0.5)
    with pytest.raises(UsageError):
        scan(tmp_path, folder_fps=0)


def test_what_cannot_be_scanned(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"hello" * 1000)
    for path in (tmp_path / "a.mp4", tmp_path / "missing.mp4", tmp_path):
        with pytest.raises(VideoError):
            scan(path)

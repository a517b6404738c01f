"""Files that were joined byte by byte: the clock of the second one begins anew, and all frames are seen nevertheless."""

import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames, scan
from tests.video.files import numbered_frames, numbers, write_video

MPEG2 = {"codec": "mpeg2video", "fps": 25}
KINDS = {
    "a.ts": ({}, {}),
    "b.ts": (MPEG2, MPEG2),
    "no_reordering.ts": ({"options": {"bf": "0"}},) * 2,
    "hours_later.ts": ({}, {"start": 20_000.0}),  # a recording that began at another time of the day
    "hours_earlier.ts": ({"start": 20_000.0}, {}),
    "a.vob": (MPEG2, MPEG2),
    "a.mpg": (MPEG2, MPEG2),
    "a.mkv": ({}, {}),
    "a.avi": ({"codec": "mpeg4"},) * 2,
    "b.avi": ({}, {}),
    "a.webm": ({"codec": "libvpx"},) * 2,
}


def joined(folder, name, cut):
    """Frames 0 to 239, the first `cut` of them from one file, the others from another one."""
    ending = name.rpartition(".")[2]
    frames, path = numbered_frames(240), folder / f"joined.{ending}"
    parts = zip((frames[:cut], frames[cut:]), KINDS[name], strict=True)
    files = [write_video(folder / f"{i}.{ending}", some, **how) for i, (some, how) in enumerate(parts)]
    path.write_bytes(b"".join(file.read_bytes() for file in files))
    return path


@pytest.mark.few(5)
@pytest.mark.parametrize("cut", [200, 40])
@pytest.mark.parametrize("name", KINDS)
def test_times_go_on(name, cut, tmp_path):
    path = joined(tmp_path, name, cut)
    info, found, step = probe(path), scan(path), 1 / KINDS[name][0].get("fps", 10)
    assert info.clock_restarts == 1 and not info.cut_short
    assert [info.duration_s, found.duration_s] == pytest.approx([240 * step] * 2, abs=2 * step)
    assert (found.frames, found.damaged) == (240, 0) and found.largest_gap_s < 3 * step
    times = [(i + 0.5) * 240 * step / 24 for i in range(24)]
    assert numbers(info, times) == pytest.approx([5 + 10 * i for i in range(24)], abs=2)
    assert sum(chunk.damaged for chunk in read_frames(info, times)) == 0


@pytest.mark.few(1)
def test_several_parts(tmp_path):
    path = tmp_path / "three.ts"
    parts = [write_video(tmp_path / f"{i}.ts", numbered_frames(30)) for i in range(3)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe(path)
    assert (info.clock_restarts, scan(path).damaged) == (2, 0) and info.duration_s == pytest.approx(9.0, abs=0.2)
    assert numbers(info, [0.05, 2.95, 3.05, 5.95, 6.05, 8.95]) == pytest.approx([0, 29] * 3, abs=1)


def test_damage_between_the_joints_still_counts(tmp_path):
    whole = write_video(tmp_path / "whole.ts", numbered_frames(60), gop=1).read_bytes()
    lost = bytearray(whole)
    for share in (0.8, 0.5, 0.3):
        at = int(len(whole) * share) // 188 * 188
        del lost[at : at + 188]
    (tmp_path / "joined.ts").write_bytes(whole + lost)
    found, alone = scan(tmp_path / "joined.ts"), tmp_path / "lost.ts"
    alone.write_bytes(lost)
    assert found.damaged == scan(alone).damaged > 0


@pytest.mark.parametrize("name", ["vary.ts", "late.ts", "mpeg2.mpg", "h264.mkv", "negative.mkv"])
def test_a_file_in_one_piece_has_one_clock(name, folder):
    from tests.video.kinds import write_kind

    assert probe(write_kind(folder, name)).clock_restarts == 0


def test_gaps_of_hours_are_no_restart(tmp_path):
    times = [0.0, 1234.567, 5000.003, 9999.987, 20000.017]
    for name in ("a.mkv", "a.mp4", "a.webm"):
        how = {"codec": "libvpx"} if name == "a.webm" else {}
        info = probe(write_video(tmp_path / name, numbered_frames(5), pts=times, **how))
        assert info.clock_restarts == 0 and info.duration_s == pytest.approx(times[-1] + 0.1, abs=2e-3)


def test_decord_refuses_them(tmp_path):
    pytest.importorskip("decord")
    path = joined(tmp_path, "a.mkv", 40)
    with pytest.raises(VideoError, match="restart"):
        list(read_frames(probe(path), [0.0, 1.0], decoder="decord"))

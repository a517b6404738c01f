"""Wrong timestamps move no other frame, and times continue if a clock restarts, in files and in live sources."""

import functools
import http.server
import threading
from contextlib import closing

import pytest

from evoprune.video import LiveSource, frame_times, probe, scan
from evoprune.video.readers.clock import Clock
from evoprune.video.readers.live import LiveReader
from tests.video.files import number_of, numbered_frames, numbers, write_video

FPS, COUNT = 10, 60
PACKET = 188
TICKS = 90_000  # per second
PID = 0x100  # of the video, in files written by FFmpeg


@pytest.fixture(scope="module", params=["0", "2"], ids=["sorted", "reordered"])
def clip(request, tmp_path_factory):
    """The bytes of an MPEG-TS file of 6 s with a keyframe every second."""
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.ts", numbered_frames(COUNT), options={"bf": request.param}).read_bytes()


def restamped(content, shift_of):
    """Change the timestamps in an MPEG-TS file. `shift_of` returns the seconds to add to those of the given packet."""
    content = bytearray(content)
    number = 0
    for at in range(0, len(content), PACKET):
        begins, pid = content[at + 1] & 0x40, (content[at + 1] & 31) << 8 | content[at + 2]
        if not begins or pid != PID:
            continue
        head = at + 4 + (content[at + 4] + 1 if content[at + 3] & 0x20 else 0)  # after the adaptation field
        for place in (head + 9, head + 14)[: {2: 1, 3: 2}[content[head + 7] >> 6]]:
            shift_stamp(content, place, round(shift_of(number) * TICKS))
        number += 1
    return bytes(content)


def shift_stamp(content, at, ticks):
    """Add to the timestamp of 33 bits at an offset. Its bits are divided by marker bits."""
    a, b, c, d, e = content[at : at + 5]
    stamp = ((a >> 1 & 7) << 30 | b << 22 | c >> 1 << 15 | d << 7 | e >> 1) + ticks
    a = a & 0xF1 | (stamp >> 30 & 7) << 1
    content[at : at + 5] = bytes(
        [a, stamp >> 22 & 255, (stamp >> 15 & 127) << 1 | 1, stamp >> 7 & 255, (stamp & 127) << 1 | 1]
    )


def watched(path):
    with closing(LiveReader(str(path), path.name, 10.0)) as reader:
        return [found["time_s"] for found in iter(lambda: reader.next(-1.0), None)]


def check_times(path, live=True):
    """Check that all frames of the clip are found at their times, in each way in which a file can be read."""
    info = probe(path)
    times = [number / FPS for number in range(COUNT)]
    assert [info.duration_s, scan(path).duration_s] == pytest.approx([COUNT / FPS] * 2, abs=0.01)
    assert numbers(info, [time_s + 0.5 / FPS for time_s in times]) == list(range(COUNT))
    assert numbers(info, [0.05, 3.25, 5.95]) == [0, 32, 59]
    assert frame_times(info).times_s == pytest.approx(times, abs=0.01)
    if live:
        assert watched(path) == pytest.approx(times, abs=0.01)
    return info


WRONG = {
    **{f"{by:+g} s": {25: by} for by in (400, 100, 30, 5, 1, 0.3, -0.3, -1, -2, -30)},
    "a keyframe": {30: 30},
    "second": {1: 30},
    "two in a row": {25: 30, 26: 30},
    "three in a row, a little": {25: 3, 26: 3, 27: 3},
    "ahead, then back": {25: 30, 26: -30},
    "three": {15: 30, 32: 30, 47: 30},
    "in all directions": {15: 30, 32: -30, 47: 5},
}


@pytest.mark.few(8)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_timestamps_move_no_other_frame(name, clip, tmp_path):
    path = tmp_path / "wrong.ts"
    path.write_bytes(restamped(clip, lambda number: WRONG[name].get(number, 0)))
    info = check_times(path, live="a little" not in name)
    assert info.clock_restarts == 0 and info.warnings == []


@pytest.mark.few(4)
@pytest.mark.parametrize("by_s", [30, -30])
@pytest.mark.parametrize("number", [0, COUNT - 1])
def test_the_first_or_last_timestamp_is_wrong(number, by_s, clip, tmp_path):
    path = tmp_path / "wrong.ts"
    path.write_bytes(restamped(clip, lambda packet: by_s * (packet == number)))
    check_times(path)


@pytest.mark.few(4)
@pytest.mark.parametrize("by_s", [50_000, 300, -1, -3, -100])
def test_the_clock_restarts(by_s, clip, tmp_path):
    path = tmp_path / "restarts.ts"
    path.write_bytes(restamped(clip, lambda packet: by_s * (packet >= COUNT // 2)))
    assert check_times(path).clock_restarts == 1


def test_the_clock_overflows(clip, tmp_path):
    path = tmp_path / "overflows.ts"
    path.write_bytes(restamped(clip, lambda packet: 2**33 / TICKS - 4))
    assert check_times(path).clock_restarts == 0


@pytest.mark.few(2)
@pytest.mark.parametrize("by_s", [5, 20])
def test_a_gap_in_a_recording_counts(by_s, clip, tmp_path):
    path = tmp_path / "gap.ts"
    path.write_bytes(restamped(clip, lambda packet: by_s * (packet >= COUNT // 2)))
    info = probe(path)
    assert (info.duration_s, info.clock_restarts) == (pytest.approx(6.0 + by_s, abs=0.01), 0)
    assert watched(path)[-1] == pytest.approx(5.9 + by_s, abs=0.01)


@pytest.mark.few(4)
@pytest.mark.parametrize("by_s", [0.04, -0.04, 0.1, -0.1, -0.15, 0.2, -0.2])
def test_jitter_does_not_change_the_speed_of_the_clock(by_s, clip, tmp_path):
    path = tmp_path / "jitter.ts"
    path.write_bytes(restamped(clip, lambda packet: by_s * (packet % 4 == 3)))
    assert probe(path).duration_s == pytest.approx(6.0, abs=abs(by_s) + 0.01)
    times = watched(path)
    assert times == sorted(times)
    assert times == pytest.approx([number / FPS for number in range(COUNT)], abs=abs(by_s) + 0.01)


def test_jumps_deep_inside_a_long_file_are_found(tmp_path):
    """The bit rate varies, so the timestamps at a few places of the file do not show the jump."""
    short = write_video(tmp_path / "short.ts", numbered_frames(COUNT), gop=1).read_bytes()
    parts = [restamped(short, lambda packet, n=n: 6.0 * n + 200.0 * (n >= 20)) for n in range(40)]
    path = tmp_path / "long.ts"
    path.write_bytes(b"".join(parts))
    info = probe(path)
    assert (info.clock_restarts, info.duration_s) == (1, pytest.approx(240.0, abs=0.1))
    assert numbers(info, [120.05, 239.95]) == [0, 59]


@pytest.fixture
def segments(clip, tmp_path):
    """A function that serves segments in a finished playlist with a discontinuity before each segment, and returns its URL."""
    servers = []

    def served(*shifts):
        lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:6"]
        for number, shift in enumerate(shifts):
            (tmp_path / f"{number}.ts").write_bytes(restamped(clip, lambda packet, shift=shift: shift))
            lines += ["#EXT-X-DISCONTINUITY"] * bool(number) + ["#EXTINF:6.0,", f"{number}.ts"]
        (tmp_path / "list.m3u8").write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/list.m3u8"

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.mark.few(2)
@pytest.mark.parametrize("shifts", [(0, 300), (0, 0), (300, 0), (0, 20, 0), (0, -1)])
def test_a_playlist_with_discontinuities(shifts, segments):
    live = LiveSource(segments(*shifts), reconnects=0)
    found = [(time_s, number_of(frame)) for time_s, frame in live.frames(lambda: 0.0)]
    assert [number for _, number in found] == [*range(COUNT)] * len(shifts)
    assert [time_s for time_s, _ in found] == pytest.approx([n / FPS for n in range(len(found))], abs=0.25)


def test_live_frames_are_only_held_back_at_an_unusual_jump():
    stamps = [0.0, 0.1, 0.2, 0.35, 5.0, 5.1, 5.2, 11.0, 14.0, 14.1]
    taken = []

    def items():
        for stamp in stamps:
            taken.append(stamp)
            yield stamp

    found = Clock(live=True).corrections(items(), lambda stamp: stamp, lambda stamp: 0.1)
    ahead = [(stamp, shift_s, len(taken) - number) for number, (stamp, shift_s) in enumerate(found, 1)]
    assert ahead == [(stamp, 0.0, int(stamp == 5.0)) for stamp in stamps]

"""Reading part of a long video takes about as long as reading a short one, and keeping files open changes no frame."""

import gc
import os
import random
import shutil
import threading
import time
from contextlib import closing
from pathlib import Path

import av
import numpy as np
import pytest

from evoprune.video.frames import probe, read_chunks
from evoprune.video.plan import SamplingPlan
from evoprune.video.readers import opened, pyav
from evoprune.video.readers.opened import OpenTracks
from evoprune.video.readers.track import Track
from tests.video.files import apart, numbered_frames, numbers, pixels, spoil, write_video
from tests.video.test_keyframes import FILES, GOP

FRAMES = 256
# Files without an index, or with frames that an index cannot locate, are decoded from the beginning.
SEQUENTIAL = {
    "reordered.avi": {"codec": "mpeg4", "gop": GOP, "options": {"bf": "2"}},
    "plain.flv": {"gop": GOP},
    "plain.mpg": {"codec": "mpeg2video", "gop": GOP, "fps": 25},
    "plain.wmv": {"codec": "wmv2", "gop": GOP},
}
OTHERS = {"mpeg4.avi": {"codec": "mpeg4", "gop": GOP}, "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"}}
ALL = FILES | SEQUENTIAL | OTHERS


@pytest.fixture
def kept(monkeypatch):
    """Keep videos open between reads in this process, as worker processes do."""
    tracks = OpenTracks()
    monkeypatch.setattr(opened, "_lasting", tracks)
    with closing(tracks):
        yield tracks


def made(folder, name):
    path = folder / f"long_{name}"
    if not path.exists():
        write_video(path, numbered_frames(FRAMES), **ALL[name])
        old = time.time() - 10  # opened files are kept only if they have not just been written
        os.utime(path, (old, old))
        time.sleep(0.05)
    return path


def repeat_packets(source, path, times):
    """Write a video that repeats the packets of another one."""
    with av.open(source) as given, av.open(path, "w") as out:
        stream = given.streams.video[0]
        copied = out.add_stream_from_template(stream)
        packets = [
            (packet.pts, packet.dts, packet.is_keyframe, bytes(packet)) for packet in given.demux() if packet.size
        ]
        length = len(packets) * packets[1][1] - len(packets) * packets[0][1]
        for number in range(times):
            for pts, dts, key, content in packets:
                packet = av.Packet(content)
                packet.stream, packet.time_base, packet.is_keyframe = copied, stream.time_base, key
                packet.pts, packet.dts = pts + number * length, dts + number * length
                out.mux(packet)


def read(info, times_s, seek="exact", part_s=0.0, cores=1):
    damage = set()
    with closing(pyav.read(info, times_s, damage.add, seek, part_s, cores)) as frames:
        return [(shown.time_s, shown.rgb.tobytes(), shown.moved) for shown in frames], len(damage)


def requests(info, seed, cores=(1, 1, 4)):
    """Yield requests for consecutive segments, and then for random ones."""
    order = random.Random(seed)
    spans = [(at, at + info.duration_s / 5) for at in np.arange(0, 0.99, 0.2) * info.duration_s]
    for _ in range(5):
        start_s = order.uniform(0, 0.9 * info.duration_s)
        spans.append((start_s, min(info.duration_s, start_s + order.choice((0.3, 3.0)))))
    for start_s, end_s in spans:
        plan = SamplingPlan.even(start_s, end_s, 4)
        seek = order.choice(("exact", "keyframes"))
        yield plan.times_s, seek, plan.seconds_per_frame, order.choice(cores)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", [*SEQUENTIAL, *OTHERS, *FILES])
def test_a_file_that_stays_open_yields_the_same_frames(name, folder, monkeypatch):
    info = probe(made(folder, name))
    fresh = [read(info, *request) for request in requests(info, name)]
    with closing(OpenTracks()) as tracks:
        monkeypatch.setattr(opened, "_lasting", tracks)
        assert [read(info, *request) for request in requests(info, name)] == fresh


@pytest.mark.parametrize("name", ["plain.mp4", "mpeg4.avi", "reordered.avi"])
def test_damage_is_the_same_in_a_file_that_stays_open(name, folder, tmp_path, monkeypatch):
    path = tmp_path / name
    spoil(made(folder, name), path, set(range(8, FRAMES, 12)))
    time.sleep(0.05)
    info = probe(path)
    fresh = [read(info, *request) for request in requests(info, name, [1])]
    assert any(damaged for _, damaged in fresh)
    with closing(OpenTracks()) as tracks:
        monkeypatch.setattr(opened, "_lasting", tracks)
        assert [read(info, *request) for request in requests(info, name, [1])] == fresh


def test_no_frame_is_skipped_after_damage(folder, tmp_path, monkeypatch):
    """Decoding starts again without skipping frames, even if the first attempt has not been garbage-collected."""
    path = tmp_path / "clip.mp4"
    spoil(made(folder, "open.mp4"), path, set(range(8, FRAMES, 12)))
    info = probe(path)
    times_s = [number / 10 for number in range(0, FRAMES, 3)]
    gc.disable()
    try:
        found = read(info, times_s)
    finally:
        gc.enable()
    monkeypatch.setattr(Track, "can_spare", lambda self: False)
    assert found == read(info, times_s) and found[1]


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """Return videos of 26 s and of 73 minutes with the same packets. The index of the long one has 43,520 entries."""
    folder = tmp_path_factory.mktemp("hour")
    short = write_video(folder / "short.mp4", numbered_frames(FRAMES), gop=GOP)
    apart(repeat_packets, str(short), str(folder / "long.mp4"), 170)
    time.sleep(0.05)
    return probe(short), probe(folder / "long.mp4")


def cpu_s(read_part):
    spent = []
    for number in range(4):
        begin = time.process_time()
        read_part(number)
        spent.append(time.process_time() - begin)
    return min(spent)


def test_a_segment_of_a_long_video_costs_as_much_as_one_of_a_short_video(hour, kept):
    short, long = (cpu_s(lambda n, info=info: read(info, [n + 5.2, n + 5.7], "keyframes", 0.5)) for info in hour)
    assert long < 3 * short  # 30 times if the index is listed
    near, far = (
        cpu_s(lambda n, times=times: read(hour[1], times)) for times in ([4.0, 8.0, 12.0], [40.0, 2000.0, 4000.0])
    )
    assert far < 4 * near


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts the bytes that this process reads")
@pytest.mark.parametrize("kind", ["an index", *SEQUENTIAL])
def test_later_parts_read_only_their_own_bytes(kind, hour, folder, kept):
    info = hour[1] if kind == "an index" else probe(made(folder, kind))
    half_s = info.duration_s / 2

    def bytes_read(*times_s):
        before = int(Path("/proc/self/io").read_text().split()[1])
        assert len(read(info, times_s)[0]) == len(times_s)
        return int(Path("/proc/self/io").read_text().split()[1]) - before

    first = bytes_read(half_s)
    again = bytes_read(half_s + 0.1, half_s + 0.5)
    size = os.path.getsize(info.path)
    assert first > size / 4 and again < max(size / 4, 2**17)


def test_a_replaced_file_is_opened_again(folder, tmp_path):
    """Other files with the same size and modification time, in place and by renaming."""
    path, other = tmp_path / "clip.mp4", tmp_path / "other.mp4"
    shutil.copy(made(folder, "plain.mp4"), path)
    write_video(other, numbered_frames(FRAMES)[::-1], gop=GOP)
    first, second = path.read_bytes(), other.read_bytes()
    size = max(len(first), len(second)) + 64

    def padded(content):  # with a box that players skip
        return content + (size - len(content)).to_bytes(4, "big") + b"free" + bytes(size - len(content) - 8)

    path.write_bytes(padded(first))
    status = os.stat(path)
    time.sleep(0.05)
    info = probe(path)
    for _ in range(2):
        assert numbers(info, [5.0, 20.0]) == [50, 200]
    path.write_bytes(padded(second))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert numbers(info, [5.0, 20.0]) == [205, 55]
    time.sleep(0.05)
    assert numbers(info, [5.0, 20.0]) == [205, 55]
    other.write_bytes(padded(first))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert numbers(info, [5.0, 20.0]) == [50, 200]


def test_only_one_video_stays_open(folder, kept):
    infos = [probe(made(folder, name)) for name in ("plain.mp4", "mpeg4.avi", "plain.ts")]
    open_files = []
    for info in infos:
        read(info, [5.0, 20.0], cores=2)
        names = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        open_files.append({name for name in names if name in {each.path for each in infos}})
    # MPEG-TS has no index that would make later reads faster.
    assert open_files == [{infos[0].path}, {infos[1].path}, set()]


def test_a_video_that_is_closed_while_a_thread_takes_it(folder, kept, monkeypatch):
    read(probe(made(folder, "plain.mp4")), [5.0])
    assert kept.memory_bytes > 0
    closing_thread = threading.Thread(target=kept.close)
    can_use = Track.can_use

    def interrupted(track, threads):
        closing_thread.start()
        closing_thread.join(0.1)
        return can_use(track, threads)

    monkeypatch.setattr(Track, "can_use", interrupted)
    with closing(kept._take(1)) as track:
        closing_thread.join()
        assert track.keyframes(5.0, 6.0) and kept.memory_bytes == 0


def test_keyframes_far_from_the_times_are_not_listed(hour):
    with closing(Track(hour[1])) as track:
        listed = [keyframe.time_s for keyframe in track.keyframes(2000.0, 2003.0)]
    assert 4 <= len(listed) <= 8 and listed == sorted(listed)
    assert sum(time_s <= 2000.001 for time_s in listed) == 3 and listed[-1] > 2003.0


@pytest.mark.full
def test_an_idle_process_closes_its_video(folder):
    info = probe(made(folder, "plain.mp4"))

    def is_open():
        found = False
        for process in Path("/proc").glob("[0-9]*/fd"):
            if process.parent.joinpath("status").read_text().split("PPid:")[1].split()[0] == str(os.getpid()):
                found |= any(os.path.realpath(file) == info.path for file in process.iterdir())
        return found

    assert pixels(list(read_chunks(info, [5.0]))).shape[0] == 1 and is_open()
    time.sleep(12)
    assert not is_open()

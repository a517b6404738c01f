"""Live sources may stall, end, come back, change, send garbage or require a password, but evoprune never hangs."""

import os
import sys
import threading
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

from evoprune.errors import UsageError, VideoError
from evoprune.video.live import LiveSource
from evoprune.video.readers.live import POLL_S, LiveReader
from tests.decoders import needs_avif
from tests.video.files import number_of, numbered_frames, quarters, write_said, write_video
from tests.video.streaming import connection, streams

FPS = 10
SILENT_S = 1.0  # for sources that send nothing more; other sources must not depend on the speed of the machine
GROWN_S = 3.0  # for files that are followed: they end once they have not grown for this long
UNAUTHORISED = b'RTSP/1.0 401 Unauthorized\r\nCSeq: NUMBER\r\nWWW-Authenticate: Basic realm="x"\r\n\r\n'


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("live") / "clip.ts", numbered_frames(30), fps=FPS)


@pytest.fixture(scope="module")
def served(clip):
    with streams(clip) as (url, visits):
        yield url, visits


def read(source, fps=FPS, **how):
    """Read a source. Returns the frames as (time, number), the messages, and the error with which reading ended, or None."""
    found, told, last = [], [], [-1.0]
    how = {"timeout_s": 10.0, "reconnects": 0} | how
    live = LiveSource(str(source), tell=told.append, **how)
    problem = None
    begun = time.monotonic()
    try:
        for time_s, frame in live.frames(lambda: last[0] + 1 / fps):
            found.append((time_s, number_of(frame)))
            last[0] = time_s
    except VideoError as error:
        problem = error
    assert time.monotonic() - begun < 60
    return found, told, problem


def check_whole(found):
    assert [number for _, number in found] == list(range(30))
    assert [time_s for time_s, _ in found] == pytest.approx([n / FPS for n in range(30)], abs=0.01)


@pytest.mark.parametrize("name", ["pq.mp4", "fields.mp4", "wide.mkv", "plain.mp4"])
def test_what_players_show_in_another_way_is_known(tmp_path, name):
    expected = {"hdr": False, "interlaced": False, "pixel_aspect": None} | write_said(tmp_path / name)[0]
    expected.pop("other_tracks", None)
    with closing(LiveReader(str(tmp_path / name), name, 10.0)) as reader:
        assert {field: reader.facts[field] for field in expected} == pytest.approx(expected)


def test_a_file_a_url_and_a_connection_give_the_same_frames(clip, served):
    check_whole(read(clip, pace="file")[0])
    check_whole(read(f"{served[0]}/whole.ts", reconnects=3)[0])  # the source has a known end, so there is no reconnect
    with connection(clip.read_bytes()) as port:
        check_whole(read(f"tcp://127.0.0.1:{port}")[0])


@pytest.mark.full
def test_in_this_process_too(clip, served, monkeypatch):
    monkeypatch.setattr("evoprune.video.sandbox.isolation.POSSIBLE", False)
    check_whole(read(clip, pace="file")[0])
    found, _, problem = read(f"{served[0]}/silent", timeout_s=SILENT_S)
    assert not found and "nothing came from" in problem.message


@pytest.mark.full
def test_a_file_at_its_own_pace(clip):
    begun = time.monotonic()
    assert [number for _, number in read(clip, fps=2, pace="file")[0]] == [0, 5, 10, 15, 20, 25]
    assert 2.5 < time.monotonic() - begun < 30


def test_a_file_that_grows(clip, tmp_path):
    content, path = clip.read_bytes(), tmp_path / "growing.ts"
    third = len(content) // 3 // 188 * 188
    path.write_bytes(content[:third])

    def grow():
        for start in (third, 2 * third):
            time.sleep(0.4)
            with open(path, "ab") as file:
                file.write(content[start : start + third if start == third else None])

    thread = threading.Thread(target=grow)
    thread.start()
    found, _, problem = read(path, timeout_s=5.0)
    thread.join()
    assert problem is None
    check_whole(found)


@pytest.fixture
def piped(monkeypatch):
    """A function that reads standard input while another function, `feed`, writes to it."""

    def reading(feed, **how):
        there, here = os.pipe()
        with os.fdopen(there, "rb") as stdin, os.fdopen(here, "wb", buffering=0) as pipe:
            monkeypatch.setattr(sys, "stdin", stdin)
            thread = threading.Thread(target=feed, args=(pipe,))
            thread.start()
            try:
                return read("-", **how)
            finally:
                thread.join()

    return reading


def test_a_pipe(clip, piped, tmp_path):
    found, _, problem = piped(lambda pipe: (pipe.write(clip.read_bytes()), pipe.close()))
    assert problem is None
    check_whole(found)
    found, _, problem = piped(lambda pipe: pipe.write(clip.read_bytes()), timeout_s=SILENT_S)  # the pipe stays open
    assert "nothing came from standard input for 1 s" in problem.message and found
    content = write_video(tmp_path / "clip.mpg", numbered_frames(30), codec="mpeg1video", fps=25).read_bytes()
    found, _, problem = piped(lambda pipe: pipe.write(content), timeout_s=SILENT_S)  # here FFmpeg keeps reading
    assert "nothing came from standard input for 1 s" in problem.message and found
    found, _, problem = piped(lambda pipe: (pipe.write(b"no video\n" * 9999), pipe.close()))
    assert not found and "does not send readable video" in problem.message


def test_a_track_that_appears_late_in_a_pipe(piped, tmp_path):
    frames = numbered_frames(140)
    silent = write_video(tmp_path / "silent.ts", frames[:120]).read_bytes()
    sounding = write_video(tmp_path / "sounding.ts", frames[120:], start=12.0, audio_s=2.0).read_bytes()
    found, _, problem = piped(lambda pipe: (pipe.write(silent + sounding), pipe.close()))
    read_numbers = [number for _, number in found]
    assert problem is None and read_numbers[:120] == [*range(120)] and read_numbers[-1] == 139


def test_a_source_that_ends_and_comes_back(served):
    url, visits = served
    found, told, problem = read(f"{url}/twice.ts", reconnects=2)
    assert [number for _, number in found] == [*range(30)] * 2 and visits.count("twice") == 4
    times = [time_s for time_s, _ in found]
    # The time without a connection counts, and so does the wait for the first frame of the next one.
    assert times == sorted(times) and times[30] - times[29] > 1.9
    tries = [text.rpartition("; ")[2] for text in told]
    assert tries == [f"reconnecting ({number} of 2)" for number in (1, 1, 2)] and "has ended" in told[0]
    assert problem.exit_code == 3 and "404" in problem.message


def test_a_source_that_stalls(served):
    found, _, problem = read(f"{served[0]}/stall.ts", timeout_s=3.0)
    assert found and "nothing came from" in problem.message and "--timeout" in problem.hint
    # The source has never sent a frame, so there is no reconnect.
    found, _, problem = read(f"{served[0]}/silent.ts", timeout_s=SILENT_S, reconnects=5)
    assert not found and "nothing came from" in problem.message


@pytest.mark.full
def test_garbage(served):
    found, _, problem = read(f"{served[0]}/garbage.ts", timeout_s=SILENT_S)
    assert not found and problem.exit_code == 3
    found, _, problem = read(f"{served[0]}/mixed.ts", pace="file")
    assert problem is None and len(found) >= 10 and found[-1][1] == 29
    with connection(b"nothing that is a video\n" * 9999) as port:
        assert "does not send readable video" in read(f"tcp://127.0.0.1:{port}")[2].message
    with connection(b"") as port:
        assert not read(f"tcp://127.0.0.1:{port}")[0]


def test_a_password_is_asked_for_and_never_printed(served):
    url, _ = served
    assert "requires a valid user name and password" in read(f"{url}/secret.ts")[2].message
    there = url.replace("//", "//me:sesame@")
    live = LiveSource(f"{there}/secret.ts", reconnects=0)
    assert "sesame" not in live.name and number_of(next(live.frames(lambda: 0.0))[1]) == 0
    problem = read(f"{there}/nothing.ts")[2]
    assert "sesame" not in str(problem) and "me:" not in str(problem)
    with connection(UNAUTHORISED, answers=True) as port:
        problem = read(f"rtsp://127.0.0.1:{port}/x")[2]
        assert "requires a valid user name and password" in problem.message


@pytest.mark.parametrize("where", ["file://{}", "{}", "concat:{}", "http+{}"])
def test_a_playlist_reaches_no_file_of_this_machine(served, clip, where):
    found, _, problem = read(f"{served[0]}/playlist.m3u8?{where.format(clip)}")
    assert not found and problem.exit_code == 3


# A playlist that refers to itself, and two playlists that refer to each other.
@pytest.mark.parametrize("name", ["aa", "ab"])
def test_a_playlist_that_names_itself(served, name):
    found, _, problem = read(f"{served[0]}/loop.m3u8?{name}", timeout_s=SILENT_S)  # FFmpeg follows it until then
    assert not found and problem.exit_code == 3


def test_a_file_that_is_a_playlist(served, tmp_path):
    path = tmp_path / "list.m3u8"
    path.write_text(f"#EXTM3U\n#EXTINF:6,\n{served[0]}/whole.ts\n#EXT-X-ENDLIST\n")
    before = served[1].count("whole")
    assert read(path, pace="file")[2].exit_code == 3 and served[1].count("whole") == before
    with connection(path.read_bytes()) as port:
        assert read(f"tcp://127.0.0.1:{port}")[2].exit_code == 3 and served[1].count("whole") == before


def test_frames_of_another_size_and_times_that_jump(tmp_path):
    small, large = (
        write_video(tmp_path / f"{name}.ts", numbered_frames(10, *size), fps=FPS, start=start)
        for name, size, start in (("a", (48, 64), 500.0), ("b", (96, 128), 3.0))
    )
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    sizes, times = [], []
    live = LiveSource(str(both), pace="source", timeout_s=GROWN_S)
    for time_s, frame in live.frames(lambda: times[-1] + 0.05 if times else 0.0):
        sizes.append(frame.shape[:2])
        times.append(time_s)
    assert sizes[0] == (48, 64) and sizes[-1] == (96, 128)
    assert times == sorted(times) and times[-1] < 3.0


@pytest.mark.parametrize("name", ["a.mp4", "a.flv"])
def test_the_end_of_a_joined_file_says_what_is_not_read(name, tmp_path):
    whole = write_video(tmp_path / name, numbered_frames(30))
    path = tmp_path / f"joined{whole.suffix}"
    path.write_bytes(whole.read_bytes() * 2)
    for pace in ("source", "file"):
        found, _, problem = read(path, pace=pace, timeout_s=GROWN_S)
        check_whole(found)
        assert "ffmpeg -f concat" in problem.hint


def test_a_raw_stream_is_watched_at_the_rate_that_it_states(tmp_path):
    path = write_video(tmp_path / "raw.h264", numbered_frames(30), fps=FPS)
    check_whole(read(path, pace="source", timeout_s=GROWN_S)[0])
    with closing(LiveReader(str(path), path.name, 10.0)) as reader:
        assert (reader.facts["fps"], reader.facts["rate_guessed"]) == (FPS, False)


def test_a_frame_an_hour_is_no_other_clock(tmp_path):
    path = write_video(tmp_path / "rare.mkv", numbered_frames(3), pts=[0.0, 3600.0, 7200.0])
    found, _, _ = read(path, pace="source", timeout_s=GROWN_S)
    assert [time_s for time_s, _ in found] == pytest.approx([0.0, 3600.0, 7200.0])


def test_a_download_of_known_length_has_the_times_of_the_file(tmp_path):
    path = write_video(tmp_path / "rare.mkv", numbered_frames(3), pts=[0.0, 3600.0, 7200.0])
    with streams(path) as (url, _):
        assert [time_s for time_s, _ in read(f"{url}/whole.mkv")[0]] == pytest.approx([0.0, 3600.0, 7200.0])


def test_a_jump_of_the_clock_is_said(tmp_path):
    path = tmp_path / "apart.ts"
    parts = [write_video(tmp_path / f"{start}.ts", numbered_frames(10), start=start) for start in (0.0, 900.0)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    live = LiveSource(str(path), pace="source", timeout_s=GROWN_S)
    times = [time_s for time_s, _ in live.frames(lambda: 0.0)]
    assert times[-1] < 3 and live.facts["clock_gap_s"] == pytest.approx(899, abs=1)


def test_closing_ends_whatever_it_waits_for(served):
    url, visits = served
    before = visits.count("silent")
    live = LiveSource(f"{url}/silent.ts", timeout_s=20.0)
    ended = []
    thread = threading.Thread(target=lambda: ended.append(list(live.frames(lambda: 0.0))))
    thread.start()
    until = time.monotonic() + 60
    while visits.count("silent") == before:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.2)  # by now it waits for an answer
    live.close()
    thread.join(10)  # much less than the timeout
    assert ended == [[]]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_only_the_process_that_opens_a_url_gets_the_proxy(served, clip, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for source, wanted in ((f"{served[0]}/live.ts", True), (str(clip), False)):
        live = LiveSource(source, reconnects=0)
        with closing(live.frames(lambda: 0.0)) as frames:
            next(frames)
            with open(f"/proc/{live._request.process.pid}/environ", "rb") as file:
                assert (b"user:secret" in file.read()) == wanted


def test_a_decoder_that_crashes_is_another_end_of_a_connection(served):
    live, times = LiveSource(f"{served[0]}/live.ts", reconnects=1, tell=lambda text: None), []
    for time_s, _ in live.frames(lambda: times[-1] + 0.1 if times else 0.0):
        times.append(time_s)
        if len(times) == 5:
            live._request.kill()
        if len(times) == 20:
            live.close()
    assert len(times) >= 20 and times == sorted(times)


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("source", "how", "code"),
    [
        ("gone.mp4", {}, 3),
        (".", {}, 3),
        ("/dev/video99", {}, 3),
        ("ftp://example.org/x", {}, 2),
        ("file:///etc/passwd", {}, 2),
        ("concat:/etc/passwd", {}, 3),
        ("a\0b", {}, 3),
        ("/dev/null", {}, 3),
        ("http://127.0.0.1:1/x", {"timeout_s": 0.0}, 2),
        ("http://127.0.0.1:1/x", {"timeout_s": 99.0}, 2),
        ("http://127.0.0.1:1/x", {"reconnects": -1}, 2),
        ("http://127.0.0.1:1/x", {"pace": "fast"}, 2),
        ("http://127.0.0.1:1/x", {}, 3),
        ("rtsp://127.0.0.1:1/x", {}, 3),
        ("udp://127.0.0.1:18765", {}, 3),
    ],
)
def test_what_is_no_source(source, how, code):
    with pytest.raises((UsageError, VideoError)) as found:
        list(LiveSource(source, **{"timeout_s": 1.0, "reconnects": 0} | how).frames(lambda: 0.0))
    assert found.value.exit_code == code and found.value.hint


class Clock:
    """A replacement for the `time` module whose clock advances only when something sleeps."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize("name", ["clip.gif", "clip.mjpeg", "clip.mpg", "clip.webm", "clip.h264"])
def test_a_file_that_has_ended_is_waited_for_once(tmp_path, monkeypatch, name):
    """This must hold even if FFmpeg reads a format repeatedly at end of file, or if it buffers the last frames."""
    how = {"gif": {"codec": "gif", "pix_fmt": "rgb8"}, "mjpeg": {"codec": "mjpeg", "pix_fmt": "yuvj420p"}}
    how |= {"mpg": {"codec": "mpeg1video", "fps": 25}, "webm": {"codec": "libvpx"}}
    path = write_video(tmp_path / name, numbered_frames(30), **how.get(name.partition(".")[2], {}))
    monkeypatch.setattr("evoprune.video.readers.live.time", clock := Clock())
    with closing(LiveReader(str(path), name, timeout_s=10.0, follow=True)) as reader:
        times = [found["time_s"] for found in iter(lambda: reader.next(0.0), None)]
    assert len(times) == 30 and clock.now < 10.0 + 3 * POLL_S


@pytest.mark.parametrize(
    "name", ["note.txt", "list.m3u8", "page.pdf", "photo.jpg", pytest.param("photo.avif", marks=needs_avif)]
)
def test_what_never_becomes_a_video_is_told_at_once(tmp_path, monkeypatch, name):
    path = tmp_path / name
    text = {"txt": b"Some text.\n", "m3u8": b"#EXTM3U\n#EXTINF:6,\nx.ts\n", "pdf": b"%PDF-1.7\n\0"}
    if name.startswith("photo"):
        Image.fromarray(quarters()).save(path)
    else:
        path.write_bytes(text[path.suffix[1:]])
    monkeypatch.setattr("evoprune.video.readers.live.time", clock := Clock())
    with pytest.raises(VideoError) as found:
        LiveReader(str(path), name, timeout_s=10.0, follow=True)
    assert clock.now == 0.0 and "is a" in found.value.message and str(path) in found.value.message
    assert ("evoprune ask" in found.value.hint) == name.startswith("photo")


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "complete"), (b"\0\0\0\x18ftypisom\0\0\0\0", "complete"), (b"\7" * 99, "MP4")]
)
def test_what_is_no_video_yet_is_waited_for(tmp_path, monkeypatch, content, says):
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    monkeypatch.setattr("evoprune.video.readers.live.time", clock := Clock())
    with pytest.raises(VideoError, match="clip") as found:
        LiveReader(str(path), str(path), timeout_s=1.0, follow=True)
    assert 1.0 <= clock.now < 1.2 and says in found.value.hint


@pytest.fixture(scope="module")
def index_at_the_end(tmp_path_factory):
    """An MP4 that has its index at the end and is larger than FFmpeg's buffer."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), dtype=np.uint8)
    return write_video(tmp_path_factory.mktemp("noise") / "clip.mp4", noise)


def test_an_index_at_the_end(index_at_the_end, piped):
    content, ways = index_at_the_end.read_bytes(), []

    def feed(pipe):
        with suppress(BrokenPipeError):
            pipe.write(content)
        pipe.close()

    with streams(index_at_the_end) as (url, _), connection(content) as port:
        ways += [read(f"{url}/whole.mp4"), read(f"{url}/live.mp4"), read(f"tcp://127.0.0.1:{port}")]
    ways.append(piped(feed))
    for found, _, problem in ways:
        assert not found and "index" in problem.message and "+faststart" in problem.hint

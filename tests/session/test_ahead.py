"""Reading ahead of a model: the same answers and errors, in bounded memory, and nothing is left of it, whatever comes."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evoprune.batch.output import Settings
from evoprune.batch.rows import group_by_span, product_rows
from evoprune.batch.run import answers
from evoprune.errors import ModelError, UsageError, VideoError
from evoprune.session import ahead as module
from evoprune.session.ahead import Ahead, read_ahead, regrouped
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.session.planning import plan_input
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.sandbox import isolation
from evoprune.video_qa import VideoQA
from tests.video.files import number_of, numbered_frames, write_video

ROOT = Path(__file__).parents[2]
SQUARE, THREE = "samples/square.mp4", "samples/three.mp4"
DEMO = describe(ModelOptions("demo"))


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """200 numbered frames of 64x48, ten a second."""
    return str(write_video(tmp_path_factory.mktemp("long") / "long.mp4", numbered_frames(200), fps=10))


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(threading.enumerate())
    yield
    if set(threading.enumerate()) - before:
        gc.collect()  # an exception holds what it went through; where nothing is left this would only take time
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
    assert len(isolation._idle) <= isolation.MAX_IDLE


@pytest.fixture(autouse=True)
def nothing_is_kept(demo, monkeypatch):
    """Of patches, for other settings: each encoding asks for frames."""
    monkeypatch.setattr(demo.patches, "limit_bytes", 0)


@pytest.fixture
def read_anew(monkeypatch):
    """The paths that a session reads by itself, one a reading; and what was read ahead."""
    noted, real = [], module.read_frames

    def read(info, *args, **how):
        noted.append((info.path, threading.current_thread().name == "evoprune-ahead"))
        return real(info, *args, **how)

    monkeypatch.setattr(module, "read_frames", read)
    return lambda: [path for path, early in noted if not early]


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def begun(*paths, sampling=None, pruning=None, **how) -> Ahead:
    ahead = Ahead(**how)
    ahead.begin([(paths, sampling or SamplingOptions())], DEMO, pruning)
    return ahead


def waiting(ahead: Ahead) -> int:
    """Frames that wait."""
    return sum(len(piece.pixels) for reading in ahead._readings for piece in reading.pieces)


def all_read(ahead: Ahead) -> bool:
    return all(reading.ended for reading in ahead._readings)


def facts(encoded, answer) -> dict:
    """What a report says, but for times and memory."""
    text = answer.text
    record = json.loads(answer.report.to_json())
    for timed in (record, *record["inputs"]):
        timed.pop("time_ms")
    for name in ("id", "created_utc", "memory", "rate"):
        del record[name]
    kept = [encoding.encoded.kept.tolist() for encoding in encoded._encodings]
    return record | {"text": text, "units": kept}


# What is read is what a session would read.


def both(demo, paths, sampling, **pruning):
    """Encoded inputs and what their answers say: without, and with all frames read ahead."""
    qa, made = VideoQA(demo, **pruning), []
    for ahead in (None, begun(*paths, sampling=sampling, pruning=PruneOptions(**pruning))):
        if ahead:
            wait_for(lambda ahead=ahead: all_read(ahead) or ahead._held)
        with closing(open_inputs(qa.session, paths, sampling, ahead=ahead)) as opened:
            encoded = opened.encode()
        if ahead:
            ahead.close()
        made.append(facts(encoded, encoded.ask("What colour is the square?", max_new_tokens=4)))
    return made


def of_frames(tmp_path) -> str:
    for number in range(9):
        Image.new("RGB", (96, 64), (20 * number, 99, 30)).save(tmp_path / f"{number}.png")
    return str(tmp_path)


def picture(tmp_path) -> str:
    Image.new("RGB", (300, 200), (200, 30, 30)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def subtitled(tmp_path) -> str:
    shutil.copy(SQUARE, tmp_path / "clip.mp4")
    (tmp_path / "clip.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nIt is blue\n")
    return str(tmp_path / "clip.mp4")


def joined(tmp_path) -> str:
    parts = [write_video(tmp_path / f"{n}.mkv", numbered_frames(20), fps=10).read_bytes() for n in range(2)]
    (tmp_path / "joined.mkv").write_bytes(b"".join(parts))
    return str(tmp_path / "joined.mkv")


def keyframes(tmp_path) -> str:
    return str(write_video(tmp_path / "keys.mp4", numbered_frames(200), fps=10, options={"g": "7"}))


CASES = {
    "video": (lambda tmp_path: [SQUARE], {}, {}),
    "part": (lambda tmp_path: [SQUARE], {"start_s": 1.0, "end_s": -1.5}, {}),
    "frames": (lambda tmp_path: [THREE], {"frames": 7}, {"budget": 1.0}),
    "rate": (lambda tmp_path: [THREE], {"fps": 3.0}, {"budget": "fast"}),
    "few tokens": (lambda tmp_path: [SQUARE], {"max_visual_tokens": 20}, {}),
    "keyframes": (lambda tmp_path: [keyframes(tmp_path)], {"seek": "keyframes", "frames": 6}, {}),
    "picture": (lambda tmp_path: [picture(tmp_path)], {}, {}),
    "folder": (lambda tmp_path: [of_frames(tmp_path)], {"frame_rate": 4.0}, {}),
    "several": (lambda tmp_path: [SQUARE, picture(tmp_path), THREE], {"start_s": 0.5}, {}),
    "the same twice": (lambda tmp_path: [SQUARE, SQUARE], {}, {}),
    "subtitles": (lambda tmp_path: [subtitled(tmp_path)], {"subtitles": "auto"}, {}),
    "joined": (lambda tmp_path: [joined(tmp_path)], {}, {}),
    "downscale": (lambda tmp_path: [SQUARE], {}, {"method": "downscale"}),
    "reads the question": (lambda tmp_path: [SQUARE], {}, {"method": "cdpruner"}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_and_nothing_is_read_twice(demo, tmp_path, read_anew, case):
    made, options, pruning = CASES[case]
    without, with_it = both(demo, made(tmp_path), SamplingOptions(**options), **pruning)
    assert without == with_it
    assert read_anew() == []


@pytest.mark.parametrize("method", ["subsample", "downscale"])
def test_a_method_that_makes_an_input_smaller_reads_what_it_wants(demo, tmp_path, read_anew, method):
    """A picture becomes another size, and of a video fewer frames are read."""
    path = SQUARE if method == "subsample" else picture(tmp_path)
    without, with_it = both(demo, [path], SamplingOptions(), method=method, budget=0.25)
    assert without == with_it and read_anew() == []


@pytest.mark.few(4)
@pytest.mark.parametrize("chunk_bytes", [1, 5 * 64 * 48 * 3, 64 * 2**20])
@pytest.mark.parametrize("piece_bytes", [1, 6 * 64 * 48 * 3, 64 * 2**20])
def test_chunks_are_those_of_reading(long, monkeypatch, chunk_bytes, piece_bytes):
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    with begun(long) as ahead:
        wait_for(lambda: all_read(ahead))
        reading = ahead._readings[0]
        info, times, how = reading.request
        assert waiting(ahead) == len(times) and ahead._held == len(times) * 64 * 48 * 3
        got = list(ahead.read_frames(info, times, chunk_bytes=chunk_bytes, **how))
        assert ahead._held == 0
    right = list(read_frames(info, times, chunk_bytes=chunk_bytes, **how))
    for one, other in zip(right, got, strict=True):
        assert one.first == other.first and one.times_s == other.times_s
        assert (one.pixels == other.pixels).all() and other.pixels.flags.c_contiguous


def test_pieces_of_any_size_become_chunks_of_any_size():
    rng = np.random.default_rng(0)
    for _ in range(200):
        cuts = [0, *sorted(set(rng.integers(1, 29, rng.integers(0, 6)).tolist())), 29]
        frames = np.arange(29, dtype=np.uint8).reshape(-1, 1, 1, 1).repeat(3, 3)
        pieces = [
            FrameChunk(a, frames[a:b], tuple(range(a, b)), damaged=n, other_shape=n == 1, hidden_s=0.5)
            for n, (a, b) in enumerate(pairwise(cuts))
        ]
        size = int(rng.integers(1, 31))
        chunks = list(regrouped(pieces, size))
        assert [len(chunk.pixels) for chunk in chunks[:-1]] == [size] * (len(chunks) - 1)
        assert [chunk.first for chunk in chunks] == list(range(0, 29, size))
        assert np.concatenate([chunk.pixels for chunk in chunks])[:, 0, 0, 0].tolist() == list(range(29))
        assert [time for chunk in chunks for time in chunk.times_s] == list(range(29))
        assert sum(chunk.damaged for chunk in chunks) == sum(piece.damaged for piece in pieces)
        assert any(chunk.other_shape for chunk in chunks) == (len(pieces) > 1)
        assert sum(chunk.hidden_s for chunk in chunks) == 0.5 * len(pieces)


# What has changed is read anew.


def frame_numbers(ahead, path) -> list[int]:
    info = ahead.probe(path, folder_fps=2.0)
    plan = plan_input(DEMO, info, SamplingOptions())
    chunks = ahead.read_frames(info, plan.sampling.times_s, chunk_bytes=2**20, **plan.read_arguments)
    return [number_of(rgb) for chunk in chunks for rgb in chunk.pixels]


def test_a_file_that_is_replaced_is_read_anew(tmp_path, read_anew):
    path = str(tmp_path / "a.mp4")
    write_video(path, numbered_frames(40), fps=10)
    other = write_video(tmp_path / "b.mp4", numbered_frames(80)[40:], fps=10)
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        status = os.stat(path)
        with open(path, "r+b") as file:  # in place, with the same time of change
            file.write(other.read_bytes())
            file.truncate()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert min(frame_numbers(ahead, path)) >= 40 and read_anew() == [path]
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        info = ahead.probe(path, folder_fps=2.0)
        os.replace(shutil.copy(path, tmp_path / "c.mp4"), path)  # between probing and reading
        _, times, how = ahead._readings[0].request
        assert list(ahead.read_frames(info, times, chunk_bytes=1, **how)) and read_anew() == [path] * 2
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        os.remove(path)
        with pytest.raises(VideoError, match="no such file"):
            frame_numbers(ahead, path)


def test_an_image_that_is_added_to_a_folder_is_read(demo, tmp_path, read_anew):
    path = of_frames(tmp_path)
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        (tmp_path / "notes.txt").write_text("no image")
        assert ahead.probe(path, folder_fps=2.0).frames_total == 9
        Image.new("RGB", (96, 64)).save(tmp_path / "9.png")
        assert ahead.probe(path, folder_fps=2.0).frames_total == 10


@pytest.mark.parametrize("change", [{"frames": 4}, {"start_s": 1.0}, {"fps": 1.0}, {"seek": "keyframes"}])
def test_other_options_read_anew(demo, read_anew, change):
    qa = VideoQA(demo)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        with closing(open_inputs(qa.session, [SQUARE], SamplingOptions(**change), ahead=ahead)) as opened:
            opened.encode()
        assert read_anew() == [SQUARE] and ahead._held == 0


def test_frames_are_given_once_in_the_order_of_the_inputs(long, read_anew):
    with begun(SQUARE, long, THREE) as ahead:
        wait_for(lambda: all_read(ahead))
        assert frame_numbers(ahead, long) and read_anew() == []
        assert not ahead._readings[0].pieces and ahead._readings[2].pieces  # those before it are not going to come
        assert frame_numbers(ahead, long) and read_anew() == [long]
        assert frame_numbers(ahead, SQUARE) and read_anew() == [long, SQUARE]
        assert frame_numbers(ahead, THREE) and read_anew() == [long, SQUARE]
    assert frame_numbers(ahead, THREE) and read_anew()[2:] == [THREE]  # it is closed


# Bounds.


@pytest.mark.few(1)
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1]])
def test_frames_that_wait_are_bounded_and_whoever_asks_gets_them_in_any_order(long, monkeypatch, order):
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    pair = 2 * 64 * 48 * 3
    paths = [long, SQUARE]
    with begun(*paths, held_bytes=5 * pair) as ahead:
        wait_for(lambda: ahead._held == 4 * pair)  # and one that the reader makes
        time.sleep(0.1)
        assert ahead._held == 4 * pair and not ahead._readings[1].request
        for number in order:
            assert len(frame_numbers(ahead, paths[number])) > 10


def test_where_there_is_no_room_at_all_frames_come_one_by_one(long):
    with begun(long, held_bytes=0) as ahead:
        time.sleep(0.2)
        assert waiting(ahead) == 0
        assert len(frame_numbers(ahead, long)) == 24


def test_little_memory_leaves_little_to_frames(monkeypatch):
    monkeypatch.setattr(module, "available_memory", lambda: 2**30)
    assert Ahead()._limit == 2**26
    monkeypatch.setattr(module, "available_memory", lambda: None)
    assert Ahead()._limit == module.HELD_BYTES


def test_while_one_is_read_for_somebody_the_next_is_not_waited_for(long, monkeypatch, read_anew):
    """The thread reads one at a time, and may never come to the next if nobody goes on with the first."""
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    with begun(long, SQUARE, held_bytes=0) as ahead:
        info = ahead.probe(long, folder_fps=2.0)
        plan = plan_input(DEMO, info, SamplingOptions())
        chunks = ahead.read_frames(info, plan.sampling.times_s, chunk_bytes=1, **plan.read_arguments)
        next(chunks)
        assert frame_numbers(ahead, SQUARE) and read_anew() == [SQUARE]
        chunks.close()


# Ends.


def test_an_error_of_a_video_comes_where_it_came_and_is_the_same(demo, tmp_path):
    bad, broken = str(tmp_path / "gone.mp4"), str(tmp_path / "broken.mp4")
    Path(broken).write_bytes(Path(SQUARE).read_bytes()[:2000])
    session = VideoQA(demo).session
    for paths in ([bad], [broken], [SQUARE, bad]):
        said = []
        for ahead in (None, begun(*paths)):
            with pytest.raises(VideoError) as caught:
                open_inputs(session, paths, ahead=ahead)
            said.append((caught.value.message, caught.value.hint, caught.value.stage))
            if ahead:
                ahead.close()
        assert said[0] == said[1]


@pytest.mark.parametrize(
    "problem", [VideoError("it breaks off", "get it again", stage="read"), ZeroDivisionError("1/0")]
)
def test_what_breaks_off_ahead_ends_the_session_if_it_is_about_the_video(demo, monkeypatch, problem, read_anew):
    """After the frames before it. Whatever else goes wrong is left to reading anew."""
    real, early = module.read_frames, lambda: threading.current_thread().name == "evoprune-ahead"

    def breaks(*args, **how):
        for number, chunk in enumerate(real(*args, **how)):
            if number == 2 and early():
                raise problem.with_traceback(None)
            yield chunk

    monkeypatch.setattr(module, "read_frames", breaks)
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    qa, done = VideoQA(demo), []
    monkeypatch.setattr("evoprune.session.memory.largest_piece", lambda device: 1)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        opened = open_inputs(qa.session, [SQUARE], ahead=ahead)
        if isinstance(problem, VideoError):
            with pytest.raises(VideoError) as caught, closing(opened):
                opened.encode(lambda *now: done.append(now))
            assert caught.value is problem
        else:
            opened.encode()
            assert read_anew()[0] == SQUARE


def test_whoever_closes_it_waits_for_nothing(long, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 1)
    for at_once in (True, False):
        ahead = begun(long, SQUARE, held_bytes=10**5)
        wait_for(lambda ahead=ahead, at_once=at_once: at_once or ahead._held)
        start = time.monotonic()
        ahead.close()
        ahead.close()
        assert time.monotonic() - start < 2 and ahead._held == 0 and not ahead._thread.is_alive()


def test_a_reader_that_hangs_is_left_to_itself(long, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    released, hanging = threading.Event(), threading.Event()

    def hangs(*args, **how):
        hanging.set()
        released.wait(30)
        yield from ()

    monkeypatch.setattr(module, "read_frames", hangs)
    ahead = begun(long)
    assert hanging.wait(20)
    start = time.monotonic()
    ahead.close()
    assert time.monotonic() - start < 2 and ahead._thread.is_alive() and ahead._thread.daemon
    released.set()
    ahead._thread.join(20)


def test_nobody_waits_long_for_one_that_hangs_and_is_not_wanted(long, monkeypatch, read_anew):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    released, hanging, real = threading.Event(), threading.Event(), module.read_frames

    def hangs(info, *args, **how):
        if threading.current_thread().name == "evoprune-ahead":
            hanging.set()
            assert released.wait(30)
        yield from real(info, *args, **how)

    monkeypatch.setattr(module, "read_frames", hangs)
    with begun(SQUARE, long) as ahead:
        assert hanging.wait(20)
        assert frame_numbers(ahead, long) and read_anew() == [long]
        released.set()
        ahead._thread.join(20)


def test_whoever_reads_when_it_is_closed_is_told(long):
    with begun(long, held_bytes=0) as ahead:
        info = ahead.probe(long, folder_fps=2.0)
        plan = plan_input(DEMO, info, SamplingOptions())
        chunks = ahead.read_frames(info, plan.sampling.times_s, chunk_bytes=1, **plan.read_arguments)
        next(chunks)
    with pytest.raises(RuntimeError, match="closed"):
        list(chunks)


def test_where_no_thread_can_be_started_nothing_is_read_ahead(long, monkeypatch, read_anew):
    def refuses(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with begun(long) as ahead:
        assert frame_numbers(ahead, long) and read_anew() == [long]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_copy_reads_by_itself(long):
    with begun(long) as ahead:
        wait_for(lambda: all_read(ahead))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if len(frame_numbers(ahead, long)) == 24 else 2
                ahead.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert waiting(ahead) == 24


# Where it is used.


def test_times_of_reading_are_those_of_the_reader_and_the_clock_is_that_on_the_wall(demo, monkeypatch):
    real = module.read_frames

    def slow(*args, **how):
        for chunk in real(*args, **how):
            time.sleep(1.0)
            yield chunk

    monkeypatch.setattr(module, "read_frames", slow)

    def answered(encoded):
        answer = encoded.ask("What colour is the square?", max_new_tokens=1)
        assert answer.text
        return answer.report.time_ms

    qa = VideoQA(demo)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        with closing(open_inputs(qa.session, [SQUARE], ahead=ahead)) as opened:
            times = answered(opened.encode())
    assert times.read >= 1000 > times.ttft_wall
    with begun(SQUARE) as ahead, closing(open_inputs(qa.session, [SQUARE], ahead=ahead)) as opened:
        times = answered(opened.encode())
    assert 1000 <= times.read < 2000 and times.ttft_wall >= 700  # what is waited for counts once


def test_python(read_anew, tmp_path):
    qa = VideoQA.load("demo", device="cpu", ahead=SQUARE)
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew() == []
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew() == []  # its patches are there
    qa.loaded.patches.clear()
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew() == [SQUARE]
    qa = VideoQA.load("demo", device="cpu", ahead=[Path(SQUARE), THREE])
    assert qa.encode([SQUARE, Path(THREE)]).ask("What colour is the square?").text and read_anew() == [SQUARE]
    with read_ahead(THREE, frames=6, device="cpu") as ahead:
        qa = VideoQA.load("demo", device="cpu", ahead=ahead)
        assert qa.encode(THREE, frames=6).plan.sampling.frames == 6 and read_anew() == [SQUARE]
    with pytest.raises(UsageError, match="not a path"):
        VideoQA.load("demo", ahead=3)
    for wrong in (3, [3], [None]):
        with pytest.raises(UsageError, match="not a path"):
            read_ahead(wrong)
    with pytest.raises(TypeError):
        read_ahead(SQUARE, colour="blue")
    with pytest.raises(ModelError):
        read_ahead(SQUARE, str(tmp_path / "none"))
    with pytest.raises(ModelError):
        VideoQA.load(str(tmp_path / "none"), ahead=SQUARE)
    with pytest.raises(UsageError):
        VideoQA.load("demo", method="evoprune:alpha=-3", ahead=SQUARE)
    qa = VideoQA.load("demo", device="cpu", ahead=str(tmp_path / "gone.mp4"))
    with pytest.raises(VideoError, match="no such file"):
        qa.encode(tmp_path / "gone.mp4")


def test_what_nobody_asks_for_goes_with_the_model(long):
    qa = VideoQA.load("demo", device="cpu", ahead=long)
    ahead = qa._ahead
    wait_for(lambda: ahead._held)
    del qa
    gc.collect()
    assert ahead._held == 0 and not ahead._thread.is_alive()


def test_a_batch_takes_its_first_videos(demo, read_anew):
    rows = product_rows([SQUARE, THREE, "samples/vanish.webm"], ["What happens?"])
    settings = Settings.of(max_new_tokens=2)
    spans, without = group_by_span(rows), None
    for first in (0, 2, 3):
        with Ahead() as ahead:
            asked = ((span.rows[0].paths, settings.sampling.but(**span.sampling)) for span in spans[:first])
            ahead.begin(asked, DEMO)
            wait_for(lambda ahead=ahead: all_read(ahead))
            said = [report.answer for report in answers(VideoQA(demo), spans, settings, ahead=ahead)]
        without = without or said
        assert said == without and None not in said
    assert read_anew() == [*(row.video for row in rows), rows[2].video]


def test_patches_of_its_frames_serve_other_settings_and_count_once(read_anew, demo, monkeypatch):
    monkeypatch.setattr(demo.patches, "limit_bytes", 2**29)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        times = []
        for budget in (0.5, 0.25):
            with closing(open_inputs(VideoQA(demo, budget=budget).session, [SQUARE], ahead=ahead)) as opened:
                times.append(opened.encode().report.time_ms)
        assert times[0].preprocess > 0 == times[1].preprocess and times[0].read > times[1].read
        assert read_anew() == []


BEFORE_TORCH = """
import sys, time
import evoprune
with evoprune.read_ahead("samples/square.mp4", "demo") as ahead:
    until = time.monotonic() + 30
    while not ahead._held:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    qa = evoprune.VideoQA.load("demo", ahead=ahead)
    print(qa.ask("samples/square.mp4", "What colour is the square?").text)
"""


def test_frames_are_there_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", BEFORE_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr

"""Reading ahead of the model changes neither answers nor errors, takes bounded memory, and never leaves a thread behind."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from evoprune.batch import RowReader, Settings, Span, answers
from evoprune.errors import ModelError, UsageError, VideoError
from evoprune.session import ahead as module
from evoprune.session import encoding, reading
from evoprune.session.ahead import ReadAhead, read_ahead
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.reading import probed
from evoprune.video import SamplingOptions, probe, read_chunks
from evoprune.video.sandbox import isolation
from evoprune.video_qa import VideoQA
from tests.video.files import number_of, numbered_frames, write_video
from tests.video.idle import idle_processes

ROOT = Path(__file__).parents[2]
SQUARE, THREE = "samples/square.mp4", "samples/three.mp4"
DEMO = describe(ModelOptions("demo"))


@pytest.fixture(scope="module")
def demo():
    return load_model("demo", device="cpu")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Return the path of a video with 200 numbered frames of 64x48 pixels, ten per second."""
    return str(write_video(tmp_path_factory.mktemp("long") / "long.mp4", numbered_frames(200), fps=10))


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = set(threading.enumerate())
    yield
    if set(threading.enumerate()) - before:
        gc.collect()  # an exception keeps its frames alive; collecting only if needed saves time
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()
    assert idle_processes() <= isolation.MAX_IDLE


@pytest.fixture(autouse=True)
def nothing_is_kept(demo, monkeypatch):
    """Disable the patch store, so that each encoding requests frames."""
    monkeypatch.setattr(demo.patches, "limit_bytes", 0)


@pytest.fixture
def read_anew(monkeypatch):
    """Return a list that grows with the path of each input that a session reads itself."""
    noted, real = [], read_chunks

    def read(info, *args, **how):
        noted.append(info.path)
        return real(info, *args, **how)

    monkeypatch.setattr(encoding, "read_chunks", read)
    return noted


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def begun(*paths, sampling=None, pruning=None, **how) -> ReadAhead:
    return ReadAhead(DEMO, [(paths, sampling or SamplingOptions())], pruning, **how)


def all_read(ahead: ReadAhead) -> bool:
    return not ahead.unfinished


def facts(encoded, answer) -> dict:
    text = answer.text
    record = json.loads(answer.report.to_json())
    for timed in (record, *record["inputs"]):
        timed.pop("time_ms")
    for name in ("id", "created_utc", "memory", "rate"):
        del record[name]
    kept = [encoding.encoded.kept.tolist() for encoding in encoded._encodings]
    return record | {"text": text, "units": kept}


# Frames that are read ahead equal those that a session would read.


def both(demo, paths, sampling, **pruning):
    """Encode and ask first without and then with reading ahead, and return both results of `facts`."""
    qa, made = VideoQA(demo, **pruning), []
    for ahead in (None, begun(*paths, sampling=sampling, pruning=PruneOptions(**pruning))):
        if ahead:
            wait_for(lambda ahead=ahead: all_read(ahead) or ahead.held_bytes)
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
    "downscale": (lambda tmp_path: [SQUARE], {}, {"method": "downscale"}),
    "reads the question": (lambda tmp_path: [SQUARE], {}, {"method": "cdpruner"}),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("case", CASES)
def test_answers_are_the_same_and_nothing_is_read_twice(demo, tmp_path, read_anew, case):
    made, options, pruning = CASES[case]
    paths = made(tmp_path)
    without, with_it = both(demo, paths, SamplingOptions(**options), **pruning)
    assert without == with_it
    assert read_anew == paths  # by the session without reading ahead


@pytest.mark.parametrize("method", ["subsample", "downscale"])
def test_a_method_that_makes_an_input_smaller_reads_what_it_wants(demo, tmp_path, read_anew, method):
    """These methods resize images and read fewer frames of a video."""
    path = SQUARE if method == "subsample" else picture(tmp_path)
    without, with_it = both(demo, [path], SamplingOptions(), method=method, budget=0.25)
    assert without == with_it and read_anew == [path]  # by the session without reading ahead


@pytest.mark.parametrize("size", [1, 2**20, 2**26])
def test_chunks_are_those_of_reading(long, monkeypatch, size):
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", size)
    with begun(long) as ahead:
        wait_for(lambda: all_read(ahead))
        plan = DEMO.plan(probe(long), SamplingOptions())
        times = plan.sampling.times_s
        assert ahead.held_bytes == len(times) * 64 * 48 * 3
        got = list(ahead.take(plan).chunks())
        assert ahead.held_bytes == 0
    right = list(read_chunks(plan.source, times, chunk_bytes=plan.chunk_bytes, **plan.read_arguments))
    for one, other in zip(right, got, strict=True):
        assert one.first == other.first and one.times_s == other.times_s
        assert (one.pixels == other.pixels).all() and other.pixels.flags.c_contiguous


# Files that changed are read again.


def planned(path):
    return DEMO.plan(probed(path, folder_fps=2.0), SamplingOptions())


def frame_numbers(ahead, path) -> list[int] | None:
    """Return the numbers of the frames that were read ahead, or None if the session has to read the file again."""
    early = ahead.take(planned(path))
    if early is None:
        return None
    with closing(early):
        return [number_of(rgb) for chunk in early.chunks() for rgb in chunk.pixels]


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    path = str(tmp_path / "a.mp4")
    write_video(path, numbered_frames(40), fps=10)
    other = write_video(tmp_path / "b.mp4", numbered_frames(80)[40:], fps=10)
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        status = os.stat(path)
        with open(path, "r+b") as file:  # in place, with the same modification time
            file.write(other.read_bytes())
            file.truncate()
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert frame_numbers(ahead, path) is None and ahead.held_bytes == 0
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        plan = planned(path)
        os.replace(shutil.copy(path, tmp_path / "c.mp4"), path)  # between probing and reading
        assert ahead.take(plan) is None
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        os.remove(path)
        with pytest.raises(VideoError, match="no such file"):
            frame_numbers(ahead, path)


def test_an_image_that_is_added_to_a_folder_is_read(tmp_path):
    path = of_frames(tmp_path)
    with begun(path) as ahead:
        wait_for(lambda: all_read(ahead))
        (tmp_path / "notes.txt").write_text("no image")
        assert planned(path).info.frames_total == 9
        Image.new("RGB", (96, 64)).save(tmp_path / "9.png")
        assert planned(path).info.frames_total == 10
        assert ahead.take(planned(path)) is None


@pytest.mark.parametrize("change", [{"frames": 4}, {"start_s": 1.0}, {"fps": 1.0}, {"seek": "keyframes"}])
def test_other_options_read_anew(demo, read_anew, change):
    qa = VideoQA(demo)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        with closing(open_inputs(qa.session, [SQUARE], SamplingOptions(**change), ahead=ahead)) as opened:
            opened.encode()
        assert read_anew == [SQUARE] and ahead.held_bytes == 0


def test_frames_are_given_once_in_the_order_of_the_inputs(long):
    with begun(SQUARE, long, THREE) as ahead:
        wait_for(lambda: all_read(ahead))
        assert frame_numbers(ahead, long)
        # Taken already; never requested.
        assert frame_numbers(ahead, long) is None and frame_numbers(ahead, SQUARE) is None
        assert frame_numbers(ahead, THREE)
    with begun(THREE) as ahead:
        wait_for(lambda: all_read(ahead))
    assert frame_numbers(ahead, THREE) is None and ahead.held_bytes == 0


# Bounds.


@pytest.mark.few(1)
@pytest.mark.parametrize("order", [[0, 1], [1, 0], [1]])
def test_frames_that_wait_are_bounded_and_whoever_asks_gets_them_in_any_order(long, monkeypatch, order):
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    pair = 2 * 64 * 48 * 3
    paths = [long, SQUARE]
    with begun(*paths, held_bytes=5 * pair) as ahead:
        wait_for(lambda: ahead.held_bytes == 4 * pair)  # plus one that the reader is making
        time.sleep(0.1)
        assert ahead.held_bytes == 4 * pair and not ahead.queue[1][0].request
        for number in order:
            assert frame_numbers(ahead, paths[number]) or number == 0


def test_where_there_is_no_room_at_all_frames_come_one_by_one(long):
    with begun(long, held_bytes=0) as ahead:
        time.sleep(0.2)
        assert ahead.held_bytes == 0
        assert len(frame_numbers(ahead, long)) == 24


def test_little_memory_leaves_little_to_frames(monkeypatch):
    monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _: 2**30)
    assert ReadAhead(DEMO, []).limit_bytes == 2**26
    monkeypatch.setattr("evoprune.backend.limits.Host.available_memory", lambda _: None)
    assert ReadAhead(DEMO, []).limit_bytes == module.MAX_WAITING_BYTES


def test_while_one_is_read_for_somebody_the_next_is_not_waited_for(long, monkeypatch):
    """Inputs are read one at a time, so the next input may never be read if the consumer of the first input stops."""
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    with begun(long, SQUARE, held_bytes=0) as ahead, closing(ahead.take(planned(long))) as first:
        next(first.chunks())
        assert ahead.take(planned(SQUARE)) is None


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
    """A video error ends the session after the frames that precede it. After any other error, the session reads the file again."""

    def breaks(*args, **how):
        for number, chunk in enumerate(read_chunks(*args, **how)):
            if number == 2:
                raise problem.with_traceback(None)
            yield chunk

    monkeypatch.setattr(module, "read_chunks", breaks)
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    qa = VideoQA(demo)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        opened = open_inputs(qa.session, [SQUARE], ahead=ahead)
        if isinstance(problem, VideoError):
            with pytest.raises(VideoError) as caught, closing(opened):
                opened.encode()
            assert caught.value is problem
        else:
            opened.encode()
            assert read_anew[0] == SQUARE


def test_whoever_closes_it_waits_for_nothing(long, monkeypatch):
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    for at_once in (True, False):
        ahead = begun(long, SQUARE, held_bytes=10**5)
        wait_for(lambda ahead=ahead, at_once=at_once: at_once or ahead.held_bytes)
        start = time.monotonic()
        ahead.close()
        ahead.close()
        assert time.monotonic() - start < 2 and ahead.held_bytes == 0 and not ahead.unfinished


def test_nobody_waits_long_for_one_that_hangs_and_is_not_wanted(long, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    monkeypatch.setattr(reading, "PATIENCE_S", 0.05)
    released, hanging = threading.Event(), threading.Event()

    def hangs(info, *args, **how):
        hanging.set()
        assert released.wait(30)
        yield from read_chunks(info, *args, **how)

    monkeypatch.setattr(module, "read_chunks", hangs)
    with begun(SQUARE, long) as ahead:
        assert hanging.wait(20)
        assert ahead.take(planned(long)) is None
        released.set()


def test_whoever_reads_when_it_is_closed_is_told(long):
    with begun(long, held_bytes=0) as ahead:
        chunks = ahead.take(planned(long)).chunks()
        next(chunks)
    with pytest.raises(isolation.Stopped):
        list(chunks)


def test_where_no_thread_can_be_started_nothing_is_read_ahead(long, monkeypatch):
    def refuses(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    with begun(long) as ahead:
        assert ahead.take(planned(long)) is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_copy_reads_by_itself(long):
    with begun(long) as ahead:
        wait_for(lambda: all_read(ahead))
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if frame_numbers(ahead, long) is None else 2
                ahead.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert len(frame_numbers(ahead, long)) == 24


# Uses.


def test_times_of_reading_are_those_of_the_reader_and_the_clock_is_that_on_the_wall(demo, monkeypatch):
    """The bounds are times measured here, so the speed of the machine does not matter."""

    def slow(*args, **how):
        for chunk in read_chunks(*args, **how):
            time.sleep(1.0)
            yield chunk

    monkeypatch.setattr(module, "read_chunks", slow)

    def answered(encoded):
        answer = encoded.ask("What colour is the square?", max_new_tokens=1)
        assert answer.text
        return answer.report.time_ms

    def since(start):
        return 1000 * (time.perf_counter() - start)

    qa = VideoQA(demo)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        start = time.perf_counter()
        with closing(open_inputs(qa.session, [SQUARE], ahead=ahead)) as opened:
            times = answered(opened.encode())
            whole = since(start)
    assert times.read >= 1000 and times.ttft_wall <= whole  # the reading had ended before
    start = time.perf_counter()
    with begun(SQUARE) as ahead, closing(open_inputs(qa.session, [SQUARE], ahead=ahead)) as opened:
        opening = since(start)
        times = answered(opened.encode())
        whole = since(start)
    assert 1000 <= times.read <= whole  # overlapping waits count once
    assert 700 - opening <= times.ttft_wall <= whole


def test_python(read_anew, tmp_path):
    qa = VideoQA.load("demo", device="cpu", ahead=SQUARE)
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew == []
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew == []  # its patches are in the store
    qa.loaded.patches.clear()
    assert qa.ask(SQUARE, "What colour is the square?").text and read_anew == [SQUARE]
    qa = VideoQA.load("demo", device="cpu", ahead=[Path(SQUARE), THREE])
    assert qa.encode([SQUARE, Path(THREE)]).ask("What colour is the square?").text and read_anew == [SQUARE]
    with read_ahead(THREE, frames=6, device="cpu") as ahead:
        qa = VideoQA.load("demo", device="cpu", ahead=ahead)
        assert qa.encode(THREE, frames=6).plan.sampling.frames == 6 and read_anew == [SQUARE]
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
    ahead = read_ahead(long, device="cpu")
    qa = VideoQA.load("demo", device="cpu", ahead=ahead)
    wait_for(lambda: ahead.held_bytes)
    del qa
    gc.collect()
    assert ahead.held_bytes == 0 and not ahead.unfinished


def test_a_batch_takes_its_first_videos(demo, read_anew):
    rows = RowReader().pairs([SQUARE, THREE, "samples/vanish.webm"], ["What happens?"])
    settings = Settings.of(max_new_tokens=2)
    spans, without = Span.group(rows), None
    for first in (0, 2, 3):
        asked = [(span.rows[0].paths, settings.sampling.with_overrides(**span.sampling)) for span in spans[:first]]
        with ReadAhead(DEMO, asked) as ahead:
            wait_for(lambda ahead=ahead: all_read(ahead))
            said = [report.answer for report in answers(VideoQA(demo).session, spans, settings, ahead=ahead)]
        without = without or said
        assert said == without and None not in said
    assert read_anew == [*(row.video for row in rows), rows[2].video]


def test_patches_of_its_frames_serve_other_settings_and_count_once(read_anew, demo, monkeypatch):
    monkeypatch.setattr(demo.patches, "limit_bytes", 2**29)
    with begun(SQUARE) as ahead:
        wait_for(lambda: all_read(ahead))
        times = []
        for budget in (0.5, 0.25):
            with closing(open_inputs(VideoQA(demo, budget=budget).session, [SQUARE], ahead=ahead)) as opened:
                times.append(opened.encode().report.time_ms)
        assert times[0].preprocess > 0 == times[1].preprocess and times[0].read > times[1].read
        assert read_anew == []


BEFORE_TORCH = """
import sys, time
import evoprune
with evoprune.read_ahead("samples/square.mp4", "demo") as ahead:
    until = time.monotonic() + 30
    while not ahead.held_bytes:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "torch" not in sys.modules and "transformers" not in sys.modules
    qa = evoprune.VideoQA.load("demo", ahead=ahead)
    print(qa.ask("samples/square.mp4", "What colour is the square?").text)
"""


def test_frames_are_there_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", BEFORE_TORCH], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr

"""Thanks to the patch store, inputs with the same sampling are read only once, no matter which method prunes them."""

import gc
import os
import threading
import time
import weakref
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evoprune.backend import Device
from evoprune.errors import VideoError
from evoprune.session import encoding, patches
from evoprune.session.encoding import open_inputs
from evoprune.session.patches import PatchStore
from evoprune.video import FrameChunk, SamplingOptions, read_chunks
from evoprune.video_qa import VideoQA
from tests.video.files import numbered_frame, spoil, write_image

CLIP = "samples/square.mp4"
CPU = torch.device("cpu")


@pytest.fixture
def loaded(saved):
    return VideoQA.load(str(saved)).loaded


@pytest.fixture
def read(monkeypatch):
    """Return a list that grows with each path that is read, and check at the end that no thread is left."""
    paths, threads = [], set(threading.enumerate())

    def counted(info, times_s, **how):
        paths.append(info.path)
        return read_chunks(info, times_s, **how)

    monkeypatch.setattr(encoding, "read_chunks", counted)
    yield paths
    assert set(threading.enumerate()) <= threads


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(Path(CLIP).read_bytes())
    return path


def test_other_budgets_and_methods_read_nothing(loaded, read):
    first = VideoQA(loaded, budget=0.5).encode(CLIP, frames=8)
    for options in ({"budget": 0.25}, {"budget": 1.0}, {"budget": 0.5, "method": "divprune"}):
        video = VideoQA(loaded, **options).encode(CLIP, frames=8)
        loaded.patches.clear()
        again = VideoQA(loaded, **options).encode(CLIP, frames=8)
        assert torch.equal(video.encoded.features, again.encoded.features)
        assert video.report.time_ms.preprocess == 0 < again.report.time_ms.preprocess
        assert video.report.video == again.report.video and video.report.warnings == again.report.warnings
    assert read == [CLIP] * 4
    same = VideoQA(loaded, budget=0.5).encode(CLIP, frames=8)
    assert torch.equal(same.encoded.features, first.encoded.features) and len(read) == 4


@pytest.mark.parametrize(
    "other",
    [{"frames": 6}, {"start_s": 1.0}, {"max_visual_tokens": 16}, {"decoder": "decord"}],
)
def test_what_is_looked_at_otherwise_is_read(loaded, read, other, monkeypatch):
    qa = VideoQA(loaded, budget=0.5)
    qa.encode(CLIP, frames=8)
    monkeypatch.setattr(
        "evoprune.session.loading.description.choose_decoder", lambda name, info=None: name.replace("auto", "pyav")
    )
    monkeypatch.setattr(encoding, "patches_of", lambda *what: pytest.fail("read"))
    with pytest.raises(BaseException, match="read"):
        qa.encode(CLIP, **{"frames": 8} | other)


def test_a_method_that_shrinks_the_input_reads_its_own(loaded, read):
    VideoQA(loaded, budget=0.5).encode(CLIP, frames=8)
    for _ in range(2):
        VideoQA(loaded, budget=0.25, method="subsample").encode(CLIP, frames=8)
    assert len(read) == 2


def test_another_file_in_its_place_is_read(loaded, read, clip):
    """The new file is read even if its size and modification time are the same. Another name for the same file is not."""
    qa = VideoQA(loaded, budget=0.5)
    qa.encode(clip, frames=4)
    other = clip.with_name("other.mp4")
    other.symlink_to(clip)
    qa.encode(other, frames=4)
    assert len(read) == 1
    status = os.stat(clip)
    clip.write_bytes(clip.read_bytes())
    os.utime(clip, ns=(status.st_atime_ns, status.st_mtime_ns))
    qa.encode(clip, frames=4)
    assert len(read) == 2


def test_another_image_in_a_folder_is_read_only_with_its_span(loaded, read, tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number}.png", numbered_frame(number))
    qa = VideoQA(loaded, budget=0.5)

    def early():
        return qa.encode(tmp_path, frames=2, end_s=2.0).encoded.features

    first = early()
    write_image(tmp_path / "9.png", numbered_frame(77))
    assert torch.equal(early(), first) and len(read) == 1
    write_image(tmp_path / "1.png", numbered_frame(77))
    assert not torch.equal(early(), first) and len(read) == 2


def test_a_folder_with_damaged_images_is_read_again(loaded, read, tmp_path):
    for number in range(12):
        write_image(tmp_path / f"{number}.png", numbered_frame(number))
    (tmp_path / "8.png").write_text("damaged")
    (tmp_path / "9.png").write_text("damaged")
    qa = VideoQA(loaded, budget=0.5)
    first = qa.encode(tmp_path, frames=2, start_s=4.0, end_s=5.0)
    write_image(tmp_path / "7.png", numbered_frame(77))  # shown instead of both damaged images
    second = qa.encode(tmp_path, frames=2, start_s=4.0, end_s=5.0)
    assert len(read) == 2 and not torch.equal(first.encoded.features, second.encoded.features)


def test_damage_is_told_each_time(loaded, read, monkeypatch, tmp_path):
    clip = spoil(Path("samples/three.mp4"), tmp_path / "damaged.mp4", {40, 50})
    reports = [VideoQA(loaded, budget=budget).encode(clip).report for budget in (0.5, 0.25)]
    assert len(read) == 1
    assert [report.video.damaged for report in reports] == [2, 2]
    assert all("damaged_video" in report.warnings for report in reports)


@pytest.mark.parametrize("why", ["too large", "memory is short", "off"])
def test_what_cannot_be_kept_is_read_again(loaded, read, monkeypatch, why):
    qa = VideoQA(loaded, budget=0.5)
    qa.encode(CLIP, frames=4)
    assert len(loaded.patches._entries) == 1
    if why == "memory is short":
        monkeypatch.setattr(patches, "Device", lambda device: SimpleNamespace(available_memory=lambda: 2**20))
    else:
        loaded.patches.limit_bytes = 0 if why == "off" else 100_000
    for _ in range(2):
        qa.encode(CLIP, frames=8)
    assert len(read) == 3
    assert why == "too large" or not [each for each in loaded.patches._entries.values() if each.users]


def test_what_shows_other_frames_is_not_kept(loaded, read):
    def black(plan, chunks):
        for chunk in chunks:
            chunk.pixels[:] = 0
            yield chunk

    qa = VideoQA(loaded, budget=0.5)
    for _ in range(2):
        with closing(open_inputs(qa.session, [CLIP], SamplingOptions(frames=4), frames=black)) as opened:
            dark = opened.encode()
    assert len(read) == 2
    assert not torch.equal(dark.encoded.features, qa.encode(CLIP, frames=4).encoded.features)


def test_patches_do_not_keep_what_belongs_to_the_caller(loaded):
    """Stored patches would otherwise keep each finished request of a server in memory."""

    class Request:
        def progress(self, *state):
            pass

    requests = []
    for number in range(3):
        request = Request()
        requests.append(weakref.ref(request))
        VideoQA(loaded, budget=0.5).encode(CLIP, frames=4 + 2 * number, progress=request.progress)
        del request
    gc.collect()
    assert [request() for request in requests] == [None] * 3
    assert len(loaded.patches._entries) == 3


def test_a_failure_is_not_kept(loaded, read, monkeypatch):
    real = encoding.patches_of
    monkeypatch.setattr(encoding, "patches_of", lambda *what: (_ for _ in ()).throw(VideoError("gone")))
    qa = VideoQA(loaded, budget=0.5)
    with pytest.raises(VideoError, match="gone"):
        qa.encode(CLIP, frames=4)
    assert not loaded.patches._entries
    monkeypatch.setattr(encoding, "patches_of", real)
    assert qa.encode(CLIP, frames=4).report.sampling.frames == 4


def test_smaller_chunks_read_nothing_again(loaded, read, monkeypatch):
    """This holds even if memory runs out before the whole input has been read."""
    real, tried = encoding.encode_rows, []

    def encode(visual, pieces, plan, *, piece_units, **how):
        tried.append(piece_units)
        if len(tried) < 3:
            next(iter(pieces))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(visual, pieces, plan, piece_units=piece_units, **how)

    monkeypatch.setattr(encoding, "encode_rows", encode)
    monkeypatch.setattr(Device, "piece_units", 96)
    video = VideoQA(loaded, budget=0.5).encode("samples/three.mp4")
    assert len(tried) == 3 and len(read) == 1 and video.report.sampling.frames > 4


def source(count=3, gate=None):
    """Return a source of `count` chunks. All chunks except the first wait for the `gate`."""

    def chunks(reading):
        for number in range(count):
            if gate and number:
                assert gate.wait(10)
            yield FrameChunk(number, torch.full((2, 6), number, dtype=torch.uint8), ())

    return chunks


def test_the_least_recently_used_goes_first():
    store, held = PatchStore(limit_bytes=100), {}
    for key in "abc":
        held[key] = store.open(key, 40, CPU, source())
        for _ in range(2):
            assert [chunk.end for chunk in held[key].read().chunks()] == [0, 1, 2]
    for key in "bac":  # entries in use are never evicted
        store.close(held[key])
    assert list(store._entries) == ["a", "c"]
    assert store.open("a", 40, CPU, source()) is held["a"]
    assert store.clear() and list(store._entries) == ["a"] and not store.clear()
    assert store.open("d", 101, CPU, source()) is None


def test_two_users_share_what_is_being_read():
    store, gate = PatchStore(), threading.Event()
    first = store.open("a", 40, CPU, source(gate=gate))
    second = store.open("a", 40, CPU, source())
    assert first is second and first.read() is second.read()
    store.close(first)  # the other reader still needs it
    gate.set()
    assert len(list(second.read().chunks())) == 3
    store.close(second)
    assert store._entries["a"] is second


def test_the_store_keeps_data_only():
    """While patches are in use or kept, nothing refers to the thread that has produced them, nor to its source."""
    store, made = PatchStore(), source()
    first, second = (store.open("a", 40, CPU, made) for _ in range(2))
    reading, ended = weakref.ref(first.read()), weakref.ref(made)
    assert len(list(first.read().chunks())) == 3
    del made
    store.close(first)
    gc.collect()
    assert reading() is None and ended() is None
    assert [chunk.end for chunk in second.read().chunks()] == [0, 1, 2]
    store.close(second)
    third = store.open("a", 40, CPU, source(10**9))
    assert [chunk.end for chunk in third.read().chunks()] == [0, 1, 2]
    store.close(third)


def test_what_nobody_needs_any_more_ends():
    store, gate, before = PatchStore(), threading.Event(), threading.active_count()
    entry = store.open("a", 40, CPU, source(10**9, gate))
    threading.Timer(0.05, gate.set).start()
    store.close(entry)
    assert not store._entries and not entry.read().is_complete
    until = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_damage_of_every_chunk_is_told(loaded, monkeypatch, tmp_path):
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    clip = spoil(Path("samples/three.mp4"), tmp_path / "damaged.mp4", {10})
    report = VideoQA(loaded, budget=0.5).encode(clip).report
    assert report.video.damaged == 1 and "damaged_video" in report.warnings


def test_a_failed_reading_is_not_shared():
    """An input opened after a failure is read again, even while another input still uses the failed reading."""

    def failing(reading):
        raise VideoError("too many files are open", "close some")
        yield

    def working(reading):
        yield FrameChunk(0, torch.zeros(1, 1, dtype=torch.uint8), (0.0,))

    store = PatchStore()
    failed = store.open("key", 1, CPU, failing)
    with pytest.raises(VideoError, match="too many files"):
        list(failed.read().chunks())
    again = store.open("key", 1, CPU, working)
    assert len(list(again.read().chunks())) == 1
    store.close(failed)
    store.close(again)
    assert store.open("key", 1, CPU, failing) is again

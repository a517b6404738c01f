"""Videos from the disk cache lead to the same answers, are never confused with other inputs, and never make a command fail."""

import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from evoprune.contrib.evs import Evs
from evoprune.session import cache as cache_module
from evoprune.session import encoding
from evoprune.session.cache import Cache, Entry, SegmentCache, content_hash
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from evoprune.vision import Encoded
from tests.decoders import DECODERS
from tests.loading import delete_when_mapped, described
from tests.threads import one_thread  # noqa: F401
from tests.video.files import numbered_frame, numbered_frames, spoil, write_image

CLIP = "samples/square.mp4"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


@pytest.fixture
def clip(tmp_path):
    return shutil.copy(CLIP, tmp_path / "clip.mp4")


def answer(video):
    return "".join(video.ask("What happens?", max_new_tokens=12))


def encoded(count=4, width=8, rows=6, dtype=torch.float32, size=None):
    random = torch.Generator().manual_seed(count)
    features = torch.randn(count, width, generator=random).to(dtype)
    owner = torch.arange(12) % rows
    rest = {"grids": ((3, 2, 2),), "layers": [(0, 12)], "prune_seconds": 1.0, "flat": True, "size": size}
    return Encoded(features, torch.arange(count) * 2, torch.zeros(rows, width), owner, **rest)


def entry(encoded):
    return Entry(encoded, (0.25, 0.75), moved=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_stored_comes_back(cache, dtype):
    before = encoded(dtype=dtype)
    assert cache.load("0" * 64, torch.device("cpu")) is None and cache.size() == (0, 0)
    assert cache.store("0" * 64, entry(before))
    found = cache.load("0" * 64, torch.device("cpu"))
    assert (found.read_s, found.moved) == ((0.25, 0.75), True)
    after = found.encoded
    for name in ("features", "kept", "unit_to_row"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert after.features.dtype == dtype and after.rows.shape == before.rows.shape
    assert (after.grids, after.layers, after.flat, after.prune_seconds) == (before.grids, before.layers, True, 0.0)
    assert cache.size()[0] == 1 and cache.size()[1] > 0 and after.size is None
    assert cache.folder.stat().st_mode & 0o777 == 0o700  # the entries are private
    assert cache.store("1" * 64, entry(encoded(size=torch.tensor([1.0, 2.5, 1.0, 4.0]))))
    assert cache.load("1" * 64, torch.device("cpu")).encoded.size.tolist() == [1.0, 2.5, 1.0, 4.0]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("method", "budget"), [("evoprune", 0.25), ("evoprune", 1.0), ("pool", 0.25), ("subsample", 0.5)]
)
def test_the_second_time_nothing_is_encoded_and_all_is_the_same(loaded, cache, clip, monkeypatch, method, budget):
    qa = VideoQA(loaded, budget=budget, method=method)
    plain = qa.encode(clip)
    first = qa.encode(clip, cache=cache)
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded again"))
    with closing(open_inputs(qa.session, [clip], cache=cache)) as opened:
        assert opened._inputs[0].stored is not None
        second = opened.encode()
    assert [video.report.cache for video in (plain, first, second)] == ["off", "miss", "hit"]
    answers = [video.ask("What happens?", max_new_tokens=12) for video in (plain, first, second)]
    assert "".join(answers[0]) == "".join(answers[1]) == "".join(answers[2])
    a, b = answers[1].report, answers[2].report
    for name in ("pruning", "sampling", "video", "tokens", "warnings"):
        assert getattr(a, name) == getattr(b, name)
    times = b.time_ms
    assert times.encode == times.preprocess == times.encode_prune == 0 < times.read < times.ttft_wall
    assert times.ttft_model == times.prefill


def test_what_the_numbers_depend_on_makes_another_entry(loaded, cache, clip, tmp_path):
    def state(qa=None, path=clip, **settings):
        return (qa or VideoQA(loaded, budget=0.25)).encode(path, cache=cache, **settings).report.cache

    assert state() == "miss" and state() == "hit"
    pruned = partial(VideoQA, loaded)
    limits = {"video": replace(loaded.video, image_mean=(0.1, 0.2, 0.3))}
    others = [
        *[{"frames": 4}, {"start_s": 1.0}, {"end_s": 3.0}, {"max_visual_tokens": 50}],
        *([{"decoder": "decord"}] if "decord" in DECODERS else []),
        {"path": "samples/three.mp4"},
        {"qa": pruned(budget=0.5)},
        {"qa": pruned(budget=0.25, seed=1)},
        {"qa": pruned(budget=0.25, method="evs")},
        {"qa": pruned(budget=0.1, method="reuse+evs")},
        {"qa": pruned(budget=0.1, method="reuse+evs-nofloor")},
        {"qa": pruned(budget=0.25, method="evoprune:alpha=3")},
        {"qa": pruned(budget=0.25, method="evoprune-paper:allocation=mean")},
        *[
            {"qa": VideoQA(changed, budget=0.25)}
            for changed in (
                replace(loaded, fingerprint="other"),
                replace(loaded, quantize="int8"),
                described(loaded, limits=limits),
                described(loaded, options=replace(loaded.description.options, dtype="bf16")),
            )
        ],
    ]
    for other in others:
        assert state(**other) == "miss", other
        assert state(**other) == "hit", other
    for same in (
        {"qa": pruned(budget="balanced")},
        {"qa": pruned(budget=0.25, method="evoprune:alpha=3")},
        {"frames": 12},
        {"path": shutil.copy(clip, tmp_path / "elsewhere.mp4")},
        {"name": "other"},
    ):
        assert state(**same) == "hit", same


def test_other_bytes_under_the_same_name_size_and_time(loaded, cache, clip):
    """A file that is replaced while it is being read is not stored either."""
    qa, before = VideoQA(loaded, budget=0.25), os.stat(clip)
    assert qa.encode(clip, cache=cache).report.cache == "miss"
    content = bytearray(Path(clip).read_bytes())
    content[content.index(b"mdat") + 200] ^= 1
    Path(clip).write_bytes(content)
    os.utime(clip, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(clip).st_size == before.st_size
    assert qa.encode(clip, cache=cache).report.cache == "miss"
    cache.clear()
    with closing(open_inputs(qa.session, [clip], cache=cache)) as opened:
        assert opened._inputs[0].stored is None
        os.replace(shutil.copy("samples/pan.mp4", f"{clip}.new"), clip)
        opened.encode()
    assert cache.size() == (0, 0)


def test_one_hash_serves_many_spans(loaded, cache, clip, monkeypatch):
    time.sleep(0.05)  # until the ctime is in the past
    hashed = []
    monkeypatch.setattr(cache_module, "content_hash", lambda path: hashed.append(path) or content_hash(path))
    qa = VideoQA(loaded, budget=0.25)

    def states():
        return [qa.encode(clip, frames=2, start_s=start_s, cache=cache).report.cache for start_s in (0, 1, 2)]

    assert states() == ["miss"] * 3 and len(hashed) == 1
    shutil.copy("samples/pan.mp4", clip)
    assert states() == ["miss"] * 3 and states() == ["hit"] * 3
    time.sleep(0.05)
    assert states() == ["hit"] * 3 and states() == ["hit"] * 3
    assert len(hashed) <= 9


def test_an_entry_of_a_span_of_a_folder_depends_on_its_images(loaded, cache, tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(12):
        write_image(folder / f"{number}.png", numbered_frame(number))

    def state():
        loaded.patches.clear()
        return VideoQA(loaded, budget=0.25).encode(folder, frames=2, end_s=2.0, cache=cache).report.cache

    assert [state(), state()] == ["miss", "hit"]
    write_image(folder / "9.png", numbered_frame(77))
    assert state() == "hit"
    write_image(folder / "1.png", numbered_frame(77))
    assert state() == "miss"
    (folder / "00.png").write_bytes((folder / "5.png").read_bytes())  # all others come later
    assert state() == "miss"


def test_hash_of_a_folder_of_frames(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    first = content_hash(tmp_path)
    (tmp_path / "b").rename(tmp_path / "c")
    second = content_hash(tmp_path)
    (tmp_path / "c").write_text("B")
    assert len({first, second, content_hash(tmp_path)}) == 3


@pytest.mark.full
def test_changed_code_and_weights_make_other_entries(loaded, cache, clip, folder, monkeypatch):
    qa = VideoQA(loaded, budget=0.25)
    assert qa.encode(clip, cache=cache).report.cache == "miss"
    monkeypatch.setattr(encoding, "own_code", lambda: "changed")
    assert qa.encode(clip, cache=cache).report.cache == "miss"
    monkeypatch.setattr(encoding, "version", lambda package: f"{package} 0.1")
    assert qa.encode(clip, cache=cache).report.cache == "miss"
    first = load_model(str(folder)).fingerprint
    assert load_model(str(folder)).fingerprint == first
    os.utime(folder / "model.safetensors", (1, 1))
    second = load_model(str(folder)).fingerprint
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert len({first, second, load_model(str(folder)).fingerprint}) == 3
    assert load_model(str(folder), load_format="dummy").fingerprint not in (first, second)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no ctime of changes")
def test_changed_weights_of_the_same_size_and_date_are_noticed(folder):
    path = folder / "model.safetensors"
    before, stats = load_model(str(folder)).fingerprint, path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    os.utime(path, ns=(stats.st_atime_ns, stats.st_mtime_ns))
    assert path.stat().st_size == stats.st_size and load_model(str(folder)).fingerprint != before


def test_who_leaves_the_cache_alone(loaded, cache, clip, monkeypatch):
    qa = VideoQA(loaded, budget=0.25, method="evs")
    assert VideoQA(replace(loaded, fingerprint=None)).encode(clip, cache=cache).report.cache == "off"
    monkeypatch.setattr(Evs, "reads_question", True)
    assert qa.encode(clip, cache=cache).report.cache == "off" and cache.size()[0] == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("damage", ["empty", "flipped", "other", "cut", "text", "folder"])
def test_a_damaged_entry_is_replaced(loaded, cache, clip, damage):
    """An entry that was copied from another name is replaced as well."""
    qa = VideoQA(loaded, budget=0.25)
    fresh = answer(qa.encode(clip, cache=cache))
    (entry,) = cache.folder.iterdir()
    content = entry.read_bytes()
    if damage == "folder":
        entry.unlink()
        entry.mkdir()
    elif damage == "other":
        assert qa.encode("samples/pan.mp4", cache=cache).report.cache == "miss"
        (other,) = set(cache.folder.iterdir()) - {entry}
        shutil.copy(other, entry)
    else:
        flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
        entry.write_bytes({"empty": b"", "cut": content[:-5], "flipped": flipped, "text": b"x" * 1000}[damage])
    video = qa.encode(clip, cache=cache)
    assert video.report.cache == "miss" and answer(video) == fresh
    if damage == "folder":  # evoprune did not create the folder, so it does not remove it
        assert video.report.warnings == ["cache_not_written"]
    else:
        again = qa.encode(clip, cache=cache)
        assert again.report.cache == "hit" and answer(again) == fresh


def raising(problem):
    def raise_it(*_, **__):
        raise problem

    return raise_it


def test_what_cannot_be_written_is_a_warning(loaded, clip, tmp_path, monkeypatch):
    """A read-only cache can still be read."""
    (tmp_path / "file").touch()
    qa, cache = VideoQA(loaded, budget=0.25), Cache(tmp_path / "cache")
    video = qa.encode(clip, cache=Cache(tmp_path / "file" / "folder"))
    assert answer(video) and video.report.warnings == ["cache_not_written"] and video.report.cache == "miss"
    with monkeypatch.context() as patch:
        patch.setattr("evoprune.session.cache.os.replace", raising(OSError(28, "No space left on device")))
        assert qa.encode(clip, cache=cache).report.warnings == ["cache_not_written"]
    assert list(cache.folder.iterdir()) == []
    assert not Cache(tmp_path / "small", limit_bytes=100).store("0" * 64, entry(encoded()))
    cache.store("0" * 64, entry(encoded()))
    monkeypatch.setattr("evoprune.session.cache.os.utime", raising(PermissionError))
    assert cache.load("0" * 64, torch.device("cpu")) is not None


def test_what_was_used_longest_ago_goes_first(tmp_path):
    big = Cache(tmp_path)
    big.store("a" * 64, entry(encoded()))
    each = big.size()[1]
    cache = Cache(tmp_path, limit_bytes=3 * each + each // 2)
    for number, name in enumerate("abc"):
        cache.store(name * 64, entry(encoded()))
        os.utime(tmp_path / f"{name * 64}.safetensors", (1000 + number, 1000 + number))
    assert cache.load("a" * 64, torch.device("cpu"))  # used just now
    cache.store("d" * 64, entry(encoded()))
    assert sorted(p.name[0] for p in tmp_path.iterdir()) == ["a", "c", "d"]


def test_other_files_stay_and_unfinished_ones_go_when_they_are_old(cache):
    cache.folder.mkdir()
    new, old = (f"{'1' * 64}.safetensors.evoprune-0123456{end}.tmp" for end in "78")
    for name in ("notes.txt", "model.safetensors", new, old, "tmpold.tmp"):
        (cache.folder / name).touch()
    for name in (old, "tmpold.tmp"):
        os.utime(cache.folder / name, (1, 1))
    cache.store("0" * 64, entry(encoded()))
    left = {"notes.txt", "model.safetensors", new}
    assert {p.name for p in cache.folder.iterdir()} == left | {f"{'0' * 64}.safetensors"}
    assert cache.clear() == 1 and cache.clear() == 0
    assert {p.name for p in cache.folder.iterdir()} == left - {new}


def test_a_replaced_entry_keeps_its_mode_and_a_new_one_is_private(cache):
    def modes() -> list[int]:
        return [path.stat().st_mode & 0o777 for path in cache.folder.iterdir()]

    cache.store("0" * 64, entry(encoded()))
    assert modes() == [0o600]
    cache.path("0" * 64).chmod(0o640)
    cache.store("0" * 64, entry(encoded()))
    assert modes() == [0o640] and cache.load("0" * 64, torch.device("cpu"))


def test_an_entry_that_is_deleted_while_it_is_opened_is_missing(cache, monkeypatch):
    cache.store("0" * 64, entry(encoded()))
    delete_when_mapped(monkeypatch)
    assert cache.load("0" * 64, torch.device("cpu")) is None and cache.size() == (0, 0)


def _storm(folder: str, worker: int) -> int:
    """Store and load a few entries in a cache that has room for two, and return how many were found. Wrong contents fail."""
    torch.set_num_threads(1)
    cache, right = Cache(Path(folder), limit_bytes=3000), 0
    for turn in range(40):
        count = (turn + worker) % 4 + 1
        cache.store(f"{count}" * 64, entry(encoded(count)))
        found = cache.load(f"{turn % 4 + 1}" * 64, torch.device("cpu"))
        if found is not None:
            assert torch.equal(found.encoded.features, encoded(turn % 4 + 1).features)
            right += 1
    return right


@pytest.mark.full
def test_several_processes_at_once(tmp_path):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert sum(pool.map(_storm, [str(tmp_path)] * 3, range(3))) > 0
    assert not list(tmp_path.glob("*.tmp")) and Cache(tmp_path).size()[1] <= 3000


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    assert Cache().folder == tmp_path and Cache() == Cache(str(tmp_path)) == Cache(tmp_path)
    monkeypatch.delenv("EVOPRUNE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert Cache().folder == Path("/caches/evoprune")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Cache().folder == Path.home() / ".cache" / "evoprune"


def test_a_damaged_video_is_not_kept_because_nobody_would_be_warned(loaded, cache, tmp_path):
    path = spoil(Path(CLIP), tmp_path / "damaged.mp4", {40, 50})
    qa = VideoQA(loaded, budget=0.25)
    for _ in range(2):
        report = qa.encode(path, cache=cache).report
        assert (report.cache, report.warnings.count("damaged_video"), report.video.damaged) == ("miss", 1, 2)
    assert cache.size() == (0, 0)


def test_a_file_is_hashed_again_when_it_has_changed(tmp_path):
    hashed = SegmentCache(tmp_path / "cache").content_hash
    path = tmp_path / "clip"
    path.write_bytes(b"one")
    first = hashed(path)
    assert hashed(path) == first == content_hash(path)
    path.write_bytes(b"another")
    assert hashed(path) == content_hash(path) != first
    assert hashed(tmp_path) == content_hash(tmp_path)
    with pytest.raises(OSError):
        hashed(tmp_path / "gone")


def test_the_rate_of_a_folder_makes_another_entry(loaded, cache, tmp_path):
    """With the same times, another rate means other images."""
    for number, frame in enumerate(numbered_frames(16, 56, 56)):
        Image.fromarray(frame).save(tmp_path / f"{number:02}.png")
    qa, how = VideoQA(loaded, budget=0.25), {"frames": 8, "end_s": 4, "cache": cache}
    first, second = (qa.encode(tmp_path, frame_rate=rate, **how) for rate in (2, 4))
    assert first.plans[0].sampling.times_s == second.plans[0].sampling.times_s
    assert (first.report.cache, second.report.cache) == ("miss", "miss")
    assert qa.encode(tmp_path, frame_rate=4, **how).report.cache == "hit"

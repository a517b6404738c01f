"""Test the disk cache for quantized weights."""

import copy
import errno
import shutil
from types import SimpleNamespace

import pytest
import torch

from evoprune import VideoQA
from evoprune.backend import Quantization
from evoprune.errors import UsageError
from evoprune.report import WARNINGS
from evoprune.session.cache import WEIGHTS_LIMIT_BYTES, Cache, Entries
from evoprune.session.loading import stored
from evoprune.session.loading.stored import SPARE_BYTES, calibrate
from tests.loading import delete_when_mapped, load_model
from tests.quantized import SOME, parameters
from tests.tiny import save_tiny, tiny_model


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    return tmp_path / "weights"


def outputs(model):
    """Return the outputs of each quantized layer, both for multiple rows and for a single row."""
    made = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "packed"):
            x = torch.linspace(-1, 2, 3 * layer.in_features).view(3, -1)
            made[name] = torch.cat([layer(x), layer(x[:1])])
    return made


def quantised(kind, fingerprint="a", again=False, **options):
    """Return the outputs of a quantized model. `again` is whether a later run would have to quantize it again."""
    model = copy.deepcopy(tiny_model())
    assert stored.quantize_once(model, kind, fingerprint, **options)[1] == again
    return outputs(model)


def same(made, expected):
    return made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in expected)


@pytest.fixture
def runs(monkeypatch):
    """Return a list that grows with each calibration."""
    seen = []
    monkeypatch.setattr(stored, "calibrate", lambda model: seen.append(1) or calibrate(model))
    return seen


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_a_second_model_is_the_same_without_a_calibration(kind, folder, runs):
    plain = copy.deepcopy(tiny_model())
    Quantization(kind).apply(plain, calibrate)
    seen = []
    made = [quantised(kind, progress=lambda done, total: seen.append((done, total))) for _ in range(2)]
    assert all(same(each, outputs(plain)) for each in made)
    assert len(runs) == 1 and seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    quantised(kind, "b")  # other files
    assert len(runs) == 2 and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("kind", parameters(SOME))
def test_a_new_version_replaces_the_weights_of_the_previous_one(kind, folder, runs, monkeypatch):
    expected = quantised(kind)
    monkeypatch.setattr(stored, "own_code", lambda: "other code")
    for _ in range(2):  # the second one reads what the first one wrote
        assert same(quantised(kind), expected) and len(runs) == 2 and len(list(folder.iterdir())) == 1


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", parameters(SOME))
@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_a_damaged_entry_is_written_again(damage, kind, folder, runs):
    """An entry that was copied from another name is rewritten as well."""
    expected = quantised(kind)
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()
    if damage == "other":
        quantised(kind, "b")
        (other,) = set(folder.iterdir()) - {entry}
        shutil.copy(other, entry)
    else:
        entry.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\xff" * len(whole)}[damage])
    assert same(quantised(kind), expected) and len(runs) == (3 if damage == "other" else 2)
    assert entry.read_bytes() == whole


@pytest.mark.parametrize("kind", parameters(SOME))
def test_an_entry_that_is_deleted_while_it_is_opened_is_written_again(kind, folder, runs, monkeypatch):
    expected = quantised(kind)
    delete_when_mapped(monkeypatch)
    assert same(quantised(kind), expected) and len(runs) == 2 and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("kind", parameters(SOME))
def test_a_disk_that_is_full_or_read_only_changes_nothing(kind, folder, runs, monkeypatch):
    expected = quantised(kind)
    monkeypatch.setattr(Cache, "of_weights", Entries(folder / "no", 10))
    (folder / "no").write_text("a file")
    assert same(quantised(kind, again=True), expected)
    monkeypatch.undo()
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(folder / "full"))

    class Full(stored._Stream):
        def add(self, layer, weights):
            if len(self._header) > 20:
                self._problem = OSError(errno.ENOSPC, "no room")
            super().add(layer, weights)

    monkeypatch.setattr(stored, "_Stream", Full)
    assert same(quantised(kind, again=True), expected)
    assert list((folder / "full/weights").iterdir()) == []


@pytest.mark.parametrize("kind", parameters(SOME))
def test_an_interrupted_run_leaves_nothing(kind, folder):
    def stop(done, total):
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantised(kind, progress=stop)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", parameters(SOME))
def test_an_error_of_the_progress_bar_is_not_taken_for_a_full_disk(kind, folder):
    def stop(done, total):
        raise BrokenPipeError("no terminal")

    with pytest.raises(BrokenPipeError, match="no terminal"):
        quantised(kind, progress=stop)


@pytest.mark.parametrize("kind", parameters(SOME))
def test_answers_are_the_same_from_disk(kind, folder):
    asked = [
        VideoQA.load("demo", quantize=kind, store_quantized=keep).ask("samples/square.mp4", "What shape is red?").ids
        for keep in (False, True, True)
    ]
    assert asked[0] == asked[1] == asked[2] and len(list(folder.iterdir())) == 1


def test_only_what_is_quantised_is_stored():
    for options in ({}, {"quantize": "none"}, {"dtype": "fp32"}):
        with pytest.raises(UsageError, match="needs quantize"):
            VideoQA.load("demo", store_quantized=True, **options)


def test_what_auto_quantises_is_stored_too(tmp_path, monkeypatch):
    folder = str(save_tiny(tmp_path / "model"))
    with pytest.raises(UsageError, match=f"nothing to store: quantize auto does not quantize {folder} here"):
        load_model(folder, store_quantized=True)  # the model is small
    monkeypatch.setattr("evoprune.session.loading.description.LARGE_MODEL", 1)
    if parameters("int8"):
        monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
        loaded = load_model(folder, store_quantized=True)
        assert loaded.quantize == "int8" and loaded.quantized_file.is_file()


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder with a small model that counts as large, and a function that loads it, given the free bytes of the disk."""
    if not parameters("int8"):
        pytest.skip("this CPU has no int8 products")
    monkeypatch.setattr("evoprune.session.loading.description.LARGE_MODEL", 1)
    folder = save_tiny(tmp_path / "model")

    def load(free, **options):
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
        return load_model(str(folder), quantize="int8", **options)

    return load


def stored_state(loaded) -> tuple[bool, bool]:
    """Return whether a start stored weights, and whether later starts have to quantize them again."""
    return loaded.quantized_file is not None and loaded.quantized_file.is_file(), loaded.not_stored


def test_weights_of_large_models_are_stored_if_the_disk_has_room(large, monkeypatch, runs):
    assert stored_state(large(2**30)) == (False, True)
    assert stored_state(large(2**40, store_quantized=False)) == (False, False)
    assert stored_state(large(2**40)) == (True, False)
    assert len(runs) == 3
    for free in (2**40, 2**30):  # they are there already, so the disk may be full
        assert stored_state(large(free)) == (False, False)
        assert stored_state(large(free, store_quantized=True)) == (False, False)
    assert len(runs) == 3
    monkeypatch.setattr("evoprune.session.loading.description.LARGE_MODEL", 2**60)
    assert stored_state(large(2**30, dtype="fp32")) == (False, False)
    assert stored_state(large(2**30, dtype="fp32", store_quantized=True)) == (True, False)


def test_a_full_disk_is_reported(large):
    for free, warned in ((2**30, True), (2**40, False)):
        report = VideoQA(large(free)).ask("samples/square.mp4", "What?", max_new_tokens=1).report
        assert ("weights_not_stored" in report.warnings) == warned
    text = WARNINGS["weights_not_stored"]
    assert all(word in text for word in (f"{SPARE_BYTES >> 30} GiB", f"{WEIGHTS_LIMIT_BYTES >> 30} GiB", "--no-store"))


def test_weights_that_the_cache_cannot_keep_are_not_stored(large, folder, tmp_path, monkeypatch):
    """Entries of other models stay."""
    large(2**40)
    before = sorted(folder.iterdir())
    assert before
    monkeypatch.setattr("evoprune.session.cache.WEIGHTS_LIMIT_BYTES", 10)
    other = str(save_tiny(tmp_path / "other", seed=1))
    for options in ({}, {"store_quantized": True}):
        assert stored_state(load_model(other, quantize="int8", **options)) == (False, True)
    assert sorted(folder.iterdir()) == before

"""Every use of the library leaves the state of the host program unchanged."""

import random
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import evoprune
from evoprune.batch import RowReader, Settings, Span, answers
from evoprune.video import probe, read_chunks
from evoprune.video.sandbox import isolation
from tests.process_state import differences, process_state
from tests.prompts import VIDEO, processed
from tests.tiny import tiny_model
from tests.video.files import quarters, write_image
from tests.video.kinds import KINDS, write_kind

CLIP = "samples/square.mp4"
FEW = ("h264.mp4", "hevc.mkv", "vp9.webm", "av1.mkv", "picture.gif", "prores.mov", "raw.avi", "subtitles.mkv")


@contextmanager
def unchanged():
    """Check that the block leaves the process state, warning filters and global random generators unchanged."""

    def now():
        drawn = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        return process_state() | {"random numbers": hash(str(drawn)), "warnings": list(warnings.filters)}

    before = now()
    yield
    changed = differences(before, now())
    assert not changed, "\n".join(changed)


def test_a_change_is_noticed(monkeypatch):
    with unchanged():  # as scikit-learn does on import
        monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "True")
        monkeypatch.setenv("KMP_INIT_AT_FORK", "FALSE")
    with pytest.raises(AssertionError, match="HOST_OF_TESTS"), unchanged():
        monkeypatch.setenv("HOST_OF_TESTS", "1")
    with pytest.raises(AssertionError, match="random numbers"), unchanged():
        torch.rand(1)


@pytest.mark.parametrize("apart", [True, False], ids=["in a process apart", "in this process"])
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in KINDS]
)
def test_files_are_read(name, apart, tmp_path_factory, monkeypatch):
    path = write_kind(tmp_path_factory.getbasetemp(), name)
    if not apart:
        monkeypatch.setattr(isolation, "POSSIBLE", False)
    with unchanged():
        info = probe(path)
        assert list(read_chunks(info, [0.0, info.duration_s]))


def test_a_question_is_answered(tmp_path):
    picture = write_image(tmp_path / "a.png", quarters())
    with unchanged():
        for method, temperature in (("evoprune", 0.0), ("random+fastv", 1.0)):
            qa = evoprune.VideoQA.load("demo", budget=0.25, method=method)
            assert qa.encode([CLIP, picture]).ask("What happens?", temperature=temperature).text
        with pytest.raises(evoprune.VideoError):
            qa.encode(tmp_path / "no.mp4")
        rows = RowReader().pairs([CLIP], ["What happens?"])
        assert not any(made.error for made in answers(qa.session, Span.group(rows), Settings.of(model="demo")))


def test_a_hugging_face_model_is_pruned():
    model = tiny_model()
    inputs = processed(model, (5, (VIDEO, 4, 8, 12), 7))
    with unchanged():
        for _ in range(2):
            with evoprune.EvoPrune(budget=0.25)(model):
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
        evoprune.apply(model, budget=0.5)
        model(**inputs)
        evoprune.remove(model)

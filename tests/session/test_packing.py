"""Answers do not depend on which of the language model's layers are packed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from evoprune import VideoQA
from evoprune.backend import Packing
from evoprune.backend.cpu import linear
from evoprune.backend.cpu.linear import PackedLinear
from evoprune.session.loading.model import load_model
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny

CLIP, QUESTIONS = "samples/square.mp4", ("What happens?", "And then, where does the red square go?", "Why?")
MODELS = ("demo fp32", "demo bf16", "qwen2_5_vl bf16", "qwen2_5_vl fp32", "qwen3_vl bf16", "qwen3_5 bf16")

pytestmark = pytest.mark.skipif(not Packing.supports(torch.empty(1)), reason="this torch has no packed products")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    families = {name.split()[0] for name in MODELS} - {"demo"}
    return {family: str(save_tiny(tmp_path_factory.mktemp(family), family=family)) for family in families}


@pytest.fixture(scope="module", params=MODELS)
def load(request, folders):
    """Return a function that loads a new copy of the model, whose language model is completely packed by the third pass."""
    name, dtype = request.param.split()
    if not Packing.supports(torch.empty(1, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)):
        pytest.skip("this dtype is not packed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "SMALL_WEIGHT", 0)
        patch.setattr(linear, "LARGE_WEIGHT", 20_000)  # the output layer is packed in parts
        patch.setattr(linear, "START_PASSES", 2)
        patch.setattr(linear, "PASS_BYTES", 40_000)
        yield lambda: load_model(folders.get(name, name), dtype=dtype)


def waiting(loaded) -> int:
    return sum(layer.waits for layer in loaded.model.modules() if isinstance(layer, PackedLinear))


def ids_of(video, question, n=6) -> list[int]:
    """Return the tokens of a sampled answer, which differ if any number differs."""
    made = video.ask(question, max_new_tokens=n, temperature=1.0, seed=1)
    assert made.text is not None
    return made.ids


@pytest.fixture(scope="module")
def want(load) -> list[list[int]]:
    """Return the answers of a model that is packed from the beginning."""
    loaded = load()
    loaded.packing.finish()
    video = VideoQA(loaded, budget=0.25).encode(CLIP)
    return [ids_of(video, question) for question in QUESTIONS]


@pytest.mark.few(1)
def test_answers_are_the_same_however_many_were_asked_before(load, want):
    for first in range(len(QUESTIONS)):
        loaded = load()
        before = waiting(loaded)
        assert before and not loaded.packing.seconds
        qa = VideoQA(loaded, budget=0.25)
        video = qa.encode(CLIP)
        for number in [*range(first, len(QUESTIONS)), *range(first)]:
            assert ids_of(video, QUESTIONS[number]) == want[number]
        assert [ids_of(qa.encode(CLIP), question) for question in QUESTIONS] == want
        assert waiting(loaded) < before and loaded.packing.seconds
        loaded.packing.finish()
        assert [ids_of(video, question) for question in QUESTIONS] == want


@pytest.mark.full
def test_the_beginning_of_an_answer_does_not_depend_on_its_length(load, want):
    for n in (1, 2, 3, 5):
        assert ids_of(VideoQA(load(), budget=0.25).encode(CLIP), QUESTIONS[0], n) == want[0][:n]


@pytest.mark.full
def test_an_interruption_while_layers_are_packed(load, want, monkeypatch):
    reorder = linear._packed
    for moment in (1, 4, 9):
        loaded, calls = load(), []
        video = VideoQA(loaded, budget=0.25).encode(CLIP)

        def interrupted(weight, moment=moment, calls=calls):
            calls.append(weight)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return reorder(weight)

        monkeypatch.setattr(linear, "_packed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            for question in QUESTIONS:
                ids_of(video, question)
        monkeypatch.setattr(linear, "_packed", reorder)
        assert waiting(loaded)
        assert [ids_of(video, question) for question in QUESTIONS] == want
        loaded.packing.finish()
        assert [ids_of(video, question) for question in QUESTIONS] == want


@pytest.mark.few(1)
def test_threads_that_ask_while_layers_are_packed(load, want):
    loaded = load()
    videos = [VideoQA(loaded, budget=0.25).encode(CLIP) for _ in QUESTIONS]
    with ThreadPoolExecutor(len(videos)) as pool:
        for _ in range(2):
            assert list(pool.map(ids_of, videos, QUESTIONS)) == want

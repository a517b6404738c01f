"""On a GPU: tokens in and out of the graph, and logits of a step."""

from contextlib import contextmanager

import pytest
import torch

from evoprune.backend import layers
from evoprune.language import static
from evoprune.language.generate import GenerationOptions, TokenStream, prefill
from evoprune.model.config import MODEL_TYPES
from evoprune.session.loading.model import load_model
from tests.tiny import tiny_model

DEVICE = "cuda"
pytestmark = pytest.mark.cuda


@contextmanager
def decoding(how: str):
    """ "graph"; "step", the same without a graph; "plain", the decoder of prompts; or "old", that without fused kernels."""
    with pytest.MonkeyPatch.context() as patch:
        if how == "old":
            patch.setattr(layers, "kernels", lambda device: None)
        if how == "step":
            patch.setattr(static.devices, "run_and_capture", lambda function, device: function() or function)
        if how in ("plain", "old"):
            patch.setattr(static, "begin", lambda *_: None)
        elif how == "step":
            patch.setattr(static, "_caches", static.WeakKeyDictionary())
        yield


def prompt_state(model, columns: int, sizes: bool = True, seed: int = 0):
    text = model.model.language_model
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 400, (columns,), generator=random)
    counts = torch.randint(1, 9, (columns,), generator=random).float().to(DEVICE) if sizes else None
    with torch.inference_mode():
        embeds = text.embed_tokens(ids.to(DEVICE)).to(text.norm.weight.dtype)
    return prefill(model, embeds, torch.arange(columns).expand(3, -1), columns, sizes=counts)


def answer(model, columns: int, new: int, **how) -> list[int]:
    return list(TokenStream(prompt_state(model, columns, **how), GenerationOptions(max_new_tokens=new), ()))


@pytest.mark.parametrize("family", MODEL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
def test_a_graph_decodes_the_same_tokens(family, dtype, joined):
    model = tiny_model(family=family).to(DEVICE, dtype)
    if joined:
        layers.join(model)
    for columns, sizes in ((40, True), (30, False), (600, True), (500, False)):
        made = {}
        for how in ("graph", "step", "plain", "old"):
            with decoding(how):
                made[how] = answer(model, columns, 24, sizes=sizes)
        assert made["graph"] == made["step"]  # the same kernels on the same shapes
        if dtype == torch.float32:
            assert made["graph"] == made["plain"] == made["old"]
    assert list(static._caches[model].graphs) == [1024]


def test_logits_at_3b():
    """Along one answer, of the step and of the plain decoder."""
    model = load_model("Qwen/Qwen2.5-VL-3B-Instruct", load_format="dummy", device=DEVICE, dtype="bf16").model
    with torch.inference_mode():
        state, cache = prompt_state(model, 256), static.StaticCache(model, 2048)
        cache.fill(state.cache, state.next_position, 2048)
        for token in answer(model, 256, 16)[:-1]:
            plain = state.read(torch.tensor([token]))[0]
            cache.token.fill_(token)
            static.step(model, cache)
            # In bf16 each of the two is off by about 0.04 in the mean, and the largest of 151,936 is 4.5 times that.
            assert (cache.logits - plain).abs().max() / plain.std() < 0.4

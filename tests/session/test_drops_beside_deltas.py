"""Compare methods that drop tokens inside a model with Gated DeltaNets with transformers' layers, which get the shorter sequence.

The real models have an attention layer after every three Gated DeltaNets, and so has the model of these tests.
"""

import numpy as np
import pytest
import torch
from PIL import Image

from evoprune import VideoQA
from evoprune.errors import UsageError
from evoprune.language import LanguageModel
from evoprune.methods import Dropping, LanguageMethod, LanguagePlan, MethodChain, several_drops
from tests import tiny
from tests.tiny import save_tiny, tiny_model

CLIP = "samples/square.mp4"
LAYERS = 12
LINEAR = tuple(layer for layer in range(LAYERS) if layer % 4 != 3)
# The number of layers that run before each drop.
DROPS = {
    "fastv": [4], "d2pruner": [4], "prunevid-inner": [4], "holitom-inner": [8], "flashvid-inner": [8], "nuwa-inner": [8],
    "pyramiddrop": [3, 7, 11], "sparsevlm": [4, 8], "vitcop": [4, 8],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        deepen(patch)
        yield save_tiny(tmp_path_factory.mktemp("deep"), family="qwen3_5")


@pytest.fixture(scope="module")
def host():
    with pytest.MonkeyPatch.context() as patch:
        deepen(patch)
        yield tiny_model(family="qwen3_5")


def deepen(patch):
    kinds = ["linear_attention" if layer in LINEAR else "full_attention" for layer in range(LAYERS)]
    patch.setattr(tiny, "QWEN3_5_TEXT", tiny.QWEN3_5_TEXT | {"num_hidden_layers": LAYERS, "layer_types": kinds})


@pytest.fixture
def passes(monkeypatch):
    """Record the prompts that are read: their embeddings, positions, and sizes, and the columns that stay after each drop."""
    found = []
    prefill, after = LanguageModel.prefill, Dropping.after

    def watched_prefill(self, embeds, positions, following, cache=None, sizes=None, *args, **kwargs):
        found.append({"embeds": embeds, "positions": positions, "following": following, "sizes": sizes, "stays": {}})
        return prefill(self, embeds, positions, following, cache, sizes, *args, **kwargs)

    def watched_after(self, state, deepstack):
        x, deepstack, stay = after(self, state, deepstack)
        if stay is not None:
            found[-1]["stays"][state.after] = stay, x.clone()
        return x, deepstack, stay

    monkeypatch.setattr(LanguageModel, "prefill", watched_prefill)
    monkeypatch.setattr(Dropping, "after", watched_after)
    return found


@torch.no_grad()
def reference(host, read: dict, answer: list[int]) -> torch.Tensor:
    """Return the logits that predict each token of an answer, from transformers' layers and everything read at once.

    Methods that merge tokens change the remaining ones, so the remaining hidden states are taken from the pass under test.
    """
    text = host.model.language_model
    new = text.embed_tokens(torch.tensor(answer[:-1], dtype=torch.int64))
    x = torch.cat([read["embeds"], new])
    after = (read["following"] + torch.arange(len(new))).expand(3, -1)
    places = torch.cat([read["positions"], after], 1)
    sizes = torch.ones(len(x))
    if read["sizes"] is not None:
        sizes[: len(read["sizes"])] = read["sizes"]
    for number, layer in enumerate(text.layers):
        if number in read["stays"]:
            stay, merged = read["stays"][number]
            prompt = len(x) - len(new)
            assert_near(merged[-1], x[prompt - 1])
            stay = torch.cat([stay, torch.arange(prompt, len(x))])
            x, places, sizes = torch.cat([merged, x[prompt:]]), places[:, stay], sizes[stay]
        mask = None
        if number not in LINEAR:
            mask = (
                sizes.log()
                .expand(len(x), -1)
                .masked_fill(torch.ones(len(x), len(x)).triu(1) > 0, -torch.inf)[None, None]
            )
        turns = text.rotary_emb(x[None], places[:, None])
        x = layer(x[None], position_embeddings=turns, attention_mask=mask)[0]
    return host.lm_head(text.norm(x[-len(answer) :]))


def assert_near(made, expected):
    torch.testing.assert_close(made, expected, atol=3e-3, rtol=1e-3)


@pytest.fixture
def load(folder):
    def load(method, budget=0.4):
        return VideoQA.load(str(folder), dtype="fp32", method=method, budget=budget)

    return load


def assert_same(host, read, answer):
    """Check that every token of an answer is the most likely one for the reference, except where two are equally likely."""
    ids = list(answer.ids)
    logits = reference(host, read, ids)
    chosen = logits[torch.arange(len(ids)), torch.tensor(ids)]
    assert ids and (logits.amax(1) - chosen).max() < 1e-3
    return logits


@pytest.mark.few(3)
@pytest.mark.parametrize("name", [*DROPS, "evoprune+fastv", "evoprune+pyramiddrop"])
def test_every_method_drops_tokens_after_layers_with_attention(name, load, host, passes):
    video = load(name).encode(CLIP, frames=8)
    answer = video.ask("What colour is the square?", max_new_tokens=6)
    assert answer.text is not None
    read = passes[-1]
    assert [*read["stays"]] == DROPS[name.removeprefix("evoprune+")]
    expected = assert_same(host, read, answer)
    logits, _ = video.read_along("What colour is the square?", answer.ids)
    assert_near(logits, expected)
    lengths = [tokens for _, tokens in answer.report.pruning.language_layers]
    assert lengths[0] == answer.report.pruning.visual_tokens_kept and lengths[-1] < lengths[0]
    mean = sum(lengths[DROPS[name][0] :]) / len(lengths[DROPS[name][0] :]) if name in DROPS else 0
    assert mean <= 0.4 * lengths[0] + 1


def test_images_several_inputs_and_conversations(load, host, passes, tmp_path):
    picture = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)).save(picture)
    qa = load("fastv")
    for inputs in ([picture], [picture, CLIP], [CLIP, picture, picture]):
        video = qa.encode(inputs, frames=4)
        answer = video.ask("What happens?", max_new_tokens=4)
        assert answer.text is not None
        assert_same(host, passes[-1], answer)
    chat = qa.encode(CLIP, frames=8).chat()
    lengths = []
    for question in ("What colour is the square?", "And the circle?"):
        answer = chat.ask(question, max_new_tokens=4)
        assert answer.text is not None
        assert_same(host, passes[-1], answer)
        lengths.append(len(passes[-1]["embeds"]))
    assert lengths == sorted(set(lengths))


@pytest.mark.parametrize("name", ["visipruner", "evoprune+visipruner", "operations"])
def test_methods_that_change_the_attention_of_every_layer_are_refused(name, folder, tmp_path):
    from tests.recipes import TINY, write_recipe

    name = name.replace("operations", write_recipe(tmp_path, TINY))
    with pytest.raises(UsageError, match="needs attention in every layer") as caught:
        VideoQA.load(str(folder), dtype="fp32", method=name)
    assert "fastv" in caught.value.hint


class Late(LanguageMethod):
    """Drops tokens after the last layer but one."""

    name = "late"

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return LanguagePlan.of(depth, tokens, {depth - 1: 1})


def test_drops_move_to_the_next_place_or_to_the_last_one():
    plan = Late().plan(LAYERS, 100, 0.5, LINEAR)
    assert [(drop.after, drop.left) for drop in plan.drops] == [(8, 1)] and plan.looks == (8,)
    assert Late().plan(LAYERS, 100, 0.5).looks == (11,)
    with pytest.raises(UsageError, match="next to an attention layer"):
        Late().plan(4, 100, 0.5, (0, 1, 2))


class Steps(LanguageMethod):
    name = "steps"

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return several_drops(depth, tokens, (0.1, 0.5), lambda share: (share, share**2), budget)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("tokens", [1, 7, 1000])
def test_moved_drops_meet_the_budget(budget, tokens):
    plain, moved = Steps().plan(24, tokens, budget), Steps().plan(24, tokens, budget, range(0, 24, 2))
    assert moved.mean <= plain.mean
    if tokens == 1000 and budget < 1:
        assert moved.mean == pytest.approx(plain.mean, rel=0.02)


def test_the_memory_estimate_knows_where_drops_are():
    chain = MethodChain.parse("fastv")
    assert chain.prompt_columns(LAYERS, 100, 7, 0.25, LINEAR) == (*[107] * 4, *[32] * 8)
    assert chain.prompt_columns(LAYERS, 100, 7, 0.25) == (107, *[32] * 11)

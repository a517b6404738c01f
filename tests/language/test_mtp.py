"""Compare the drafts of the layer for multi-token prediction with its formula, and answers with and without these drafts."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from evoprune import VideoQA
from evoprune.backend import Quantization
from evoprune.language import GenerationOptions, LanguageModel, TokenStream, mtp, mtp_drafter
from evoprune.language.generate import PrefillState
from tests import tiny
from tests.live.test_stream import fed
from tests.loading import load_model
from tests.quantized import parameters
from tests.tiny import save_tiny

CLIP, OTHER = "samples/square.mp4", "samples/flash.mp4"
PROMPT, NEXT, NEW = 30, 41, 24


@pytest.fixture(scope="module", params=["qwen3_5", "qwen3_5_moe"])
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.QWEN3_5_TEXT, "head_dim", 32)  # row-major weights need multiples of 32
        yield save_tiny(tmp_path_factory.mktemp(request.param), family=request.param, mtp=True)


@pytest.fixture
def drafts(monkeypatch):
    """All tokens that the layer drafts, by the number of answer tokens before them. The layer never stops drafting."""
    found = {}
    draft = mtp_drafter.MtpDrafter.draft

    def recorded(self, answer, most):
        made = draft(self, answer, most)
        if made:
            found[len(answer)] = made
        return made

    monkeypatch.setattr(mtp_drafter.MtpDrafter, "draft", recorded)
    monkeypatch.setattr(mtp_drafter, "LEAST", 0.0)
    return found


def prompt_of(language):
    ids = torch.arange(5, 5 + PROMPT)
    positions = torch.arange(PROMPT).expand(3, -1) + (NEXT - PROMPT)
    return language.embed(ids), positions, ids


def answer_of(language, new=NEW):
    embeds, positions, ids = prompt_of(language)
    state = language.prefill(embeds, positions, NEXT)
    state.prompt_ids = ids
    return list(TokenStream(state, GenerationOptions(max_new_tokens=new), ()))


def hidden_along(language, answer):
    """Return the final hidden states of the last prompt column and all answer columns, read in a single pass."""
    embeds, positions, _ = prompt_of(language)
    embeds = torch.cat([embeds, language.embed(torch.tensor(answer))])
    positions = torch.cat([positions, torch.arange(NEXT, NEXT + len(answer)).expand(3, -1)], 1)
    return language.forward(embeds, positions, language.new_cache(len(embeds)), last=len(answer) + 1)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


def turned(x, positions, theta=1e6):
    """Rotate the first half of each head's features, `[L, heads, dim]`. All three positions of a column are equal."""
    wide = x.shape[-1] // 4
    angles = positions[:, None, None] * theta ** (-torch.arange(wide) / wide)
    first, second, rest = x.split([wide, wide, x.shape[-1] - 2 * wide], -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def mlp_of(weights, x, experts=2):
    """Return the output of a layer's MLP, or of its router, experts, and shared expert."""

    def gated(prefix, x):
        gate, up, down = (weights[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T

    if "mlp.gate.weight" not in weights:
        return gated("mlp", x)
    share = (x @ weights["mlp.shared_expert_gate.weight"].T).sigmoid()
    out = share * gated("mlp.shared_expert", x)
    scores, chosen = (x @ weights["mlp.gate.weight"].T).softmax(-1).topk(experts)
    for row in range(len(x)):
        for score, expert in zip(scores[row] / scores[row].sum(), chosen[row], strict=True):
            gate, up = weights["mlp.experts.gate_up_proj"][expert].chunk(2)
            out[row] += score * (
                (F.silu(x[row] @ gate.T) * (x[row] @ up.T)) @ weights["mlp.experts.down_proj"][expert].T
            )
    return out


def predicted(folder, hidden, answer):
    """Return the token that the layer predicts after each answer token, from the published formulas."""
    weights = load_file(folder / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    embed = weights["model.language_model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embed)
    own = {name.removeprefix("mtp."): each for name, each in weights.items() if name.startswith("mtp.")}
    layer = {name.removeprefix("layers.0."): each for name, each in own.items() if name.startswith("layers.0.")}
    count, dim, heads = len(answer), text["head_dim"], text["num_attention_heads"]
    positions = torch.arange(count) + NEXT - 1
    following = rms(embed[torch.tensor(answer)], own["pre_fc_norm_embedding.weight"])
    x = torch.cat([following, rms(hidden[:count], own["pre_fc_norm_hidden.weight"])], 1) @ own["fc.weight"].T
    h = rms(x, layer["input_layernorm.weight"])
    queries, gate = (h @ layer["self_attn.q_proj.weight"].T).view(count, heads, 2 * dim).chunk(2, -1)
    keys, values = ((h @ layer[f"self_attn.{name}_proj.weight"].T).view(count, -1, dim) for name in "kv")
    queries = turned(rms(queries, layer["self_attn.q_norm.weight"]), positions)
    keys = turned(rms(keys, layer["self_attn.k_norm.weight"]), positions)
    keys, values = (each.repeat_interleave(heads // keys.shape[1], 1) for each in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", queries, keys) * dim**-0.5
    hidden_keys = torch.ones(count, count, dtype=torch.bool).triu(1)
    seen = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden_keys, -torch.inf).softmax(-1), values)
    x = x + (seen * gate.sigmoid()).flatten(1) @ layer["self_attn.o_proj.weight"].T
    x = x + mlp_of(layer, rms(x, layer["post_attention_layernorm.weight"]))
    return (rms(x, own["norm.weight"]) @ head.T).argmax(-1).tolist()


def test_drafts_are_those_of_the_formula(folder, drafts):
    language = load_model(str(folder), dtype="fp32").language
    answer = answer_of(language)
    assert [*drafts] == [*range(1, NEW - 1)]
    expected = predicted(folder, hidden_along(language, answer), answer)
    assert drafts == {length: [expected[length - 1]] for length in drafts}
    assert len({token for (token,) in drafts.values()}) > 5


@pytest.mark.parametrize("kind", parameters("none", "int8", "int4"))
@pytest.mark.parametrize("wrong_at", [1, 3, 100])
def test_accepted_and_rejected_drafts(folder, kind, wrong_at, monkeypatch):
    """Whether drafts are accepted or not, the layer reads each column of the answer with its own state and next token.

    It skips columns before a near tie, for which another pass replaces the latest one.
    """
    qa = VideoQA.load(str(folder), dtype="fp32", quantize=kind)
    language = qa.loaded.language
    monkeypatch.setattr(LanguageModel, "mtp_layer", lambda self: None)
    expected = answer_of(language)
    monkeypatch.undo()
    hidden = hidden_along(language, expected)
    passes, seen = [], []
    read = PrefillState.read

    def logits(self, states, following, positions):
        first = int(positions[0, 0]) - NEXT + 1
        end = first + len(following)
        assert first > max(seen, default=-1) and following.tolist() == expected[first:end]
        assert torch.equal(positions, torch.arange(first, end).expand(3, -1) + NEXT - 1)
        if kind == "none":  # a prompt and an answer are quantized differently
            torch.testing.assert_close(states, hidden[first:end], rtol=1e-3, atol=1e-3)
        seen.extend(range(first, end))
        return F.one_hot(torch.tensor(expected[end] if end % wrong_at else (expected[end] + 1) % 400), 500).float()

    monkeypatch.setattr(mtp.MtpLayer, "logits", logits)
    monkeypatch.setattr(mtp_drafter, "LEAST", 0.0)
    monkeypatch.setattr(PrefillState, "read", lambda self, ids: passes.append(len(ids)) or read(self, ids))
    assert answer_of(language) == expected
    assert passes.count(2) > 5 and len(seen) >= NEW - 4
    assert (len(passes) <= NEW // 2 + 2) is (wrong_at == 100)  # near ties take a second pass


def test_drafting_stops_where_it_does_not_pay(folder, drafts, monkeypatch):
    monkeypatch.setattr(mtp_drafter, "LEAST", 0.5)
    language = load_model(str(folder), dtype="fp32").language
    answer_of(language, 60)
    assert max(drafts) < mtp_drafter.TRIAL + 5  # random layers predict nothing

    drafter = mtp_drafter.MtpDrafter(None, None)
    stops = []
    for number in range(40):
        drafter.verified(number % 2)
        stops.append(drafter.stops)
    assert (
        not any(stops[1::2])
        and stops[: mtp_drafter.TRIAL - 1] == [False] * (mtp_drafter.TRIAL - 1)
        and stops[mtp_drafter.TRIAL]
    )


def asks(qa, tmp_path):
    """Yield the tokens of answers in every kind of run."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)).save(photo)
    more = {"max_new_tokens": 20}

    def tokens(answer):
        return [*answer], answer.ids

    video = qa.encode(CLIP, frames=4)
    yield tokens(video.ask("What happens?", **more))
    yield tokens(video.ask("Yes. No. Yes. No. Yes. No. What colour?", **more))
    yield tokens(qa.encode(str(photo)).ask("What happens?", **more))
    yield tokens(qa.encode([CLIP, OTHER], frames=4).ask("Which one moves?", **more))
    chat = video.chat()
    for question in ("What happens?", "When does it stop?", "How many?"):
        yield tokens(chat.ask(question, **more))
    with fed(qa.stream(window_s=2.0), 5) as stream:
        yield tokens(stream.ask("What happens?", **more))
        fed(stream, 3, start=5.0)
        yield tokens(stream.ask("And now?", **more))


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", parameters("none", "int8", "int4"))
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_answers_are_the_same_without_the_layer(folder, kind, budget, drafts, tmp_path, monkeypatch):
    qa = VideoQA.load(str(folder), dtype="fp32", quantize=kind, budget=budget)
    monkeypatch.setattr(qa.loaded, "eos_ids", ())
    made = list(asks(qa, tmp_path))
    assert len(drafts) > 10 and all(len(ids) == 20 for _, ids in made)
    monkeypatch.setattr(LanguageModel, "mtp_layer", lambda self: None)
    drafts.clear()
    assert list(asks(qa, tmp_path)) == made and not drafts


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_a_second_start_reads_the_stored_layer(folder, kind, drafts, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        loaded = load_model(str(folder), quantize=kind, dtype="fp32", store_quantized=True)
        assert (loaded.quantized_file is not None) is not bool(found)
        layers = Quantization(kind).layers(loaded.model)
        assert not layers and not isinstance(loaded.model.mtp.fc, torch.nn.Linear)  # all layers are quantized
        drafts.clear()
        found.append((answer_of(loaded.language), dict(drafts), loaded.weights_bytes))
    assert found[0] == found[1] and found[0][1]

"""Compare a decoder layer's fused kernels, and layers that use them, with the plain operations.

Without a GPU, the kernels run in Triton's interpreter. The interpreter truncates numbers when it converts them to bf16, so the
tests use fp16, which reveals the points at which a kernel rounds just as well.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evoprune.backend import devices, layers
from evoprune.backend.attention import Attention
from evoprune.errors import DeviceWarning
from evoprune.language import decoder, static
from evoprune.model import Config, QwenVL, norm, rotate
from tests.tiny import NATIVE, tiny_config, tiny_model

JOINED = [family for family in NATIVE if family != "qwen3_5"]  # families whose weights are joined
CONFIG = SimpleNamespace(rms_norm_eps=1e-6)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


@pytest.fixture(scope="module")
def fast():
    pytest.importorskip("triton")
    from evoprune.backend import kernels

    return kernels


@pytest.fixture
def used(fast, monkeypatch):
    for module in ("decoder", "hybrid"):
        place = f"evoprune.language.{module}.kernels_for"
        monkeypatch.setattr(place, lambda device: None if devices.failed("layers") else fast)
    monkeypatch.setattr(devices, "_failed", set())


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_equal(made, expected):
    """Check that values agree except for the summation order. In 16 bits, a few of them may differ by one rounding step."""
    near = {torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}[made.dtype]
    assert made.dtype == expected.dtype
    torch.testing.assert_close(made, expected, atol=near, rtol=near)
    assert (made != expected).float().mean() < 0.03 or made.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "wide"), [(1, 64), (3, 100), (2, 2048)])
def test_sum_and_norm(fast, dtype, rows, wide):
    x, plus, weight = (
        random(rows, wide, dtype=dtype),
        random(rows, wide, seed=1, dtype=dtype),
        random(wide, dtype=dtype),
    )
    total, made = fast.add_norm(x, plus, weight, 1e-6)
    assert torch.equal(total, x + plus)
    assert_equal(made, norm(x + plus, weight, CONFIG))
    same, made = fast.add_norm(x, None, weight, 1e-6)
    assert same is x
    assert_equal(made, norm(x, weight, CONFIG))
    gain = random(wide, seed=2)
    total, made = fast.add_norm(x, plus, gain, 1e-6, rounds=False)
    expected = F.rms_norm((x + plus).float(), (wide,), gain, 1e-6).to(dtype)
    assert_equal(made, expected)
    assert (made != expected).float().mean() < 0.005 or dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [16, 1500])
def test_gate(fast, dtype, wide):
    x = random(3, 2 * wide, dtype=dtype) * 4
    assert_equal(fast.silu_times(x), F.silu(x[:, :wide]) * x[:, wide:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "dim", "more", "column"), [(1, 16, 8, 5), (4, 24, 0, None), (3, 16, 8, 2)])
def test_rotation_and_its_places(fast, dtype, normed, rows, dim, more, column):
    heads, kv_heads = 4, 2
    x, angles = random(rows, (heads + 2 * kv_heads) * dim, dtype=dtype), random(rows, dim // 2, seed=1)[:, None]
    cos, sin = (torch.cat(each, -1).to(dtype) for each in ([angles.cos()] * 2, [-angles.sin(), angles.sin()]))
    weights = (random(dim, seed=2, dtype=dtype), random(dim, seed=3, dtype=dtype)) if normed else None
    q, k, v = x.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
    if normed:
        q, k = norm(q, weights[0], CONFIG), norm(k, weights[1], CONFIG)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys, values = torch.zeros(2, kv_heads, 9, dim + more, dtype=dtype, device=DEVICE)
    at = None if column is None else torch.tensor([column], device=DEVICE)
    made = fast.rotate_put(x, (cos, sin), weights, 1e-6, heads, keys, values, at, more)
    assert made.shape == (1, rows, heads, dim + more)
    assert_equal(made[0, ..., :dim], q)
    assert (made[..., dim:] == 1).all()
    here = slice(column or 0, (column or 0) + rows)
    for held, given in ((keys, k), (values, v)):
        assert_equal(held[:, here, :dim], given.transpose(0, 1))
        held[:, here, :dim] = 0
        assert not held.any()


@pytest.mark.parametrize("family", JOINED)
def test_joined_weights_are_the_same_weights(family):
    model = QwenVL(Config.parse(tiny_config(family).to_dict()))
    model.to_empty(device="cpu").requires_grad_(False)
    for number, weight in enumerate(model.parameters()):
        weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(number))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers.join(model)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    layer = model.model.language_model.layers[0]
    weight, bias = layers.joined(layer.self_attn)
    x = random(2, 64).cpu()
    joined = F.linear(x, weight, bias)
    each = [getattr(layer.self_attn, f"{name}_proj")(x) for name in "qkv"]
    torch.testing.assert_close(joined, torch.cat(each, 1))
    layer.mlp.gate_proj.weight = torch.nn.Parameter(torch.ones(128, 64))
    assert layers.joined(layer.mlp) is None  # these weights have been replaced
    assert layers.joined(model.model.language_model.layers[1].mlp) is not None


@pytest.mark.parametrize("family", JOINED)
def test_layers_of_fused_kernels(family, used):
    model = tiny_model(family=family).to(DEVICE)
    embeds, positions = random(30, 64), torch.randint(0, 40, (3, 30))
    counts = torch.randint(1, 9, (30,)).float().to(DEVICE)

    def made():
        cache = decoder.KVCache(model, 4)
        for start, end in ((0, 20), (20, 29), (29, 30)):
            logits = decoder.logits(model, embeds[start:end], positions[:, start:end], cache, counts[start:end])
        return logits, cache

    expected, _ = made()
    layers.join(model)
    with pytest.MonkeyPatch.context() as patch:
        for name in "qkv":  # the top layer reads one query column, and the other layers compute as before
            top = model.model.language_model.layers[0].self_attn
            patch.setattr(top.get_submodule(f"{name}_proj"), "forward", lambda x: pytest.fail("a layer by itself"))
        logits, cache = made()
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        with torch.inference_mode():
            held = static.new_cache(model, 64)
            held.fill(cache, 50, 64)
            held.token.fill_(7)
            static.step(model, held)
        after = decoder.logits(
            model, model.get_input_embeddings()(torch.tensor([7], device=DEVICE)), torch.full((3, 1), 50), cache
        )
    torch.testing.assert_close(held.logits[None], after, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("error")
def test_a_kernel_that_fails_is_said_once(used, fast, monkeypatch):
    model = tiny_model().to(DEVICE)
    embeds, positions = random(9, 64), torch.arange(9).expand(3, -1)
    expected = decoder.logits(model, embeds, positions, decoder.KVCache(model, 9))
    layers.join(model)

    def fails(*_, **__):
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(fast, "rotate_put", fails)
    with pytest.warns(DeviceWarning, match=r"without fused kernels.*: no such instruction$"):
        made = decoder.logits(model, embeds, positions, decoder.KVCache(model, 9))
    assert torch.equal(made, expected)
    assert torch.equal(decoder.logits(model, embeds, positions, decoder.KVCache(model, 9)), expected)


def test_a_cpu_has_no_kernels(monkeypatch):
    assert layers.kernels_for(torch.device("cpu")) is None
    monkeypatch.setenv("EVOPRUNE_PLAIN", "1")
    assert layers.kernels_for(torch.device("cuda")) is None


# Which kernel computes causal attention, and its result.


def test_a_whole_prompt_and_its_end():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16, generator=random) for _ in range(3))
    whole = Attention.of(q).causal(q, k, v, None)
    weights = (q @ k.transpose(2, 3) / 4).masked_fill(~torch.ones(20, 20).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(whole, weights @ v)
    assert Attention.of(q).causal(q[:, :, 5:], k, v, None) is None  # on a CPU a mask is just as good


@pytest.mark.cuda
@pytest.mark.parametrize("dim", [128, 136])
@pytest.mark.parametrize("rows", [2, 64, 500, 700])
def test_the_end_of_a_prompt_on_a_gpu(rows, dim):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, 700, dim, generator=random).to("cuda", torch.bfloat16) for _ in range(3))
    k, v = k.expand(-1, 8, -1, -1), v.expand(-1, 8, -1, -1)
    q = q.repeat(1, 8, 1, 1)[:, :, 700 - rows :]
    made = Attention.of(q).causal(q, k, v, 0.1)
    scores = (q.float() @ k.float().transpose(2, 3) * 0.1).masked_fill(
        ~torch.ones(rows, 700, device="cuda").tril(700 - rows).bool(), -torch.inf
    )
    assert made is not None
    torch.testing.assert_close(made.float(), scores.softmax(-1) @ v.float(), atol=0.02, rtol=0.02)

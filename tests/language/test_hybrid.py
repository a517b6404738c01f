"""Compare evoprune's linear attention layers with transformers' modules that have the same weights."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend import Quantization, devices
from evoprune.errors import DeviceWarning
from evoprune.language import GenerationOptions, LanguageModel, TokenStream, hosted, hybrid
from evoprune.model import Config, HostedVL
from tests import tiny
from tests.backend.failures import forget_failures
from tests.tiny import tiny_model

PARTS = [(1,), (63,), (64,), (65,), (200,), (130, 27), (5, 64, 1, 3), (2, 1, 1)]


def load(family="qwen3_5") -> HostedVL:
    """Return a small random model whose norms multiply every feature by a different factor."""
    host, random = tiny_model(family=family), torch.Generator().manual_seed(1)
    for name, weight in host.named_parameters():
        if "norm" in name and name.endswith("weight"):
            weight.data += torch.randn(weight.shape, generator=random) / 4
    config = Config.parse(host.config.to_dict())
    return HostedVL(config, host.model.visual, host.model.language_model, host.lm_head).requires_grad_(False)


@pytest.fixture
def model():
    return load()


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: False)
    monkeypatch.setattr(Quantization, "delta_rule", lambda device, values: None)


def columns(count, seed=0, scale=1.0):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) * scale


def read(model, parts, x, sizes=None):
    """Read columns in parts, and return their hidden states and the final state of the cache."""
    cache, hidden = hosted.HostedCache(model), []
    at = torch.arange(len(x)).expand(3, -1)
    start = 0
    for count in parts:
        part = slice(start, start + count)
        given = None if sizes is None else sizes[part]
        hidden.append(hosted.forward(model, x[part].to(model.dtype), at[:, part], cache, given, last=count))
        start += count
    return torch.cat(hidden), cache.states


def as_transformers(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoprune.backend.hosted.is_host", lambda device: True)
        return read(*args)


def assert_near(made, expected):
    """Allow for rounding errors in the inputs' last bit: differences of at most 6e-4, and 5e-6 on average."""
    assert made.isfinite().all()
    assert (made - expected).abs().max() < 6e-4 and (made - expected).abs().mean() < 5e-6


def assert_states(made, expected):
    for ours, theirs in zip(made.layers, expected.layers, strict=True):
        for name in ("conv_states", "recurrent_states", "keys", "values"):
            one, other = getattr(ours, name, None), getattr(theirs, name, None)
            pairs = [(one[0], other[0])] if isinstance(one, dict) else [(one, other)]
            for a, b in pairs:
                assert (a is None) == (b is None)
                if a is not None:
                    assert a.dtype == b.dtype
                    torch.testing.assert_close(a, b, atol=6e-4, rtol=1e-4)


@pytest.mark.few(8)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_hidden_states_and_caches_are_those_of_transformers(family, parts, sized, elsewhere):
    model = load(family)
    x = columns(sum(parts))
    sizes = torch.randint(1, 9, (len(x),), generator=torch.Generator().manual_seed(1)).float() if sized else None
    expected, theirs = as_transformers(model, parts, x, sizes)
    made, ours = read(model, parts, x, sizes)
    assert_near(made, expected)
    assert_states(ours, theirs)


@pytest.mark.parametrize(
    "heads", [{"linear_num_key_heads": 1, "linear_num_value_heads": 3}, {"linear_num_value_heads": 2}], ids=str
)
def test_heads_may_share_keys_or_not(heads, elsewhere, monkeypatch):
    for name, value in heads.items():
        monkeypatch.setitem(tiny.QWEN3_5_TEXT, name, value)
    model, x = load(), columns(70)
    assert_near(read(model, (70,), x)[0], as_transformers(model, (70,), x)[0])


def test_long_prompts_are_read_in_strips(model, elsewhere, monkeypatch):
    monkeypatch.setattr(hybrid, "STRIP", 64)
    x = columns(200)
    made, ours = read(model, (200,), x)
    expected, theirs = as_transformers(model, (200,), x)
    assert_near(made, expected)
    assert_states(ours, theirs)


def test_decays_of_any_size(model, elsewhere):
    """Some states are forgotten immediately and others never, and there are columns of zeros in between."""
    x = columns(150)
    x[20:40] = 0
    for delta in (layer.linear_attn for layer in model.model.language_model.layers if hasattr(layer, "linear_attn")):
        delta.A_log.copy_(torch.tensor([6.0, -12.0, 0.0, 3.0]))
        delta.dt_bias.copy_(torch.tensor([50.0, -50.0, 1.0, 4.0]))
    made, expected = read(model, (100, 50), x)[0], as_transformers(model, (100, 50), x)[0]
    assert_near(made, expected)


def test_in_bf16_it_is_as_exact_as_transformers(elsewhere):
    exact, model, x = load(), load().bfloat16(), columns(150).bfloat16().float()
    expected = as_transformers(exact, (150,), x)[0]
    made, theirs = read(model, (100, 50), x)[0], as_transformers(model, (100, 50), x)[0]
    assert made.dtype == torch.bfloat16
    assert (made - expected).abs().mean() < 1.1 * (theirs - expected).abs().mean()


def test_an_answer_is_that_of_transformers_modules(model, elsewhere):
    def answer():
        state = LanguageModel(model).prefill(columns(90), torch.arange(90).expand(3, -1), 90)
        return list(TokenStream(state, GenerationOptions(max_new_tokens=12), ()))

    made = answer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoprune.backend.hosted.is_host", lambda device: True)
        assert answer() == made
    assert len(set(made)) > 1


def test_a_cpu_and_models_without_linear_attention_run_the_modules(monkeypatch):
    monkeypatch.setattr(hybrid, "run", None)
    read(load(), (5,), columns(5))
    monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: False)
    read(load("qwen3_vl_moe"), (5,), columns(5))


def test_without_kernels_it_runs_the_modules(model, elsewhere, monkeypatch):
    monkeypatch.setattr(hybrid, "run", None)
    with devices.plain_pytorch():
        read(model, (5,), columns(5))


@pytest.mark.parametrize("fails", [False, True])
def test_norms_take_the_kernel_while_it_works(fails, model, elsewhere, monkeypatch):
    kernels = pytest.importorskip("evoprune.backend.kernels", reason="Triton is missing")
    calls = []

    class Counted:
        give_up = staticmethod(kernels.give_up)

        @staticmethod
        def add_norm(*args, **kwargs):
            calls.append(kwargs)
            if fails:
                raise RuntimeError("no such kernel")
            return kernels.add_norm(*args, **kwargs)

    forget_failures(monkeypatch)
    monkeypatch.setattr(hybrid, "kernels_for", lambda device: None if devices.failed("layers") else Counted)
    x, expected = columns(20), as_transformers(model, (20,), columns(20))[0]
    if fails:
        with pytest.warns(DeviceWarning, match="no such kernel"):
            made = read(model, (20,), x)[0]
    else:
        made = read(model, (20,), x)[0]
    assert_near(made, expected)
    assert len(calls) == (1 if fails else 13 + 4)


def test_the_kernel_reads_what_is_not_contiguous(model, elsewhere, monkeypatch):
    kernels = pytest.importorskip("evoprune.backend.kernels", reason="Triton is missing")
    monkeypatch.setattr(hybrid, "kernels_for", lambda device: kernels)
    x, expected = columns(20), as_transformers(model, (20,), columns(20))[0]
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda *args: args[2].mT.contiguous().mT)
    assert_near(read(model, (20,), x)[0], expected)


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = any(a.alias_info and not a.alias_info.is_write for a in func._schema.arguments)
        self.count += not (views or "view" in str(func))
        return func(*args, **(kwargs or {}))


def test_fewer_operations_than_in_transformers(model, elsewhere):
    def count():
        with Operations() as seen, torch.no_grad():
            read(model, (130,), columns(130))
        return seen.count

    ours = count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoprune.backend.hosted.is_host", lambda device: True)
        assert ours < 0.75 * count()


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_on_a_gpu(family):
    """The results on the GPU are compared with those of transformers' modules on the CPU."""
    model, x = load(family), columns(157)
    expected, theirs = read(model, (130, 27), x)
    made, ours = read(model.cuda(), (130, 27), x.cuda())
    assert (made.cpu() - expected).abs().max() < 2e-3
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        if hasattr(one, "recurrent_states"):
            torch.testing.assert_close(one.recurrent_states[0].cpu(), other.recurrent_states[0], atol=2e-3, rtol=1e-3)

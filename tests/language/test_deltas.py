"""Compare evoprune's own layers of models with Gated DeltaNets with transformers' modules that have the same weights."""

import pytest
import torch

from evoprune.backend import Quantization
from evoprune.language import GenerationOptions, LanguageModel, PrefillState, TokenStream, decoder, hybrid
from evoprune.model import Config, QwenVL
from tests import tiny
from tests.language.test_hybrid import columns, load

PARTS = [(1,), (8,), (9,), (63,), (64,), (65,), (200,), (130, 27), (5, 64, 1, 3), (1,) * 12, (2,) * 40]


def assert_near(made, expected):
    """Allow for rounding errors, which random layers amplify: differences of at most 2e-3, and 2e-5 on average."""
    assert made.isfinite().all()
    assert (made - expected).abs().max() < 2e-3 and (made - expected).abs().mean() < 2e-5


def own(host) -> QwenVL:
    model = QwenVL.empty(host.config)
    model.load_state_dict(host.state_dict(), assign=True)
    model.tie()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def host():
    return load()


@pytest.fixture(scope="module")
def model(host):
    return own(host)


@pytest.fixture(params=["as on a CPU", "without a library", "as on a GPU"])
def path(request, monkeypatch):
    on_a_cpu = request.param != "as on a GPU"
    if request.param != "as on a CPU":
        monkeypatch.setattr(Quantization, "delta_rule", lambda device, values: None)
    monkeypatch.setattr("evoprune.backend.form_of_layers", lambda device, few, modules: modules if on_a_cpu else few)


def places(count: int) -> torch.Tensor:
    """Return positions of which time, height, and width differ."""
    each = torch.arange(count)
    return torch.stack([each, each + each % 7, each + each % 5])


def read(model, parts, x, sizes=None, cache=None) -> tuple[torch.Tensor, object]:
    """Read columns in parts, and return their hidden states and the cache."""
    language = LanguageModel(model)
    cache = cache or language.new_cache(1)
    hidden, start = [], 0
    for count in parts:
        part = slice(start, start + count)
        given = None if sizes is None else sizes[part]
        at = places(len(x))[:, part]
        hidden.append(language.forward(x[part].to(model.dtype), at, cache, given, last=count))
        start += count
    return torch.cat(hidden), cache


def counts(count: int) -> torch.Tensor:
    return torch.randint(1, 9, (count,), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.few(12)
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_hidden_states_are_those_of_transformers(host, model, parts, sized, path):
    x = columns(sum(parts))
    sizes = counts(len(x)) if sized else None
    made, cache = read(model, parts, x, sizes)
    assert_near(made, read(host, (len(x),), x, sizes)[0])
    assert cache.length == len(x)


@pytest.mark.parametrize(
    "settings",
    [
        {"linear_num_key_heads": 1, "linear_num_value_heads": 3},
        {"linear_num_value_heads": 2},
        {"linear_conv_kernel_dim": 2},
        {"layer_types": ["full_attention"] * 6},
        {"layer_types": ["full_attention"] + ["linear_attention"] * 5},
    ],
    ids=str,
)
def test_layers_of_other_kinds(settings, monkeypatch, path):
    for name, value in settings.items():
        monkeypatch.setitem(tiny.QWEN3_5_TEXT, name, value)
    host, x = load(), columns(70)
    assert_near(read(own(host), (60, 1, 9), x)[0], read(host, (70,), x)[0])


def test_long_prompts_are_read_in_strips(host, model, monkeypatch, path):
    monkeypatch.setattr(hybrid, "STRIP", 64)
    monkeypatch.setattr(decoder, "MASK_STRIP", 128)
    x = columns(300)
    assert_near(read(model, (150, 150), x)[0], read(host, (300,), x)[0])
    assert_near(read(model, (150, 150), x, counts(300))[0], read(host, (300,), x, counts(300))[0])


def test_decays_of_any_size(path):
    """Some states are forgotten immediately and others never, and there are columns of zeros in between."""
    host, x = load(), columns(150)
    x[20:40] = 0
    for delta in (layer.linear_attn for layer in host.model.language_model.layers if hasattr(layer, "linear_attn")):
        delta.A_log.copy_(torch.tensor([6.0, -12.0, 0.0, 3.0]))
        delta.dt_bias.copy_(torch.tensor([50.0, -50.0, 1.0, 4.0]))
    assert_near(read(own(host), (100, 1, 49), x)[0], read(host, (150,), x)[0])


def test_in_bf16_it_is_as_exact_as_transformers(host, path):
    x = columns(150).bfloat16().float()
    rounded = load().bfloat16()
    expected, theirs = read(host, (150,), x)[0], read(rounded, (150,), x)[0]
    made = read(own(rounded), (100, 1, 49), x)[0]
    assert made.dtype == torch.bfloat16
    assert (made - expected).abs().mean() < 1.1 * (theirs - expected).abs().mean()


def test_a_few_columns_can_be_cropped(model):
    x = columns(90)
    expected = read(model, (80, 1, 1, 1, 1, 1), x)[0]
    _, cache = read(model, (80,), x)
    language, at = LanguageModel(model), places(len(x))
    assert cache.least == 80
    for length in (84, 83, 81, 80):
        language.forward(torch.randn(4, 64), at[:, cache.length :][:, :4], cache)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(79)
        kept = cache.copy()
        cache.crop(80)
        assert kept.length == 84
        new = language.forward(x[80:84], at[:, 80:84], cache, last=4)
        cache.crop(length)
        torch.testing.assert_close(new, expected[80:84], rtol=1e-3, atol=1e-3)
        new = language.forward(x[length : length + 1], at[:, length : length + 1], cache)
        torch.testing.assert_close(new, expected[length : length + 1], rtol=1e-3, atol=1e-3)
        cache.crop(length)
        if length > 80:
            cache = read(model, (80,), x)[1]
    cache.crop(0)
    torch.testing.assert_close(read(model, (80,), x, cache=cache)[0], expected[:80], rtol=1e-3, atol=1e-3)


def test_a_pass_that_fails_changes_nothing(model, path):
    x = columns(30)
    expected = read(model, (20, 1, 9), x)[0]
    _, cache = read(model, (20,), x)
    language, at = LanguageModel(model), places(30)
    layer = model.model.language_model.layers[-1]
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    for count in (1, 5, 10):
        with pytest.raises(ZeroDivisionError):
            language.forward(x[20 : 20 + count], at[:, 20 : 20 + count], cache)
    hook.remove()
    made = [language.forward(x[20:21], at[:, 20:21], cache), language.forward(x[21:], at[:, 21:], cache, last=9)]
    torch.testing.assert_close(torch.cat(made), expected[20:], rtol=1e-3, atol=1e-3)


def test_a_copy_is_independent(model):
    x = columns(40)
    expected = read(model, (40,), x)[0][30:]
    _, cache = read(model, (30,), x)
    language, at = LanguageModel(model), places(40)
    copy = cache.copy()
    language.forward(torch.randn(10, 64), at[:, 30:], cache)
    torch.testing.assert_close(language.forward(x[30:], at[:, 30:], copy, last=10), expected, rtol=1e-3, atol=1e-3)


def test_the_config_and_the_weights_have_the_names_of_transformers(host, model):
    assert model.state_dict().keys() == host.state_dict().keys()
    assert Config.parse(host.config.as_written()) == host.config


@pytest.mark.parametrize("wrong_at", [None, 4, 7])
def test_an_answer_is_the_same_with_drafts(model, wrong_at, monkeypatch):
    passes = []
    read = PrefillState.read
    monkeypatch.setattr(PrefillState, "read", lambda self, ids: passes.append(len(ids)) or read(self, ids))

    def answer(text: list[int] | None) -> list[int]:
        passes.clear()
        state = LanguageModel(model).prefill(columns(40), places(40), 50)
        if text is not None:
            state.prompt_ids = torch.tensor(text)
        return list(TokenStream(state, GenerationOptions(max_new_tokens=24), ()))

    expected = answer(None)
    assert passes == [1] * 23 and len(set(expected)) > 4
    text = expected.copy()
    if wrong_at:
        text[::wrong_at] = [(token + 1) % 100 for token in text[::wrong_at]]
    assert answer(text) == expected
    assert max(passes) == 4 and len(passes) <= (23 if wrong_at else 15)

"""Test the compiled decoder layer: it computes what the uncompiled one does, and its rows are independent."""

import copy
from ctypes import byref, c_int, c_int64, c_void_p

import pytest
import torch

from evoprune.backend import Quantization, shared_copy
from evoprune.backend.cpu import layer, quantize
from evoprune.language.decoder import KVCache, forward
from evoprune.session import calibrate
from tests.backend.cpu.library import compiled, library, use  # noqa: F401
from tests.threads import one_thread  # noqa: F401
from tests.tiny import EXPERTS, QWEN3_5_TEXT, QWEN3_TEXT, SHARED_EXPERT, native_model

# The second one normalizes queries and keys. The third one has Gated DeltaNets and gated attention. The last two have experts.
FAMILIES = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", pytest.param("qwen3_vl_moe", marks=pytest.mark.full)]
COLUMNS = 20
row_major = pytest.mark.skipif(
    not quantize._has_row_major_products(), reason="this CPU has no fast and exact products of row-major weights"
)


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request):
    with pytest.MonkeyPatch.context() as patch:
        for text in (QWEN3_TEXT, QWEN3_5_TEXT):
            patch.setitem(text, "head_dim", 32)  # row-major weights need multiples of 32
        patch.setitem(SHARED_EXPERT, "shared_expert_intermediate_size", 64)
        # With fewer experts, rounding can change which ones a router chooses.
        patch.setitem(EXPERTS, "num_experts_per_tok", EXPERTS["num_experts"])
        # Values of one head that fill whole steps of the compiled loop, and some that don't
        patch.setitem(QWEN3_5_TEXT, "linear_value_head_dim", 72)
        return native_model(family=request.param)


@pytest.fixture(params=["int8", "int4", "int8, bf16"])
def model(request, plain, compiled):  # noqa: F811
    kind, _, dtype = request.param.partition(", ")
    made = copy.deepcopy(plain)
    if dtype:
        made.bfloat16()
    Quantization(kind).apply(made, calibrate)
    return made


def dtype_of(model) -> torch.dtype:
    return model.model.language_model.norm.weight.dtype


def outputs(model, steps: list[int], sizes: bool = False) -> torch.Tensor:
    """Read a prompt, and then more columns in steps. Returns their hidden states."""
    hidden = model.config.text_config.hidden_size
    x = torch.randn(2 * COLUMNS, hidden, generator=torch.Generator().manual_seed(0)).to(dtype_of(model))
    positions = torch.arange(2 * COLUMNS).expand(3, -1)
    cache = KVCache(model, 1)
    count = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(1)) * 4 if sizes else None
    forward(model, x[:COLUMNS], positions[:, :COLUMNS], cache, count)
    made = []
    at = COLUMNS
    with Quantization.decoding():
        for step in steps:
            made.append(forward(model, x[at : at + step], positions[:, at : at + step], cache, last=step))
            at += step
    return torch.cat(made)


@row_major
@pytest.mark.parametrize("sizes", [False, True])
def test_a_compiled_layer_computes_what_the_others_do(model, sizes, monkeypatch):
    calls = []
    found = Quantization.compiled_layers
    monkeypatch.setattr(Quantization, "compiled_layers", lambda *args: calls.append(found(*args)) or calls[-1])
    made = outputs(model, [1, 1, 4, 12], sizes)
    prompt, first, *others = calls
    assert prompt is None and len(first) == model.config.text_config.num_hidden_layers
    assert others == [first] * 3  # compiled once
    monkeypatch.setattr(Quantization, "compiled_layers", lambda *args: None)
    expected = outputs(model, [1, 1, 4, 12], sizes)
    assert made.dtype == expected.dtype == dtype_of(model)
    wrong = (made - expected).float().norm(dim=-1) / expected.float().norm(dim=-1)
    # 4-bit layers round their input, so a difference in the last bit can become one of a step. In bf16, all results are rounded,
    # and the differences of a few columns grow in the states.
    exact = made.dtype == torch.float32 and "8" in type(model.model.language_model.layers[-1].self_attn.o_proj).__name__
    assert wrong.max() < 1e-4 if exact else wrong.median() < 0.05


@row_major
def test_columns_read_together_are_those_read_alone(model):
    check_independent(model)


def test_without_a_library_they_are_the_same_too(plain, monkeypatch):
    use(None, monkeypatch)
    model = copy.deepcopy(plain)
    Quantization("int8").apply(model, calibrate)
    check_independent(model)


def check_independent(model) -> None:
    """Check that an answer doesn't depend on how many of its tokens are read together."""
    alone = outputs(model, [1] * 12)
    assert torch.equal(outputs(model, [4, 1, 3, 4]), alone) and torch.equal(outputs(model, [8, 2, 2]), alone)


@row_major
def test_a_replaced_or_hooked_layer_is_called(model):
    expected = outputs(model, [1, 4])
    mlp = model.model.language_model.layers[0].mlp
    if hasattr(mlp, "experts"):
        pytest.skip("this layer has experts instead of an MLP")
    seen = []
    with mlp.up_proj.register_forward_hook(lambda *given: seen.append(given)):
        assert (outputs(model, [1, 4]) - expected).norm() < 0.1 * expected.norm()
    assert len(seen) == 3
    mlp.down_proj = model.model.language_model.layers[1].mlp.down_proj
    assert (outputs(model, [1, 4]) - expected).norm() > 0.2 * expected.norm()


@row_major
def test_a_copy_of_a_model_is_compiled_anew(model):
    expected = outputs(model, [1, 4])
    other = shared_copy(model)
    first, second, *_ = other.model.language_model.layers
    if hasattr(first.mlp, "experts"):
        pytest.skip("these layers have experts instead of an MLP")
    first.mlp.down_proj = second.mlp.down_proj
    assert not torch.equal(outputs(other, [1, 4]), expected)
    assert torch.equal(outputs(model, [1, 4]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (7, 1), (10, 2)])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_is_that_of_each_column(library, dtype, heads, kv_heads, rows, has_bias):  # noqa: F811
    columns, dim = 150, 24
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, kv_heads, columns + 10, dim, generator=random).to(dtype)
    queries, bias = torch.randn(rows, heads, dim, generator=random), torch.randn(columns, generator=random)
    y, scores = torch.empty_like(queries), torch.empty(rows * heads * columns)
    cache = layer._Columns(
        keys.data_ptr(), values.data_ptr(), kv_heads, columns, keys.stride(0), dtype == torch.bfloat16
    )
    library.evoprune_attend.argtypes = [c_void_p] * 5 + [c_int64] * 3 + [c_int]
    pointers = (bias.data_ptr() if has_bias else None, scores.data_ptr(), y.data_ptr())
    library.evoprune_attend(queries.data_ptr(), byref(cache), *pointers, rows, heads, dim, 2)
    keys, values = (
        each[:, :columns].double().repeat_interleave(heads // kv_heads, 0).transpose(0, 1) for each in (keys, values)
    )
    for row in range(rows):
        end = columns - rows + row + 1
        score = (queries[row].double() * keys[:end]).sum(-1) * dim**-0.5 + (bias[:end, None] if has_bias else 0)
        expected = (score.softmax(0)[..., None] * values[:end]).sum(0)
        assert (y[row] - expected).abs().max() < 1e-5 * expected.abs().max()

import threading
import time
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend import Device
from evoprune.backend.cpu import linear as module
from evoprune.backend.cpu.linear import (
    MANY_ROWS,
    SMALL_WEIGHT,
    START_PASSES,
    PackedLinear,
    Packing,
    linear,
)
from tests.threads import one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(not Packing.supports(torch.empty(1)), reason="this torch has no packed products")


def layer_and_input(rows, dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).to(dtype).requires_grad_(False), torch.randn(*rows, 48, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if Packing.supports(torch.empty(1, dtype=dtype))]
)
@pytest.mark.parametrize("rows", [(1,), (3,), (5, 4), (600,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_what_follows_the_product(rows, dtype, bias, packed):
    plain, x = layer_and_input(rows, dtype, bias)
    layer = PackedLinear(plain) if packed else plain
    y = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    other = torch.randn(*rows, 80, dtype=dtype)
    kept = other.clone()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for got, expected in (
        (layer(x), y),
        (linear(layer, x), y),
        (linear(layer, x, silu=True), F.silu(y)),
        (linear(layer, x, times=other), y * other.double()),
        (linear(layer, x, plus=other), y + other.double()),
    ):
        assert got.dtype == dtype and got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, **near)
    assert torch.equal(other, kept)


def test_packing_replaces_every_plain_linear_layer_and_nothing_else():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.ModuleDict({"deep": nn.Linear(8, 8), "own": Special(8, 8)}))
    x = torch.randn(3, 8)
    before = model[2]["deep"](model[1](model[0](x)))
    Packing.now(model.requires_grad_(False))
    assert isinstance(model[0], PackedLinear) and isinstance(model[2]["deep"], PackedLinear)
    assert type(model[2]["own"]) is Special
    torch.testing.assert_close(model[2]["deep"](model[1](model[0](x))), before)


def test_what_cannot_be_packed_stays():
    layer = nn.Linear(8, 8).half()
    assert not Packing.supports(layer.weight) and not Packing.supports(torch.empty(1, device="meta"))
    model = nn.Sequential(layer)
    Packing.now(model)
    assert model[0] is layer


@pytest.fixture(scope="module")
def large():
    """A layer large enough that its packing is deferred."""
    torch.manual_seed(0)
    layer = nn.Linear(1536, 1408).bfloat16().requires_grad_(False)
    assert layer.weight.numel() > SMALL_WEIGHT
    if not Packing.supports(layer.weight):
        pytest.skip("bf16 is not packed here")
    return layer


@pytest.fixture
def same(monkeypatch):
    """Row counts for which plain and packed weights give identical results, as on some CPUs, and the row counts tried."""
    found = {"rows": set(range(MANY_ROWS)), "tried": []}

    def equal(plain, packed, rows):
        found["tried"].append(rows)
        return rows in found["rows"]

    monkeypatch.setattr(module, "_equal_products", equal)
    return found


def stack(large, layers):
    """Return a model with this many deferred layers of one shape, and a one-row input."""
    model = nn.ModuleList(nn.Linear(1536, 1408, bias=False, device="meta") for _ in range(layers))
    for layer in model:
        layer.weight = nn.Parameter(large.weight.clone(), requires_grad=False)
    Packing().later(model)
    return model, torch.randn(1, 1536, dtype=torch.bfloat16)


def compute(model, x):
    """Run a pass and return the indices of the layers that are still waiting."""
    model.packing.begin_pass()
    for layer in model:
        layer(x)
    return [number for number, layer in enumerate(model) if layer.waits]


def test_a_layer_with_many_rows_waits(large, same):
    packing = Packing()
    waiting, packed = PackedLinear(large, packing), PackedLinear(large)
    many, few = (torch.randn(rows, 1536, dtype=torch.bfloat16) for rows in (MANY_ROWS, MANY_ROWS - 1))
    other = torch.randn(MANY_ROWS, 1408, dtype=torch.bfloat16)
    assert torch.equal(linear(waiting, many, silu=True), linear(packed, many, silu=True))
    assert torch.equal(linear(waiting, many, plus=other), linear(packed, many, plus=other))
    assert waiting.waits and not packed.waits and packing.seconds == 0
    assert waiting.nbytes == packed.nbytes == large.weight.nbytes
    assert torch.equal(waiting(few), packed(few))
    assert not waiting.waits and packing.seconds > 0
    once = packing.seconds
    assert torch.equal(waiting(many), packed(many)) and torch.equal(waiting(few[:1]), packed(few[:1]))
    assert packing.seconds == once


@pytest.mark.parametrize("each", [1, 2, 5])
def test_so_many_layers_are_packed_after_so_many_passes(large, same, monkeypatch, each):
    monkeypatch.setattr(module, "PASS_BYTES", each * large.weight.nbytes)
    model, x = stack(large, 6)
    for _ in range(START_PASSES):
        assert compute(model, x) == [1, 2, 3, 4, 5]  # layer 0 is the sample of its shape
    for count in range(1, 6):
        assert compute(model, x) == list(range(1, 6))[count * each :]
    assert same["tried"] == [1] and not model.packing._samples


def test_one_weight_of_a_shape_is_in_memory_twice(large, same):
    model, x = stack(large, 4)
    compute(model, x)
    ((plain, packed),) = model.packing._samples.values()
    assert packed is model[0].weights_for(x) and plain.shape == large.weight.shape
    model.packing.finish()
    assert not any(layer.waits for layer in model) and not model.packing._samples


@pytest.mark.parametrize(("rows", "waits"), [({1, 3}, [1, 2]), ({1}, []), ({3}, [])])
def test_layers_wait_only_where_that_changes_no_number(large, same, rows, waits):
    same["rows"] = rows
    model, x = stack(large, 3)
    assert compute(model, x.expand(3, -1).contiguous()) == waits
    same["rows"] = set()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # products may be split differently
    try:
        assert compute(model, x) == []
    finally:
        torch.set_num_threads(threads)


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 30, MANY_ROWS - 1])
def test_numbers_are_those_of_packed_weights_from_the_first_pass_on(large, dtype, rows):
    if not Packing.supports(torch.empty(1, dtype=dtype)):
        pytest.skip("this dtype is not packed here")
    model = nn.ModuleList(nn.Linear(1536, 1408).to(dtype) for _ in range(3)).requires_grad_(False)
    x = torch.randn(rows, 1536, dtype=dtype)
    packed = [PackedLinear(layer)(x) for layer in model]
    Packing().later(model)
    for _ in range(START_PASSES + 2):
        model.packing.begin_pass()
        for layer, numbers in zip(model, packed, strict=True):
            assert torch.equal(layer(x), numbers)
    assert not any(layer.waits for layer in model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1600, 1000, 7])
def test_a_large_layer_waits_in_parts(monkeypatch, same, bias, outputs):
    monkeypatch.setattr(module, "SMALL_WEIGHT", 0)
    monkeypatch.setattr(module, "LARGE_WEIGHT", 100)
    torch.manual_seed(0)
    model, x = nn.ModuleList([nn.Linear(32, outputs, bias=bias)]).requires_grad_(False), torch.randn(2, 32)
    expected = model[0](x)
    Packing().later(model)
    for rows in (x, x[:1]):
        torch.testing.assert_close(model[0](rows), expected[: len(rows)])
    assert any(part.waits for part in model[0].parts)
    model.packing.finish()
    torch.testing.assert_close(model[0](x), expected)
    assert module.weights_bytes(model) == 4 * outputs * (33 if bias else 32)


def test_layers_are_packed_while_someone_is_waited_for(large, same, monkeypatch):
    model, x = stack(large, 4)
    compute(model, x)
    expected, reorder = [layer(x) for layer in model], module._packed
    begun, go_on = threading.Event(), threading.Event()

    def slowly(weight):
        begun.set()
        assert go_on.wait(60)
        return reorder(weight)

    monkeypatch.setattr(module, "_packed", slowly)
    with suppress(KeyboardInterrupt), model.packing.meanwhile():
        assert begun.wait(60)
        threading.Timer(0.2, go_on.set).start()
        raise KeyboardInterrupt  # stops after the current layer
    assert [layer.waits for layer in model] == [False, False, True, True]
    monkeypatch.setattr(module, "_packed", reorder)
    with model.packing.meanwhile():
        end = time.monotonic() + 60
        while any(layer.waits for layer in model) and time.monotonic() < end:
            time.sleep(0.01)
    assert not any(layer.waits for layer in model) and not model.packing._samples
    for layer, numbers in zip(model, expected, strict=True):
        torch.testing.assert_close(layer(x), numbers)  # `same` claims that they are equal, whatever this CPU does
    threads = threading.active_count()
    with model.packing.meanwhile():
        assert threading.active_count() == threads  # nothing left to do


def test_packing_that_is_interrupted_goes_on_later(large, same, monkeypatch):
    model, x = stack(large, 4)
    for _ in range(START_PASSES):
        compute(model, x)
    expected, reorder = [layer(x) for layer in model], module._packed

    def interrupt(weight):
        if weight is model[2]._weights_and_final[0]:
            raise KeyboardInterrupt
        return reorder(weight)

    monkeypatch.setattr(module, "_packed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compute(model, x)
    assert [layer.waits for layer in model] == [False, False, True, True]
    monkeypatch.setattr(module, "_packed", reorder)
    assert compute(model, x) == []
    for layer, numbers in zip(
        model, expected, strict=True
    ):  # on some CPUs, packing changes the last bit of a few numbers
        torch.testing.assert_close(layer(x), numbers, rtol=2**-6, atol=1e-3)


def test_random_numbers_of_the_program_are_its_own(large):
    model, x = stack(large, 2)
    before = torch.random.get_rng_state()
    compute(model, x)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_small_weights_do_not_wait():
    assert not PackedLinear(nn.Linear(48, 80).requires_grad_(False), Packing()).waits


def test_a_layer_stays_plain_where_memory_is_short_when_few_rows_come(large, monkeypatch):
    asked = []
    monkeypatch.setattr(Device, "available_memory", lambda self: asked.append(self.kind) or large.weight.nbytes)
    waiting, x = PackedLinear(large, Packing()), torch.randn(1, 1536, dtype=torch.bfloat16)
    torch.testing.assert_close(waiting(x), F.linear(x, large.weight, large.bias), rtol=0.02, atol=0.02)
    waiting(x)
    assert waiting.weights_for(x).data_ptr() == large.weight.data_ptr() and asked == ["cpu"]


def test_what_was_packed_in_inference_mode_serves_outside_of_it(large):
    waiting = PackedLinear(large, Packing())
    x = torch.randn(1, 1536, dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = waiting(x)
    outside = waiting(x.requires_grad_())  # may use another kernel
    torch.testing.assert_close(outside.detach(), inside, rtol=0.02, atol=0.02)

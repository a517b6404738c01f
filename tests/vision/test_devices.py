"""The encoder as a GPU runs it."""

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

import pytest
import torch
from evoprune.vision.stopwatch import Stopwatch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.none import Nothing
from evoprune.methods.random import Random
from evoprune.vision import attention, devices, encoder
from evoprune.vision.attention import grouped_attention
from evoprune.vision.buckets import Packed, buckets
from evoprune.vision.encoder import encode
from evoprune.vision.layout import attention_groups, geometry
from evoprune.vision.varlen import attend_packed, with_bias
from tests.methods.published import late, published
from tests.vision.clips import changes, clip
from tests.vision.devices import NoWaiting, take_gpu_route, varlen_by_hand
from tests.vision.test_attention import HEADS, LAYOUTS, by_hand, rows_of
from tests.vision.test_encoder import check_books, papers, units
from tests.vision.tower import random_layout, random_patches, tiny_tower


def packed(layout, scope) -> Packed:
    return Packed(attention_groups(layout, scope, exact=False), layout.rows)


# --- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(("shape", "merges", "scope"), LAYOUTS)
def test_both_ways_against_loops(shape, merges, scope, size_bias, kernel, monkeypatch):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed=7)
    layout.per_block  # which the encoder's own layouts know # noqa: B018
    q, k, v = rows_of(layout)
    out, expected = by_hand(q, k, v, layout, scope, size_bias)
    received = torch.zeros(layout.rows)
    with take_gpu_route(monkeypatch, kernel):
        made = grouped_attention(q, k, v, packed(layout, scope), size_bias, received)
        again = grouped_attention(q, k, v, packed(layout, scope), size_bias)
    torch.testing.assert_close(made, out, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(received, expected, atol=3e-6, rtol=1e-5)
    assert torch.equal(made, again)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.sampled_from(["window", "grid", "block"]), min_size=1, max_size=3),
    st.sampled_from(["window", "grid"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_both_ways_are_the_cpus_on_any_layout(monkeypatch, shape, merges, scope, size_bias, kernel, seed):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed, share=0.9)
    q, k, v = rows_of(layout, seed)
    theirs, mine = torch.zeros(layout.rows), torch.zeros(layout.rows)
    expected = grouped_attention(q, k, v, buckets(attention_groups(layout, scope)), size_bias, theirs)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
        made = grouped_attention(q, k, v, packed(layout, scope), size_bias, mine)
    torch.testing.assert_close(made, expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.sampled_from(["window", "grid"]), max_size=3),
    st.sampled_from(["window", "grid"]),
    st.integers(0, 99),
)
def test_groups_are_the_exact_ones_with_empty_groups_and_room_at_the_end(shape, merges, scope, seed):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed, share=0.9)
    exact, loose = attention_groups(layout, scope), attention_groups(layout, scope, exact=False)
    used = loose.length > 0
    assert len(used) == layout.group_count(scope)
    assert torch.equal(loose.length[used], exact.length) and torch.equal(loose.start[used], exact.start)
    assert torch.equal(loose.key_length[used], exact.key_length) and not loose.key_length[~used].any()
    assert torch.equal(loose.keys[: len(exact.keys)], exact.keys)
    assert torch.equal(loose.count[: len(exact.count)], exact.count)
    assert (loose.keys < layout.rows).all()
    assert exact.length.max() <= loose.longest[0] and exact.key_length.max() <= loose.longest[1]
    if loose.even:
        assert (loose.length == loose.longest[0]).all()


@pytest.mark.parametrize("dim", [8, 16, 32, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)], ids=str
)
def test_a_bias_may_ride_in_more_head_dimensions(dim, dtype, error):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 4, HEADS, dim, generator=random).to(dtype) for _ in range(3))
    count = torch.tensor([1, 2, 7, 192, 24576])
    q2, k2, v2 = with_bias(q, k, v, count)
    assert q2.shape[-1] % 8 == 0 and dim + 2 <= q2.shape[-1] <= dim + 9
    assert q2.shape == k2.shape == v2.shape and q2.dtype == k2.dtype == dtype
    assert not v2[..., dim:].any() and torch.equal(v2[..., :dim], v)

    def scores(q, k):
        return torch.einsum("iphd,jshd->hipjs", q.double(), k.double()) * dim**-0.5

    expected = scores(q, k) + count.double().log()[:, None]
    torch.testing.assert_close(scores(q2, k2), expected, atol=error, rtol=0)


@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(("shape", "merges", "scope"), [LAYOUTS[2], LAYOUTS[5], LAYOUTS[9]])
def test_in_bf16_the_kernel_is_as_near_as_its_numbers(shape, merges, scope, size_bias, monkeypatch):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed=7)
    q, k, v = (x.bfloat16() for x in rows_of(layout))
    exact, _ = by_hand(q.float(), k.float(), v.float(), layout, scope, size_bias)
    with monkeypatch.context() as patch, take_gpu_route(patch, True):
        made = grouped_attention(q, k, v, packed(layout, scope), size_bias)
    torch.testing.assert_close(made.float(), exact, atol=1e-3, rtol=2**-7)


def test_the_kernel_is_only_for_gpus_that_can(monkeypatch):
    found = attention.varlen_kernel.__wrapped__
    gpu = torch.device("cuda")
    assert found(torch.device("cpu"), torch.bfloat16) is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert found(gpu, torch.bfloat16) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert found(gpu, torch.float32) is None
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_hand)
    assert found(gpu, torch.float16) is varlen_by_hand
    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, ends_q, ends_k, longest_q, longest_k: q)
    assert found(gpu, torch.bfloat16) is None  # a torch whose kernel takes no scale


def test_torchs_own_kernel_takes_what_it_is_given():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    layout = random_layout(geometry(5, 7), 2, ["grid"], seed=1)
    q, k, v = (x.bfloat16() for x in rows_of(layout))
    plan = packed(layout, "window")
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = attend_packed(varlen.varlen_attn, q, k, v, plan, True)
    assert made.shape == q.shape and made.dtype == q.dtype


# --- the whole tower ---------------------------------------------------------------------------------------------------


def both_ways(monkeypatch, grid, method, keep, kernel, full_layers=(1, 3), chunk_units=10**6, patches=None):
    visual, patches = tiny_tower(full_layers), random_patches(grid) if patches is None else patches
    expected = encode(visual, [patches], grid, method, keep, chunk_units=chunk_units)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
        made = encode(visual, [patches], grid, method, keep, chunk_units=chunk_units)
    assert torch.equal(made.kept, expected.kept) and torch.equal(made.owner, expected.owner)
    assert made.layers == expected.layers and made.flat == expected.flat
    torch.testing.assert_close(made.features, expected.features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made.rows, expected.rows, atol=1e-4, rtol=1e-4)
    check_books(made, grid, None if isinstance(method, EvoPrune) else method.block)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 3), (2,), ()])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25, 0.1, 0.0])  # nothing pruned, to a token a grid and below
@pytest.mark.parametrize("grid", [(1, 4, 4), (2, 5, 7), (3, 8, 8), (5, 6, 9)])
def test_nothing_waits_and_the_answer_is_the_cpus(grid, share, full_layers, kernel, monkeypatch):
    keep = max(int(units(grid) * share), 1 if grid[0] < 5 else 3)
    both_ways(monkeypatch, grid, published(), keep, kernel, full_layers)


@pytest.mark.parametrize(
    ("features", "split", "survivor"),
    list(product(["keys", "keys_rotary", "hidden"], ["alternate", "checkerboard"], ["destination", "attended"])),
)
def test_nor_with_other_settings(features, split, survivor, monkeypatch):
    method = published(allocation="mean", first=0.0, last=0.8, features=features, split=split, survivor=survivor)
    both_ways(monkeypatch, (3, 5, 7), method, 16, True, (0, 3))  # several windows lose all rows but one in one layer


@pytest.mark.parametrize("method", [Nothing(), Random()])
def test_nor_where_nothing_is_merged(method, monkeypatch):
    both_ways(monkeypatch, (3, 5, 7), method, 16, True)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
    share=st.floats(0, 1),
    method=papers(),
    full_layers=st.sampled_from([(1, 3), (), (0,), (2,), (0, 1, 2, 3)]),
    chunk_units=st.integers(1, 200),
    kernel=st.booleans(),
)
def test_nor_on_any_clip(monkeypatch, grid, share, method, full_layers, chunk_units, kernel):
    keep = max(1, round(units(grid) * share))
    both_ways(monkeypatch, grid, method, keep, kernel, full_layers, chunk_units)


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("keep", [75, 12, 2])
def test_nor_in_blocks_of_several_grids(block, keep, monkeypatch):
    settings_ = product(["alternate", "checkerboard"], ["destination", "attended"])
    for kernel, (split, survivor) in zip([True, False, False, True], settings_, strict=True):
        method = published(block=block, split=split, survivor=survivor, allocation="mean", first=0.0)
        both_ways(monkeypatch, (5, 3, 5), method, keep, kernel, (0, 2), chunk_units=61)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_nor_with_references_in_time(share, block, chunk_units, kernel, monkeypatch):
    grid = (6, 5, 6)
    patches = clip(grid, changes(grid, share))
    for method in (
        late(encoder_budget=0.1, first=0.0),
        late(encoder_budget=1.0),
        late(attention=0.3, critical=0.2),
    ):
        method = replace(method, block=block)
        both_ways(monkeypatch, grid, method, 20, kernel, (1, 3), chunk_units, patches)


@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_nor_where_a_whole_block_has_nothing_new(chunk_units, monkeypatch):
    # Also where blocks are grids and rows merge in windows: some grids have no rows to lose.
    grid, changed = (4, 5, 6), torch.zeros(4, 30, dtype=torch.bool)
    changed[0], changed[2] = True, torch.arange(30) < 20
    for method in (
        late(block=1, encoder_budget=0.2, first=0.0, last=1.0),
        late(block=2, encoder_budget=0.2, first=0.0),
    ):
        both_ways(monkeypatch, grid, method, 9, True, (2,), chunk_units, clip(grid, changed))


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    keep=st.floats(0, 1),
    encoder_share=st.sampled_from([0.001, 0.1, 0.3, 1.0]),
    attention_weight=st.sampled_from([0.0, 0.3]),
    full_layers=st.sampled_from([(1, 3), (), (2,)]),
    chunk_units=st.integers(1, 100),
    kernel=st.booleans(),
)
def test_nor_on_any_clip_with_references(
    monkeypatch,
    grid,
    share,
    seed,
    block,
    keep,
    encoder_share,
    attention_weight,
    full_layers,
    chunk_units,
    kernel,
):
    method = late(
        block=block,
        encoder_budget=encoder_share,
        first=0.0,
        last=0.8,
        attention=attention_weight,
    )
    patches = clip(grid, changes(grid, share, seed), seed)
    both_ways(monkeypatch, grid, method, max(1, round(units(grid) * keep)), kernel, full_layers, chunk_units, patches)


@dataclass(frozen=True)
class Inside(EvoPrune):
    """Without a choice, for which values have to be looked at."""

    depth: float = 1.0
    selects: ClassVar[bool] = False


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_with_references_too_every_shape_is_known(share, kernel, monkeypatch):
    grid, meta = (6, 5, 7), torch.device("meta")

    def answer(q, k, v, *_, scale):
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: answer if kernel else None)
    monkeypatch.setattr(devices, "static_shapes", lambda device: device == meta)
    monkeypatch.setattr(encoder, "_settled", lambda *_: (False, 0.0))
    visual, patches = deepcopy(tiny_tower((0, 2))).bfloat16().to(meta), clip(grid, changes(grid, share))
    method = Inside(block=2, encoder_budget=0.2, first=0.0, attention=0.1)
    expected = encode(tiny_tower((0, 2)), [patches], grid, method, 20)
    made = encode(visual, [patches], grid, method, 20, chunk_units=70)
    assert made.layers == expected.layers and made.rows.shape == expected.rows.shape and made.rows.is_meta
    assert made.features.shape == expected.features.shape and made.owner.shape == (210,)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("keep", [70, 35, 9, 2])
def test_on_a_device_without_values_every_shape_is_known(keep, kernel, monkeypatch):
    """PyTorch's meta tensors have shapes but no values: looking at one raises, and so does mixing it with one on the CPU."""
    grid, meta = (2, 5, 7), torch.device("meta")

    def answer(q, k, v, *_, scale):
        return torch.empty_like(q)

    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: answer if kernel else None)
    monkeypatch.setattr(devices, "static_shapes", lambda device: device == meta)
    monkeypatch.setattr(encoder, "_settled", lambda *_: (False, 0.0))
    visual = deepcopy(tiny_tower((0, 2))).bfloat16().to(meta)
    made = encode(visual, [random_patches(grid)], grid, published(first=0.0, last=1.0), keep)
    assert made.features.shape == (keep, 24) and made.features.is_meta and made.features.dtype == torch.bfloat16
    assert made.kept.shape == (keep,) and made.owner.shape == (70,) and made.owner.is_meta


def test_the_watchmen_see_what_they_should():
    x, mask = torch.arange(4), torch.tensor([True, False, True, True])
    waits = [
        lambda: x.sum().item(), lambda: bool(mask.any()), lambda: mask.nonzero(), lambda: x[mask], lambda: x.unique(),
        lambda: torch.bincount(x), lambda: x.masked_select(mask), lambda: torch.equal(x, x), lambda: int(x.max()),
        lambda: x.repeat_interleave(x),
    ]  # fmt: skip
    for wait in (*waits, lambda: x.index_put_((mask,), x[:3])):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()
    x, mask = x.to("meta"), mask.to("meta")
    for wait in (*waits, x.tolist, x.cpu, lambda: x + torch.arange(4)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()


# --- rounds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slow(EvoPrunePaper):
    """Merges one pair of rows a round, and owns up to it or not."""

    honest: bool = True

    def match(self, candidates, remove):
        return super().match(candidates, remove.clamp(max=1))

    def rounds(self, rows, left):
        return rows - left if self.honest else min(1, rows - left)


def test_a_method_may_take_its_time(monkeypatch):
    both_ways(monkeypatch, (2, 5, 7), Slow(), 16, True)


def test_a_method_that_takes_longer_than_it_said_is_found_out_at_the_end(monkeypatch):
    with take_gpu_route(monkeypatch, False), pytest.raises(RuntimeError, match="did not remove"):
        encode(tiny_tower(), [random_patches((2, 5, 7))], (2, 5, 7), Slow(honest=False), 16)


@dataclass(frozen=True)
class Stubborn(EvoPrunePaper):
    def match(self, candidates, remove):
        return torch.arange(candidates.valid.shape[1]).expand(candidates.valid.shape)


def test_a_method_that_merges_nothing_is_an_error_either_way(monkeypatch):
    args = tiny_tower(), [random_patches((2, 5, 7))], (2, 5, 7), Stubborn(), 16
    with pytest.raises(RuntimeError, match="merged nothing"):
        encode(*args)
    with take_gpu_route(monkeypatch, False), pytest.raises(RuntimeError, match="did not remove"):
        encode(*args)


@dataclass(frozen=True)
class Greedy(EvoPrunePaper):
    def match(self, candidates, remove):
        return super().match(candidates, remove + 1)


def test_nor_may_a_method_merge_more_than_it_was_asked_to(monkeypatch):
    args = tiny_tower(), [random_patches((2, 5, 7))], (2, 5, 7), Greedy(), 30
    with pytest.raises(RuntimeError, match="planned"):
        encode(*args)
    with take_gpu_route(monkeypatch, False), pytest.raises(RuntimeError, match="did not remove"):
        encode(*args)


# --- time --------------------------------------------------------------------------------------------------------------


def test_on_a_gpu_time_is_taken_by_events_that_are_read_at_the_end(monkeypatch):
    class Event:
        clock = waited = 0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            Event.clock += 10
            self.at = Event.clock

        def synchronize(self):
            Event.waited += 1

        def elapsed_time(self, end):
            assert Event.waited
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watch = Stopwatch(torch.device("cuda"))
    assert watch.seconds() == 0
    for _ in range(3):
        with watch:
            pass
    assert Event.waited == 0
    assert watch.seconds() == pytest.approx(0.03) and Event.waited == 1

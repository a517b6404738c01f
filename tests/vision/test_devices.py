"""The encoder in its GPU form: no shape depends on values, and the host waits only when it must."""

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from math import prod

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from evoprune.backend import Attention, Timer
from evoprune.backend.attention import attend_varlen
from evoprune.methods import EvoPrunePaper
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune.vision import encoder
from evoprune.vision.attention import (
    PackedGroups,
    attend_packed,
    attention_groups,
    grouped_attention,
    with_bias,
)
from evoprune.vision.layout import geometry
from tests.vision.clips import changes, clip
from tests.vision.devices import NoWaiting, assert_same_on_a_gpu, take_gpu_route
from tests.vision.results import encode_noise, encode_patches
from tests.vision.test_attention import HEADS, groups_of, heads_of
from tests.vision.test_encoder import papers
from tests.vision.test_preprocess import embedded
from tests.vision.tower import random_patches, random_rows, tiny_tower


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.sampled_from(["window", "pair"]), min_size=1, max_size=3),
    st.sampled_from(["window", "pair"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_is_the_cpus_on_any_layout(monkeypatch, shape, merges, scope, size_bias, kernel, seed):
    rows = replace(random_rows(geometry(*shape[1:]), shape[0], merges, seed, share=0.9), size_bias=size_bias)
    q, k, v = heads_of(rows, seed)
    theirs, mine = torch.zeros(len(rows)), torch.zeros(len(rows))
    expected = grouped_attention(q, k, v, groups_of(rows, scope), theirs)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
        made = grouped_attention(q, k, v, attention_groups(rows, scope, q), mine)
    torch.testing.assert_close(made, expected, atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(mine, theirs, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [8, 16, 32, 80, 128])
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)], ids=str
)
def test_extra_head_dimensions_carry_the_bias(dim, dtype, error):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 4, HEADS, dim, generator=random).to(dtype) for _ in range(3))
    count = torch.tensor([1, 2, 7, 192, 24576, 0])
    q2, k2, v2 = with_bias(q, k, v, count)
    assert q2.shape[-1] % 8 == 0 and dim + 2 <= q2.shape[-1] <= dim + 9
    assert q2.shape == k2.shape == v2.shape and q2.dtype == k2.dtype == dtype
    assert not v2[..., dim:].any() and torch.equal(v2[..., :dim], v)

    def scores(q, k):
        return torch.einsum("iphd,jshd->hipjs", q.double(), k.double()) * dim**-0.5

    expected = scores(q, k) + count.double().log()[:, None]
    made = scores(q2, k2)
    torch.testing.assert_close(made[:, :, :, :5], expected[:, :, :, :5], atol=error, rtol=0)
    assert made[:, :, :, 5].max() < -900


def test_the_kernel_is_used_only_on_gpus_that_can_run_it(monkeypatch):
    assert Attention(torch.device("cpu"), torch.bfloat16).varlen_kernel is None
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert Attention(gpu, torch.bfloat16).varlen_kernel is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert Attention(gpu, torch.float32).varlen_kernel is None
    assert Attention(gpu, torch.float16).varlen_kernel is attend_varlen
    monkeypatch.setenv("EVOPRUNE_PLAIN", "1")
    assert Attention(gpu, torch.float16).varlen_kernel is None


def test_torchs_own_kernel_accepts_the_arguments():
    rows = random_rows(geometry(5, 7), 2, ["pair"], seed=1)
    q, k, v = (x.bfloat16() for x in heads_of(rows))
    groups = PackedGroups(rows, "window", attend_varlen)
    made_of_values = groups.keys[0], rows.per_pair, groups.ends[1]
    assert [len(each) for each in made_of_values] == [len(rows.unit_to_row), 2, 9]
    with FakeTensorMode(allow_non_fake_inputs=True):
        made = attend_packed(q, k, v, groups)
    assert made.shape == q.shape and made.dtype == q.dtype


@pytest.mark.full
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    keep=st.floats(0, 1),
    method=st.one_of(
        papers(), st.builds(EvoPruneMethod, depth=st.sampled_from([0.25, 0.5, 1.0]), reuse=st.sampled_from([0.0, 8.0]))
    ),
    full_layers=st.sampled_from([(1, 3), (), (0,), (2,), (0, 1, 2, 3)]),
    piece_units=st.integers(1, 200),
    kernel=st.booleans(),
)
def test_the_result_is_the_cpus_on_any_clip(monkeypatch, grid, share, keep, method, full_layers, piece_units, kernel):
    # In a still clip, a unit is equally far from the tokens before and after it, so rounding decides which one it joins.
    assume(share or not isinstance(method, EvoPruneMethod))
    patches, kept = clip(grid, changes(grid, share)), max(1, round(prod(grid) * keep))
    assert_same_on_a_gpu(monkeypatch, patches, grid, method, kept, kernel, full_layers, piece_units)


@pytest.mark.parametrize("share", [1.0, 0.3, 0.0])
def test_reuse_waits_once_for_the_counts_of_a_piece(share, monkeypatch):
    grid, read, real = (20, 3, 5), [], torch.Tensor.tolist
    patches = clip(grid, changes(grid, share))
    run, expected = embedded([patches], grid, 60, 5.0)
    with monkeypatch.context() as patch, take_gpu_route(patch, False):
        patch.setattr(torch.Tensor, "tolist", lambda x: read.append(len(x)) or real(x))
        there, made = embedded(patches.split(7 * 60), grid, 60, 5.0)
    assert read == [4] * 5  # four frame pairs are compared at a time
    assert torch.equal(made.values, expected.values) and torch.equal(there.source, run.source)


@pytest.mark.full
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("keep", [35, 2])
def test_every_shape_is_known_on_a_device_without_values(keep, kernel, monkeypatch):
    """PyTorch's meta tensors have shapes but no values, so reading one or mixing it with a CPU tensor raises an error.

    Reuse reads the number of changed units once per piece, which tests/second_device counts.
    """
    grid, meta = (2, 5, 7), torch.device("meta")

    def answer(q, k, v, *_, scale):
        return torch.empty_like(q)

    monkeypatch.setattr(Attention, "varlen_kernel", property(lambda _: answer if kernel else None))
    monkeypatch.setattr(encoder.TowerOutput, "read_checks", lambda _, kept: (False, 0.0, kept))
    visual = deepcopy(tiny_tower((0, 2))).bfloat16().to(meta)
    method = EvoPrunePaper(first=0.0, last=1.0)
    patches = clip(grid, changes(grid, 0.3))
    expected = encode_patches(patches, grid, method, keep, tiny_tower((0, 2)))
    made = encode_patches(patches, grid, method, keep, visual, piece_units=30)
    assert made.features.is_meta and made.features.dtype == torch.bfloat16 and made.unit_to_row.is_meta
    assert made.layers == expected.layers and made.rows.shape == expected.rows.shape
    assert made.features.shape == (keep, 24) and made.kept.shape == (keep,) and made.unit_to_row.shape == (70,)


def test_waiting_is_noticed():
    x, mask = torch.arange(4), torch.tensor([True, False, True, True])
    for wait in (
        lambda: x.sum().item(), lambda: bool(mask.any()), lambda: mask.nonzero(), lambda: x[mask], lambda: x.unique(),
        lambda: torch.bincount(x), lambda: x.masked_select(mask), lambda: torch.equal(x, x), lambda: int(x.max()),
        lambda: x.repeat_interleave(x), lambda: x.index_put_((mask,), x[:3]),
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            wait()


@dataclass(frozen=True)
class Slow(EvoPrunePaper):
    """Merges one pair of rows per round; `rounds` is wrong unless `honest`."""

    honest: bool = True

    def match(self, candidates, remove):
        return super().match(candidates, remove.clamp(max=1))

    def rounds(self, rows, left):
        return rows - left if self.honest else min(1, rows - left)


def test_a_merger_may_take_many_rounds(monkeypatch):
    assert_same_on_a_gpu(monkeypatch, random_patches((2, 5, 7)), (2, 5, 7), Slow(), 16, True)


@dataclass(frozen=True)
class Stubborn(EvoPrunePaper):
    def match(self, candidates, remove):
        return torch.arange(candidates.valid.shape[1]).expand(candidates.valid.shape)


@dataclass(frozen=True)
class Greedy(EvoPrunePaper):
    def match(self, candidates, remove):
        return super().match(candidates, remove + 1)


@pytest.mark.parametrize(
    ("method", "says"), [(Slow(honest=False), None), (Stubborn(), "merged no rows"), (Greedy(), "rows instead of")]
)
def test_a_merger_that_does_not_do_what_it_said_is_an_error(method, says, monkeypatch):
    if says:
        with pytest.raises(RuntimeError, match=says):
            encode_noise((2, 5, 7), method, 30)
    with take_gpu_route(monkeypatch, False), pytest.raises(RuntimeError, match="did not remove"):
        encode_noise((2, 5, 7), method, 16)


def test_on_a_gpu_time_is_taken_by_events_that_are_read_at_the_end(monkeypatch):
    clock, waited = count(0, 10), []

    class Event:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda" and enable_timing

        def record(self, stream):
            self.at = next(clock)

        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, end):
            assert waited
            return end.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    timer = Timer(torch.device("cuda"))
    assert timer.seconds() == 0
    for _ in range(3):
        with timer:
            pass
    assert not waited and timer.seconds() == pytest.approx(0.03) and len(waited) == 1

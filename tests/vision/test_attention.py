"""Attention within windows and frame pairs, against loops over groups, heads and patches."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.backend import Timer
from evoprune.vision.attention import grouped_attention, groups_by_length
from evoprune.vision.layout import geometry
from tests.vision.tower import groups_by_hand, numbered, random_rows, referring

HEADS, DIM = 2, 8
MERGED = [  # (frame pairs, height, width), merges so far, scope of the layer
    ((1, 1, 1), [], "window"),
    ((2, 4, 8), [], "window"),
    ((2, 5, 7), [], "window"),
    ((3, 4, 4), [], "pair"),
    ((2, 5, 7), ["window"], "window"),
    ((3, 4, 8), ["window"], "pair"),
    ((2, 9, 13), ["window", "window"], "window"),  # many lengths: groups share batches
    ((2, 5, 7), ["pair"], "pair"),
    ((2, 5, 7), ["window", "pair"], "window"),
    ((2, 9, 13), ["pair", "window"], "window"),
]


def heads_of(rows, seed=0):
    """Return queries, keys and values `[R, 4, heads, d]`."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(len(rows), 4, HEADS, DIM, generator=random) * 1.5 for _ in range(3)]


def groups_of(rows, scope, size_bias=None):
    return groups_by_length(rows if size_bias is None else replace(rows, size_bias=size_bias), scope)


def attention_received(q, k, groups):
    received = torch.zeros(len(q))
    grouped_attention(q, k, torch.zeros_like(k), groups, received)
    return received


def by_hand(q, k, v, rows, scope, size_bias):
    """Return output and attention received, computed one group, head and query patch at a time."""
    out, received = torch.zeros_like(q), torch.zeros(len(q))
    for asking, counts in groups_by_hand(rows, scope):
        keys = sorted(counts)
        bias = torch.tensor([counts[row] for row in keys]).log() if size_bias else torch.zeros(len(keys))
        for row in asking:
            for patch in range(4):
                for head in range(HEADS):
                    scores = torch.einsum("d,kpd->kp", q[row, patch, head], k[keys][:, :, head]) / DIM**0.5
                    share = (scores + bias[:, None]).flatten().softmax(0).view(len(keys), 4)
                    out[row, patch, head] = torch.einsum("kp,kpd->d", share, v[keys][:, :, head])
                    received[keys] += share.sum(1) / (len(asking) * 4 * HEADS)
    return out, received


@pytest.mark.few(8)
@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(("shape", "merges", "scope"), MERGED)
@pytest.mark.parametrize(
    ("dtype", "scores", "long"),
    [(torch.float32, 100, 1), (torch.bfloat16, 1 << 23, 10**6), (torch.bfloat16, 100, 10**6), (torch.bfloat16, 100, 1)],
)
def test_attention_against_loops_in_each_dtype(shape, merges, scope, size_bias, dtype, scores, long, monkeypatch):
    monkeypatch.setattr("evoprune.backend.devices.SCORES", scores)  # small values split the work into many pieces
    monkeypatch.setattr("evoprune.backend.attention.LONG", long)
    rows = random_rows(geometry(*shape[1:]), shape[0], merges, seed=7)
    q, k, v = (x.to(dtype) for x in heads_of(rows))
    groups, received = groups_of(rows, scope, size_bias), torch.zeros(len(rows))
    timer, unused = Timer(q.device), Timer(q.device)
    out = grouped_attention(q, k, v, groups, received, timer)
    exact, expected = by_hand(*(x.float() for x in (q, k, v)), rows, scope, size_bias)
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.08, "rtol": 0.02}
    torch.testing.assert_close(out.float(), exact, **near)
    close = near if dtype == torch.float32 else {"atol": 3e-3, "rtol": 0.03}
    torch.testing.assert_close(received, expected, **close)
    assert torch.equal(grouped_attention(q, k, v, groups, timer=unused), out)
    assert timer.seconds() > 0 and unused.seconds() == 0


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.sampled_from(["window", "pair"]), min_size=1, max_size=3),
    st.sampled_from(["window", "pair"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_against_loops_on_any_rows(shape, merges, scope, size_bias, seed):
    rows = random_rows(geometry(*shape[1:]), shape[0], merges, seed)
    q, k, v = heads_of(rows, seed)
    groups = groups_of(rows, scope, size_bias)
    out, received = by_hand(q, k, v, rows, scope, size_bias)
    torch.testing.assert_close(grouped_attention(q, k, v, groups), out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attention_received(q, k, groups), received, atol=2e-6, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    st.lists(st.sampled_from(["window", "pair"]), min_size=0, max_size=3),
    st.sampled_from(["window", "pair"]),
    st.booleans(),
    st.integers(1, 200),
    st.integers(0, 99),
)
def test_the_answer_does_not_depend_on_how_many_rows_attend_at_a_time(shape, merges, scope, size_bias, at_once, seed):
    rows = random_rows(geometry(*shape[1:]), shape[0], merges, seed)
    q, k, v = heads_of(rows, seed)
    groups, whole, parts = groups_of(rows, scope, size_bias), torch.zeros(len(rows)), torch.zeros(len(rows))
    expected = grouped_attention(q, k, v, groups, whole)
    made = grouped_attention(q, k, v, groups, parts, at_once=at_once)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_equal_groups_of_neighbours_are_one_view_without_mask():
    for rows, scope, shape in (
        (numbered(geometry(8, 4), 3), "window", (6, 16)),
        (numbered(geometry(5, 3), 2), "pair", (2, 15)),
    ):
        (batch,) = groups_of(rows, scope)
        assert batch.shape == shape
        assert batch.query is None and batch.key is None and batch.valid is None and batch.bias is None
        x = torch.randn(len(rows), 4, 2)
        assert batch.by_head(x, batch.query).data_ptr() == x.data_ptr()


def test_groups_of_much_different_length_do_not_pad_each_other():
    rows = random_rows(geometry(9, 13), 3, ["window"], seed=1)
    different = {len(asking) for asking, _ in groups_by_hand(rows, "window")}
    assert len(different) > 4
    batches = groups_of(rows, "window", True)
    seen = []
    for batch in batches:
        lengths = (batch.weight > 0).sum(1)
        assert lengths.min() > 0.75 * lengths.max() or len(lengths.unique()) == 1
        valid = torch.ones_like(batch.query, dtype=torch.bool) if batch.valid is None else batch.valid
        seen += batch.query[valid].tolist()
    assert sorted(seen) == list(range(len(rows)))
    assert len(batches) < len(different)


@pytest.mark.parametrize("scope", ["window", "pair"])
def test_groups_with_few_queries_do_not_pad_to_those_with_many(scope):
    """A still image: all rows are in the first of ten frame pairs, and each later frame pair has one new row."""
    source = torch.zeros(10, 64, dtype=torch.int64)
    for pair in range(1, 10):
        source[pair:, pair] = pair
    rows = referring(geometry(8, 8), source)
    keys = 16 if scope == "window" else 64
    groups = groups_by_hand(rows, scope)
    assert {(len(asking), sum(counts.values())) for asking, counts in groups} == {(1, keys), (keys, keys)}
    full, few = groups_of(rows, scope, True)
    assert full.shape == (64 // keys, keys) and few.shape == (9, 1)

"""Attention inside windows and frame pairs, against loops over groups, heads and patches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.backend.devices import Timer
from evoprune.vision.attention import buckets, grouped_attention
from evoprune.vision.layout import attention_groups, full_layout, geometry
from tests.vision.tower import groups_by_hand, random_layout, referring

HEADS, DIM = 2, 8
LAYOUTS = [  # (frame pairs, height, width), merges so far, scope of the layer
    ((1, 1, 1), [], "window"),
    ((2, 4, 8), [], "window"),
    ((2, 5, 7), [], "window"),
    ((3, 4, 4), [], "pair"),
    ((2, 5, 7), ["window"], "window"),
    ((3, 4, 8), ["window"], "pair"),
    ((2, 9, 13), ["window", "window"], "window"),  # many lengths: groups share buckets
    ((2, 5, 7), ["pair"], "pair"),
    ((2, 5, 7), ["window", "pair"], "window"),
    ((2, 9, 13), ["pair", "window"], "window"),
]


def rows_of(layout, seed=0):
    """Queries, keys and values `[R, 4, heads, d]`."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(layout.rows, 4, HEADS, DIM, generator=random) * 1.5 for _ in range(3)]


def plan_of(layout, scope, size_bias=False):
    return buckets(attention_groups(layout, scope), size_bias, layout)


def attention_received(q, k, plan):
    received = torch.zeros(len(q))
    grouped_attention(q, k, torch.zeros_like(k), plan, received)
    return received


def by_hand(q, k, v, layout, scope, size_bias):
    """Output and attention received, one group, head and query patch at a time."""
    out, received = torch.zeros_like(q), torch.zeros(len(q))
    for rows, counts in groups_by_hand(layout, scope):
        keys = sorted(counts)
        bias = torch.tensor([counts[row] for row in keys]).log() if size_bias else torch.zeros(len(keys))
        for row in rows:
            for patch in range(4):
                for head in range(HEADS):
                    scores = torch.einsum("d,kpd->kp", q[row, patch, head], k[keys][:, :, head]) / DIM**0.5
                    share = (scores + bias[:, None]).flatten().softmax(0).view(len(keys), 4)
                    out[row, patch, head] = torch.einsum("kp,kpd->d", share, v[keys][:, :, head])
                    received[keys] += share.sum(1) / (len(rows) * 4 * HEADS)
    return out, received


@pytest.mark.few(8)
@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(("shape", "merges", "scope"), LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "scores", "long"),
    [(torch.float32, 100, 1), (torch.bfloat16, 1 << 23, 10**6), (torch.bfloat16, 100, 10**6), (torch.bfloat16, 100, 1)],
)
def test_attention_against_loops_in_each_dtype(shape, merges, scope, size_bias, dtype, scores, long, monkeypatch):
    monkeypatch.setattr("evoprune.backend.devices.SCORES", scores)  # also in many small pieces
    monkeypatch.setattr("evoprune.backend.attention.LONG", long)
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed=7)
    q, k, v = (x.to(dtype) for x in rows_of(layout))
    plan, received = plan_of(layout, scope, size_bias), torch.zeros(layout.rows)
    timer, unused = Timer(q.device), Timer(q.device)
    out = grouped_attention(q, k, v, plan, received, timer)
    exact, expected = by_hand(*(x.float() for x in (q, k, v)), layout, scope, size_bias)
    near = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.08, "rtol": 0.02}
    torch.testing.assert_close(out.float(), exact, **near)
    close = near if dtype == torch.float32 else {"atol": 3e-3, "rtol": 0.03}
    torch.testing.assert_close(received, expected, **close)
    assert torch.equal(grouped_attention(q, k, v, plan, timer=unused), out)
    assert timer.seconds() > 0 and unused.seconds() == 0


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.sampled_from(["window", "pair"]), min_size=1, max_size=3),
    st.sampled_from(["window", "pair"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_attention_against_loops_on_any_layout(shape, merges, scope, size_bias, seed):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed)
    q, k, v = rows_of(layout, seed)
    plan = plan_of(layout, scope, size_bias)
    out, received = by_hand(q, k, v, layout, scope, size_bias)
    torch.testing.assert_close(grouped_attention(q, k, v, plan), out, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(attention_received(q, k, plan), received, atol=2e-6, rtol=1e-5)


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
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed)
    q, k, v = rows_of(layout, seed)
    plan, whole, parts = plan_of(layout, scope, size_bias), torch.zeros(layout.rows), torch.zeros(layout.rows)
    expected = grouped_attention(q, k, v, plan, whole)
    made = grouped_attention(q, k, v, plan, parts, at_once=at_once)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)


def test_equal_groups_of_neighbours_are_one_view_without_mask():
    for layout, scope, shape in (
        (full_layout(geometry(8, 4), 3), "window", (6, 16)),
        (full_layout(geometry(5, 3), 2), "pair", (2, 15)),
    ):
        (bucket,) = plan_of(layout, scope)
        assert bucket.shape == shape
        assert bucket.query is None and bucket.key is None and bucket.valid is None and bucket.bias is None
        x = torch.randn(layout.rows, 4, 2)
        assert bucket.by_head(x, "query").data_ptr() == x.data_ptr()


def test_groups_of_much_different_length_do_not_pad_each_other():
    layout = random_layout(geometry(9, 13), 3, ["window"], seed=1)
    groups = attention_groups(layout, "window")
    assert len(groups.length.unique()) > 4
    plan = plan_of(layout, "window", True)
    seen = []
    for bucket in plan:
        lengths = (bucket.weight > 0).sum(1)
        assert lengths.min() > 0.75 * lengths.max() or len(lengths.unique()) == 1
        valid = torch.ones_like(bucket.query, dtype=torch.bool) if bucket.valid is None else bucket.valid
        seen += bucket.query[valid].tolist()
    assert sorted(seen) == list(range(layout.rows))
    assert len(plan) < len(groups.length.unique())


@pytest.mark.parametrize("scope", ["window", "pair"])
def test_groups_with_few_queries_do_not_pad_to_those_with_many(scope):
    """A still picture: all rows in the first of ten frame pairs, one new row in each other."""
    source = torch.zeros(10, 64, dtype=torch.int64)
    for pair in range(1, 10):
        source[pair:, pair] = pair
    layout = referring(geometry(8, 8), source)
    groups = attention_groups(layout, scope)
    keys = 16 if scope == "window" else 64
    assert (groups.key_length == keys).all() and groups.length.unique().tolist() == [1, keys]
    full, few = buckets(groups, True, layout)
    assert full.shape == (64 // keys, keys) and few.shape == (9, 1)

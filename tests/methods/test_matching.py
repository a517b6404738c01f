import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods.ranking import alternate, best_partners, match, merge_rows


def padded(lengths):
    """Which rows are valid in groups of these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_every_second_row_of_a_group_may_merge():
    assert alternate(padded([5, 2, 1])).tolist() == [
        [False, True, False, True, False],
        [False, True, False, False, False],
        [False] * 5,
    ]


# --- match ---------------------------------------------------------------------------------------------------------------


def matched(score, source, valid, last, remove):
    return match(*best_partners(score, source, valid & ~source), source, last, remove)


def match_by_hand(score, source, valid, last, remove):
    into = []
    for b in range(len(score)):
        n = score.shape[1]
        sources = [i for i in range(n) if source[b, i]]
        targets = [j for j in range(n) if valid[b, j] and not source[b, j]]
        best = {i: max(targets, key=lambda j: (float(score[b, i, j]), -j)) for i in sources}
        order = sorted(sources, key=lambda i: (bool(last[b, i]), -float(score[b, i, best[i]]), i))
        going = order[: int(remove[b])]
        into.append([best[i] if i in going else i for i in range(n)])
    return into


@st.composite
def matchings(draw):
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    valid = padded(lengths)
    b, n = valid.shape
    levels = draw(st.sampled_from([1, 2, 3, 1000]))  # few levels: many ties; one: all scores are equal
    score = torch.randint(levels, (b, n, n), generator=random) / levels - 0.5
    source = (torch.rand(b, n, generator=random) < 0.5) & valid
    source[:, 0] = False  # somewhere to go
    last = torch.rand(b, n, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    remove = torch.randint(0, n + 2, (b,), generator=random)
    return score, source, valid, last, remove


@settings(deadline=None, max_examples=40)
@given(matchings())
def test_match_against_loops(case):
    assert matched(*case).tolist() == match_by_hand(*case)


def test_equal_scores_go_by_index_in_large_groups_too():
    n = 500
    source = (torch.arange(n) % 2 == 1)[None]
    valid, last = torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    into = matched(torch.full((1, n, n), 0.25), source, valid, last, torch.tensor([100]))[0]
    assert into.tolist() == [0 if i % 2 and i < 200 else i for i in range(n)]


# --- mean ----------------------------------------------------------------------------------------------------------------


@st.composite
def merges(draw):
    n = draw(st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    stays = torch.rand(n, generator=random) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    stays[int(torch.randint(n, (1,), generator=random))] = True
    targets = stays.nonzero().flatten()
    into = torch.where(stays, torch.arange(n), targets[torch.randint(len(targets), (n,), generator=random)])
    size = torch.randint(1, 20, (n,), generator=random)
    x = torch.randn(n, *draw(st.sampled_from([(3,), (4, 2)])), generator=random)
    return x, size, into


@settings(deadline=None, max_examples=40)
@given(merges(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_merge_rows_against_loops(case, dtype):
    x, size, into = case
    x = x.to(dtype)
    copies = x.clone(), size.clone(), into.clone()
    rows = int((into == torch.arange(len(x))).sum())
    made = merge_rows(x, size, into, rows, len(x) - rows)
    assert made.dtype == dtype and all(torch.equal(a, b) for a, b in zip((x, size, into), copies, strict=True))
    staying = [r for r in range(len(x)) if into[r] == r]
    assert len(made) == len(staying)
    for out, row in zip(made, staying, strict=True):
        members = [r for r in range(len(x)) if into[r] == row]
        mean = sum(float(size[r]) * x[r].double() for r in members) / float(size[members].sum())
        if len(members) == 1:
            assert torch.equal(out, x[row])  # to the last bit
        else:
            near = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
            torch.testing.assert_close(out.double(), mean, **near)

"""Methods that read where tokens lie in the frame, each against its specification followed line by line in loops."""

import math
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import strategies as st

from evoprune import methods
from evoprune.methods.types import Tokens
from tests.contrib.line_by_line import examples, shares
from tests.methods.tokens import Largest, cosine, ranked, scaled, selected, snapped, tokens_of

# --- adjacent ----------------------------------------------------------------------------------------------------------

Place = tuple[int, int, int]


def beside(place: Place, left: set[Place], grid: tuple[int, int, int]) -> list[Place]:
    """The nearest places that are left above, below, left and right."""
    pair, y, x = place
    found = []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        line = [(pair, y + step * down, x + step * right) for step in range(1, max(grid))]
        found += [at for at in line if at in left][:1]
    return found


def adjacent_line_by_line(tokens: Tokens, keep: int, still: float) -> list[int]:
    t, h, w = tokens.grid
    places = [(pair, y, x) for pair in range(t) for y in range(h) for x in range(w)]
    feature = dict(zip(places, tokens.features, strict=True))
    left = set(places)

    def like(a: Place, b: Place) -> float:
        return cosine(feature[a], feature[b])

    before = {at: 1 - (1 - like(at, (at[0] - 1, *at[1:]))) for at in places if at[0]}
    for at in sorted(before, key=lambda at: (-before[at], at)):
        if before[at] > still and len(left) > keep:
            left.remove(at)
    while len(left) > keep:
        near = {at: beside(at, left, tokens.grid) for at in left}
        redundancy = {at: max((like(at, other) for other in near[at]), default=-2.0) for at in left}
        gone: set[Place] = set()
        for at in sorted(left, key=lambda at: (-redundancy[at], at)):
            if len(left) - len(gone) > keep and not gone & set(near[at]):
                gone.add(at)
        left -= gone
    return sorted(places.index(at) for at in left)


@examples()
def test_adjacent(grid, kind, seed, data):
    keep, still = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([1.0, 0.9, 0.2, -1.0]))
    tokens = tokens_of(kind, grid, seed)
    assert selected(f"adjacent:still={still}", tokens, keep) == adjacent_line_by_line(tokens, keep, still)


def test_adjacent_never_drops_neighbours_together():
    """Half of a chequerboard is the most that one round can drop."""
    tokens = tokens_of("constant", (1, 4, 6))
    kept = selected("adjacent", tokens, 12)
    assert kept == [unit for unit in range(24) if (unit // 6 + unit % 6) % 2]


# --- par ---------------------------------------------------------------------------------------------------------------


def par_line_by_line(tokens: Tokens, keep: int, link: float) -> list[int]:
    x, question = tokens.features, tokens.question
    t, h, w = tokens.grid
    unit = [each / each.norm().clamp(min=1e-12) for each in x]
    words = [each / each.norm().clamp(min=1e-12) for each in question]
    relevance = [snapped(float(sum(a @ b for b in words)) / len(words)) for a in unit]
    if min(relevance) == max(relevance):
        relevance = [1.0] * len(x)
    else:
        relevance = [snapped(max(1 / 128, value)) for value in scaled(relevance)]
    cluster = list(range(len(x)))
    for i in range(len(x)):
        pair, y, column = i // (h * w), i // w % h, i % w
        steps = [(column < w - 1, 1), (y < h - 1, w), (pair < t - 1, h * w)]
        for inside, step in steps:
            if inside and cosine(x[i], x[i + step]) > link:
                old, new = sorted((cluster[i], cluster[i + step]), reverse=True)
                cluster = [new if c == old else c for c in cluster]
    value = [0.0] * len(x)
    for name in set(cluster):
        members = [i for i in range(len(x)) if cluster[i] == name]
        for place, best in enumerate(ranked([relevance[i] for i in members])):
            value[members[best]] = relevance[members[best]] / (1 + place)
    value = [float(torch.tensor(each, dtype=torch.float32)) for each in value]
    return sorted(ranked(value)[:keep])


@examples()
def test_par(grid, kind, seed, data):
    keep, link = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.8, 0.3, -1.0, 1.0]))
    tokens = tokens_of(kind, grid, seed)
    assert selected(f"par:link={link}", tokens, keep) == par_line_by_line(tokens, keep, link)


def test_par_gives_clusters_tokens_in_proportion_to_their_relevance():
    """Values 1, 1/2, 1/3 and 1/4 of a relevant thing; 0.45, 0.23 and so on of another; the third is not relevant."""
    things = torch.tensor([[3.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    which = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1])
    question = torch.tensor([[1.0, 0.0, 0.5]])
    tokens = Tokens(things[which], torch.arange(12), (1, 3, 4), given={"question": question})
    assert selected("par", tokens, 4) == [0, 1, 2, 4]


# --- nuwa --------------------------------------------------------------------------------------------------------------


def nuwa_line_by_line(tokens: Tokens, keep: int, cell: int, weak: float, reach: float):
    """The kept units, and what each token is the mean of: units with weights."""
    t, h, w = tokens.grid
    kept, means = [], []
    for pair, due in enumerate(shares(keep, t)):
        attention = [snapped(float(tokens.attention[pair * h * w + i])) for i in range(h * w)]
        late = {}
        for y, x in {(i // w // 2, i % w // 2) for i in range(h * w)}:
            inside = [i for i in range(h * w) if (i // w // 2, i % w // 2) == (y, x)]
            for rank, i in enumerate(sorted(inside, key=lambda i: (-attention[i], i))):
                late[i] = max(0, rank - cell + 1)
        here = sorted(sorted(range(h * w), key=lambda i: (late[i], -attention[i], i))[:due])
        if not here:
            continue
        scores = sorted(attention[i] for i in here)
        at = weak * (len(scores) - 1)
        low, high = scores[math.floor(at)], scores[math.ceil(at)]
        threshold = low + (high - low) * (at - math.floor(at))
        tau = reach * (math.hypot(h - 1, w - 1) or 1)
        middle = tokens.middle[pair * h * w :].double()
        unit = [each / each.norm().clamp(min=1e-12) for each in middle]
        for i in here:
            weights = {pair * h * w + i: 1.0}
            for j in range(h * w):
                if attention[i] < threshold - 1e-7 and j != i:
                    distance = math.hypot(i // w - j // w, i % w - j % w)
                    weights[pair * h * w + j] = max(0.0, float(unit[i] @ unit[j])) * max(0.0, 1 - distance / tau)
            kept.append(pair * h * w + i)
            means.append(weights)
    return kept, means


@examples()
def test_nuwa(grid, kind, seed, data):
    keep, cell = data.draw(st.integers(1, prod(grid))), data.draw(st.integers(1, 4))
    weak, reach = data.draw(st.sampled_from([0.1, 0.0, 0.6, 1.0])), data.draw(st.sampled_from([0.8, 0.3]))
    tokens = tokens_of(kind, grid, seed)
    made = methods.get(f"nuwa:cell={cell}:weak={weak}:reach={reach}").select(tokens, keep)
    kept, means = nuwa_line_by_line(tokens, keep, cell, weak, reach)
    assert made.kept.tolist() == kept
    x = tokens.features.double()
    expected = [sum(w * x[i] for i, w in of.items()) / sum(of.values()) for of in means]
    torch.testing.assert_close(made.features(tokens.features).double(), torch.stack(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["adjacent", "par", "nuwa"])
def test_no_matrix_of_all_pairs(name):
    """16,384 tokens: no tensor is much larger than the features."""
    grid = (64, 16, 16)
    tokens = tokens_of("random", grid, width=64)
    tokens = replace(tokens, given=tokens.given | {"middle": tokens.features})
    with Largest() as largest:
        made = methods.get(name).select(tokens, 4096)
        made.features(tokens.features)
    assert len(made.kept) == 4096 and largest.numbers <= 16384 * 64

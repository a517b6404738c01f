"""Selectors of one frame pair or of all units, against their specifications line by line."""

import math
from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import strategies as st

from evoprune import methods
from evoprune.methods.ranking import snap
from evoprune.methods.types import Tokens
from tests.contrib.line_by_line import assert_selects, examples, shares
from tests.methods.tokens import cosine, first_of, ranked, scaled, selected, snapped, tokens_of

# --- mmr ---------------------------------------------------------------------------------------------------------------


def mmr_line_by_line(x: torch.Tensor, importance: list[float], keep: int, lam: float) -> list[int]:
    n = len(x)
    importance = [snapped(value) for value in scaled(importance)]
    cos = [[cosine(a, b) for b in x] for a in x]
    picked = [first_of([snapped(lam * value) for value in importance], max)]
    while len(picked) < keep:
        score = [snapped(lam * importance[i] - (1 - lam) * max(cos[i][j] for j in picked)) for i in range(n)]
        picked.append(first_of([-9.0 if i in picked else score[i] for i in range(n)], max))
    return sorted(picked)


@examples()
def test_mmr(grid, kind, seed, data):
    keep, lam = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    name, tokens = data.draw(st.sampled_from(["attention", "keynorm"])), tokens_of(kind, grid, seed)
    importance = tokens.attention if name == "attention" else tokens.keys.norm(dim=1)
    expected = mmr_line_by_line(tokens.features, importance.tolist(), keep, lam)
    assert selected(f"mmr:importance={name}:lam={lam}", tokens, keep) == expected


# --- visionzip ---------------------------------------------------------------------------------------------------------


def visionzip_line_by_line(tokens: Tokens, keep: int, share: float) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    members_of: dict[int, list[tuple[int, float]]] = {}
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        if not due:
            continue
        attention = [snapped(float(tokens.attention[i])) for i in units]
        dominant = [units[i] for i in ranked(attention)[: round(share * due)]]
        rest = [i for i in units if i not in dominant]
        count = due - len(dominant)
        targets = [rest[i * (len(rest) // count)] for i in range(count)]
        members_of |= {i: [(i, 1.0)] for i in dominant + targets}
        joins = {target: [] for target in targets}
        for i in rest:
            if i not in targets and targets:
                like = [cosine(tokens.keys[i], tokens.keys[j]) for j in targets]
                joins[targets[first_of(like, max)]].append(i)
        for target, others in joins.items():  # the target weighs as much as all others together
            members_of[target] = [(target, float(len(others) or 1)), *((i, 1.0) for i in others)]
    return members_of


@examples()
def test_visionzip(grid, kind, seed, data):
    keep, share = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.5, 0.85, 1.0]))
    tokens = tokens_of(kind, grid, seed)
    name = f"visionzip:dominant={share}"
    assert_selects(name, tokens, keep, visionzip_line_by_line(tokens, keep, share))


# --- scope -------------------------------------------------------------------------------------------------------------


def scope_line_by_line(tokens: Tokens, keep: int, alpha: float) -> list[int]:
    x, n = tokens.features, len(tokens.features)
    cos = [[cosine(a, b) for b in x] for a in x]
    saliency = [snapped(float(value)) ** alpha for value in tokens.attention]
    cover, picked = [0.0] * n, []
    while len(picked) < keep:
        gain = [saliency[i] * sum(max(0.0, cos[i][j] - cover[j]) for j in range(n)) for i in range(n)]
        picked.append(first_of([-1.0 if i in picked else gain[i] for i in range(n)], max))
        cover = [max(cover[j], cos[picked[-1]][j]) for j in range(n)]
    return sorted(picked)


@examples()
def test_scope(grid, kind, seed, data):
    keep, alpha = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    tokens = tokens_of(kind, grid, seed)
    assert selected(f"scope:alpha={alpha}", tokens, keep) == scope_line_by_line(tokens, keep, alpha)


@pytest.mark.parametrize("kind", ["random", "duplicates", "drift"])
def test_scope_over_many_tokens(kind):
    """More than are brought up to date at a time, and more than a block."""
    tokens = tokens_of(kind, (3, 14, 15), width=4)
    x = torch.nn.functional.normalize(tokens.features, dim=1)
    cos, saliency = snap(x @ x.T).double(), snap(tokens.attention).double()
    cover, picked = torch.zeros(630, dtype=torch.float64), []
    for _ in range(60):
        gain = (cos - cover).clamp(min=0).sum(1) * saliency
        gain[picked] = -1
        picked.append(int(gain.argmax()))
        cover = torch.maximum(cover, cos[picked[-1]])
    assert selected("scope", tokens, 60) == sorted(picked)


# --- vispruner ---------------------------------------------------------------------------------------------------------


def vispruner_line_by_line(tokens: Tokens, keep: int, share: float, step: int) -> list[int]:
    t, h, w = tokens.grid
    x, picked = tokens.features, []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        order = [units[i] for i in ranked([snapped(float(tokens.attention[i])) for i in units])]
        important = int(share * due)
        picked += order[:important]
        rest = order[important:] if due > important else []
        while len(rest) > due - important:
            like = {i: max(cosine(x[i], x[j]) for j in rest[1::2]) for i in rest[::2]}
            falling = sorted(like, key=lambda i: (-like[i], -rest.index(i)))  # the most similar first
            rest = falling[min(step, len(rest) - (due - important)) :] + rest[1::2]
        picked += rest
    return sorted(picked)


@examples()
def test_vispruner(grid, kind, seed, data):
    keep, share = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.5, 0.8, 1.0]))
    step, tokens = data.draw(st.sampled_from([1, 2, 8])), tokens_of(kind, grid, seed)
    expected = vispruner_line_by_line(tokens, keep, share, step)
    assert selected(f"vispruner:important={share}:step={step}", tokens, keep) == expected


# --- cdpruner ----------------------------------------------------------------------------------------------------------


def cdpruner_line_by_line(tokens: Tokens, keep: int, question: bool, negative: bool) -> list[int]:
    t, h, w = tokens.grid
    picked = []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        x = [tokens.features[i] / tokens.features[i].norm().clamp(min=1e-12) for i in units]
        asked = [q / q.norm().clamp(min=1e-12) for q in tokens.question]
        weight = [1.0] * len(x)
        if question:
            weight = [snapped(sum(float(a @ q) for q in asked) / len(asked)) * (-1 if negative else 1) for a in x]
            weight = [max(value, 1 / 128) for value in scaled(weight)] if max(weight) > min(weight) else [1.0] * len(x)
        kernel = [[weight[i] * weight[j] * x[i].double() @ x[j].double() for j in range(len(x))] for i in range(len(x))]
        kernel = torch.tensor(kernel, dtype=torch.float64)
        some = []
        for _ in range(due):
            inner = torch.linalg.pinv(kernel[some][:, some], hermitian=True, atol=1e-5)
            gain = [float(kernel[i, i] - kernel[i, some] @ inner @ kernel[some, i]) for i in range(len(x))]
            gain = [snapped(value) for value in gain]
            some.append(first_of([-1.0 if i in some else max(gain[i], 0.0) for i in range(len(x))], max))
        picked += [units[i] for i in some]
    return sorted(picked)


@examples()
def test_cdpruner(grid, kind, seed, data):
    keep, question = data.draw(st.integers(1, prod(grid))), data.draw(st.booleans())
    negative, tokens = data.draw(st.booleans()), tokens_of(kind, grid, seed)
    expected = cdpruner_line_by_line(tokens, keep, question, negative)
    assert selected(f"cdpruner:question={question}:negative={negative}", tokens, keep) == expected


@pytest.mark.parametrize(("reads", "reads_not"), [("cdpruner", "cdpruner:question=false"), ("dart", "dart:text=0")])
def test_a_question_is_needed_where_it_is_read(reads, reads_not):
    tokens = replace(tokens_of("random", (2, 3, 4)), given={})
    assert methods.get(reads).reads_question and not methods.get(reads_not).reads_question
    assert len(selected(reads_not, tokens, 9)) == 9
    with pytest.raises(TypeError, match="question"):
        selected(reads, tokens, 9)


# --- dart --------------------------------------------------------------------------------------------------------------


def dart_line_by_line(tokens: Tokens, keep: int, visual: int, text: int) -> list[int]:
    x, question = list(tokens.features), list(tokens.question)

    def longest(rows: list[torch.Tensor]) -> list[int]:
        norms = [float(row.abs().sum()) for row in rows]
        return ranked([snapped(value / (max(norms) or 1.0)) for value in norms])

    picked = longest(x)[: min(visual, keep)]
    pivots = [x[i] for i in picked] + [question[i] for i in longest(question)[:text]]
    wanted = keep - len(picked)
    due = [wanted // len(pivots) + (i < wanted % len(pivots)) for i in range(len(pivots))]
    for pivot, count in zip(pivots, due, strict=True):
        left = [i for i in range(len(x)) if i not in picked]
        picked += [left[i] for i in ranked([-cosine(x[j], pivot) for j in left])[:count]]
    return sorted(picked)


@examples()
def test_dart(grid, kind, seed, data):
    keep, visual = data.draw(st.integers(1, prod(grid))), data.draw(st.integers(0, 5))
    text, tokens = data.draw(st.integers(0 if visual else 1, 4)), tokens_of(kind, grid, seed)
    expected = dart_line_by_line(tokens, keep, visual, text)
    assert selected(f"dart:visual={visual}:text={text}", tokens, keep) == expected


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

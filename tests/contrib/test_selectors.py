"""Selectors, each compared with a line-by-line loop version of its specification."""

import math
from dataclasses import replace
from itertools import groupby, pairwise, product
from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.contrib import shared
from evoprune.contrib.holitom import most_saving
from evoprune.contrib.prunevid import folded
from evoprune.contrib.shared import apportion, peak_scores, peaks
from evoprune.methods import Tokens, snap
from tests.contrib.line_by_line import assert_means, examples, mean_of, shares
from tests.methods.tokens import cosine, features_of, first_of, ranked, scaled, selected, snapped, tokens_of


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0, 2.5, 7.0]), st.integers(0, 9)), min_size=1), st.data())
def test_apportion(groups, data):
    weights, most = zip(*groups, strict=True)
    total = data.draw(st.integers(0, sum(most)))
    counts = apportion(total, weights, most)
    assert sum(counts) == total and all(0 <= count <= limit for count, limit in zip(counts, most, strict=True))
    free = [i for i in range(len(groups)) if counts[i] < most[i]]
    for i in free:
        for j in free:
            if weights[i] > weights[j]:  # a larger weight never gets less
                assert counts[i] >= counts[j]
            if weights[i] == weights[j] and i < j:  # of equal weights, the first gets the odd token
                assert 0 <= counts[i] - counts[j] <= 1
    if all(total * weight <= limit * sum(weights) for weight, limit in groups) and sum(weights):
        assert all(
            abs(count * sum(weights) - total * w) < sum(weights) for count, w in zip(counts, weights, strict=True)
        )


def mmr_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    x, n, lam = tokens.features, len(tokens.features), method.lam
    importance = tokens.attention if method.importance == "attention" else tokens.keys.norm(dim=1)
    importance = [snapped(value) for value in scaled(importance.tolist())]
    cos = [[cosine(a, b) for b in x] for a in x]
    picked = [first_of([snapped(lam * value) for value in importance], max)]
    while len(picked) < keep:
        score = [snapped(lam * importance[i] - (1 - lam) * max(cos[i][j] for j in picked)) for i in range(n)]
        picked.append(first_of([-9.0 if i in picked else score[i] for i in range(n)], max))
    return sorted(picked)


def visionzip_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    members_of: dict[int, list[tuple[int, float]]] = {}
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        if not due:
            continue
        attention = [snapped(float(tokens.attention[i])) for i in units]
        dominant = [units[i] for i in ranked(attention)[: round(method.dominant * due)]]
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


def scope_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    x, n = tokens.features, len(tokens.features)
    cos = [[cosine(a, b) for b in x] for a in x]
    saliency = [snapped(float(value)) ** method.alpha for value in tokens.attention]
    cover, picked = [0.0] * n, []
    while len(picked) < keep:
        gain = [saliency[i] * sum(max(0.0, cos[i][j] - cover[j]) for j in range(n)) for i in range(n)]
        picked.append(first_of([-1.0 if i in picked else gain[i] for i in range(n)], max))
        cover = [max(cover[j], cos[picked[-1]][j]) for j in range(n)]
    return sorted(picked)


@pytest.mark.parametrize("kind", ["random", "duplicates", "drift"])
def test_scope_over_many_tokens(kind):
    """More tokens than one update handles, and more than one block."""
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


def vispruner_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    x, picked = tokens.features, []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        order = [units[i] for i in ranked([snapped(float(tokens.attention[i])) for i in units])]
        important = int(method.important * due)
        picked += order[:important]
        rest = order[important:] if due > important else []
        while len(rest) > due - important:
            like = {i: max(cosine(x[i], x[j]) for j in rest[1::2]) for i in rest[::2]}
            falling = sorted(like, key=lambda i: (-like[i], -rest.index(i)))  # the most similar first
            rest = falling[min(method.step, len(rest) - (due - important)) :] + rest[1::2]
        picked += rest
    return sorted(picked)


def cdpruner_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    picked = []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        x = [tokens.features[i] / tokens.features[i].norm().clamp(min=1e-12) for i in units]
        asked = [q / q.norm().clamp(min=1e-12) for q in tokens.question]
        weight = [1.0] * len(x)
        if method.question:
            weight = [
                snapped(sum(float(a @ q) for q in asked) / len(asked)) * (-1 if method.negative else 1) for a in x
            ]
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


@pytest.mark.parametrize(("reads", "reads_not"), [("cdpruner", "cdpruner:question=false"), ("dart", "dart:text=0")])
def test_a_question_is_needed_where_it_is_read(reads, reads_not):
    tokens = replace(tokens_of("random", (2, 3, 4)), given={})
    assert methods.get(reads).reads_question and not methods.get(reads_not).reads_question
    assert len(selected(reads_not, tokens, 9)) == 9
    with pytest.raises(TypeError, match="question"):
        selected(reads, tokens, 9)


def dart_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    x, question = list(tokens.features), list(tokens.question)

    def longest(rows: list[torch.Tensor]) -> list[int]:
        norms = [float(row.abs().sum()) for row in rows]
        return ranked([snapped(value / (max(norms) or 1.0)) for value in norms])

    picked = longest(x)[: min(method.visual, keep)]
    pivots = [x[i] for i in picked] + [question[i] for i in longest(question)[: method.text]]
    wanted = keep - len(picked)
    due = [wanted // len(pivots) + (i < wanted % len(pivots)) for i in range(len(pivots))]
    for pivot, count in zip(pivots, due, strict=True):
        left = [i for i in range(len(x)) if i not in picked]
        picked += [left[i] for i in ranked([-cosine(x[j], pivot) for j in left])[:count]]
    return sorted(picked)


Place = tuple[int, int, int]


def beside(place: Place, left: set[Place], grid: tuple[int, int, int]) -> list[Place]:
    """Return the nearest remaining places above, below, left and right."""
    pair, y, x = place
    found = []
    for down, right in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        line = [(pair, y + step * down, x + step * right) for step in range(1, max(grid))]
        found += [at for at in line if at in left][:1]
    return found


def adjacent_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    places = [(pair, y, x) for pair in range(t) for y in range(h) for x in range(w)]
    feature = dict(zip(places, tokens.features, strict=True))
    left = set(places)

    def like(a: Place, b: Place) -> float:
        return cosine(feature[a], feature[b])

    before = {at: 1 - (1 - like(at, (at[0] - 1, *at[1:]))) for at in places if at[0]}
    for at in sorted(before, key=lambda at: (-before[at], at)):
        if before[at] > method.still and len(left) > keep:
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


def par_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
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
            if inside and cosine(x[i], x[i + step]) > method.link:
                old, new = sorted((cluster[i], cluster[i + step]), reverse=True)
                cluster = [new if c == old else c for c in cluster]
    value = [0.0] * len(x)
    for name in set(cluster):
        members = [i for i in range(len(x)) if cluster[i] == name]
        for place, best in enumerate(ranked([relevance[i] for i in members])):
            value[members[best]] = relevance[members[best]] / (1 + place)
    value = [float(torch.tensor(each, dtype=torch.float32)) for each in value]
    return sorted(ranked(value)[:keep])


def nuwa_line_by_line(tokens: Tokens, keep: int, cell: int, weak: float, reach: float):
    """Return the kept units, and the weighted units that each token is the mean of."""
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


# Methods that look at time, each compared with a line-by-line loop version of its specification.


def vidcom2_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    x = tokens.features.double()
    variance = [float((column - column.mean()).square().mean()) for column in tokens.features.T]
    channels = sorted(ranked([-value for value in variance])[: (len(variance) + 1) // 2])
    x = [row[channels] / row[channels].norm().clamp(min=1e-12) for row in x]
    grids = [range(grid * h * w, (grid + 1) * h * w) for grid in range(t)]

    def likeness(i: int, mean: torch.Tensor) -> float:
        return sum(math.exp(-float((x[i] - mean).square().sum()) / (2 * 2.0**k)) for k in range(-3, 2))

    of_video = [likeness(i, mean_of(x)) for i in range(len(x))]
    of_grid = [likeness(i, mean_of([x[j] for j in units])) for units in grids for i in units]
    means = [snapped(sum(of_video[i] for i in units) / len(units)) for units in grids]
    powers = [math.exp((min(means) - mean) / 0.01) for mean in means]
    wish = [keep / t * (1 + snapped(power / sum(powers)) - 1 / t) for power in powers]
    due, excess = [0] * t, True
    while excess:  # units that do not fit into a grid go to the others
        excess = [g for g in range(t) if not due[g] and wish[g] >= h * w - 1e-9]
        for g in excess:
            due[g], wish[g] = h * w, 0.0
        left, whole = keep - sum(due), sum(wish)
        wish = [value * left / whole if whole else 0.0 for value in wish]
    due = [full or math.floor(value + 1e-9) for full, value in zip(due, wish, strict=True)]
    rest = ranked([round(value - count, 9) if value else -9.0 for value, count in zip(wish, due, strict=True)])
    for g in rest[: keep - sum(due)]:
        due[g] += 1
    picked = []
    for units, count in zip(grids, due, strict=True):
        picked += [units[i] for i in ranked([-snapped(of_video[i] + of_grid[i]) for i in units])[:count]]
    return sorted(picked)


def transitions_line_by_line(tokens: Tokens) -> list[float]:
    t, h, w = tokens.grid
    pooled = [mean_of(list(tokens.features[g * h * w : (g + 1) * h * w])) for g in range(t)]
    return [cosine(a, b) for a, b in pairwise(pooled)]


def cut(after: set[int], transitions: list) -> list[list[int]]:
    """Return the frame pairs per segment, given the pairs after which segments end."""
    made = [[0]]
    for g in range(len(transitions)):
        if g in after:
            made.append([])
        made[-1].append(g + 1)
    return made


def segments_line_by_line(tokens: Tokens, least: int, threshold: float) -> list[list[int]]:
    like = transitions_line_by_line(tokens)
    return cut(
        set(ranked([-value for value in like])[: least - 1]) | {i for i, x in enumerate(like) if x < threshold}, like
    )


def distances_line_by_line(x: list[torch.Tensor]) -> tuple[list[list[int]], float]:
    """Return distances in steps of the root mean square length / 16384, and the step."""
    x = [each.double() for each in x]
    step = max(1e-30, math.sqrt(sum(float(a.square().sum()) for a in x) / len(x))) / 16384
    return [[round(float((a - b).norm()) / step) for b in x] for a in x], step


def peak_scores_line_by_line(x: list[torch.Tensor], neighbours: int) -> list[float]:
    n, (away, step) = len(x), distances_line_by_line(x)
    near = [sorted(away[i])[:neighbours] for i in range(n)]  # each point is its own nearest neighbour
    sparse = [sum(d * d for d in each) / len(each) for each in near]
    score = []
    for i in range(n):
        denser = [j for j in range(n) if sparse[j] < sparse[i] or (sparse[j] == sparse[i] and j < i)]
        apart = min(away[i][j] for j in denser) if denser else max(map(max, away))
        score.append(snapped((math.log(apart) if apart else -math.inf) - sparse[i] * step * step / len(x[0])))
    return score


def peaks_line_by_line(x: list[torch.Tensor], count: int, neighbours: int) -> list[int]:
    return sorted(ranked(peak_scores_line_by_line(x, neighbours))[:count]) if count else []


@examples(80)
def test_density_peaks(grid, kind, seed, data):
    n, neighbours = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    x, count = features_of(kind, n, seed), data.draw(st.integers(0, n))
    assert peaks(x, count, neighbours).tolist() == peaks_line_by_line(list(x), count, neighbours)


def test_density_peaks_in_blocks(monkeypatch):
    x = features_of("duplicates", 90, width=4)
    whole = peak_scores(x, 5)
    monkeypatch.setattr(shared, "BLOCK", 16)
    assert torch.equal(peak_scores(x, 5), whole)


@pytest.mark.parametrize("length", [1e-3, 1.0, 1e3])
def test_long_tokens_have_peaks_too(length):
    """Densities of long tokens underflow, and densities of short tokens are all close to 1."""
    x = 10 * torch.eye(3, 4).repeat_interleave(2, 0)
    x[1::2, 3] = 0.1
    assert peaks(length * x, 3, 2).tolist() == [0, 2, 4]


def in_turn(total: int, most: list[int]) -> list[int]:
    """Distribute one each in turn, while there is room."""
    counts = [0] * len(most)
    while sum(counts) < min(total, sum(most)):
        for i in range(len(most)):
            counts[i] += counts[i] < most[i] and sum(counts) < total
    return counts


def fastvid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention, like = [snapped(float(value)) for value in tokens.attention], transitions_line_by_line(tokens)
    due, members, centres = shares(keep, t), {}, []
    for piece in segments_line_by_line(tokens, method.segments, method.threshold):
        total = sum(due[g] for g in piece)
        # Frame pairs that are too similar to the next one of the segment keep nothing.
        new = [g for g in piece if g == piece[-1] or like[g] < method.ignore]
        anchors, stays, peaked = new[::-1][:: method.every], [], []
        context = min(total, max(1, int((1 - method.salient) * total)))
        wanted = dict(zip(anchors, in_turn(context, [n // 2] * len(anchors)), strict=True))
        salient = in_turn(total - context, [n - wanted.get(g, 0) for g in new])
        for g, count in zip(new, salient, strict=True):
            units = list(range(g * n, (g + 1) * n))
            stays += [units[i] for i in ranked([attention[i] for i in units])[:count]]
        for g in anchors:
            free = [i for i in range(g * n, (g + 1) * n) if i not in stays]
            peaked += [free[i] for i in peaks_line_by_line([x[i] for i in free], wanted[g], 4)]
        rest = [i for g in piece for i in range(g * n, (g + 1) * n) if i not in stays + peaked]
        more = [rest[i] for i in ranked([attention[i] for i in rest])[: total - len(stays) - len(peaked)]]
        members |= {i: [] for i in stays + peaked + more}
        centres += peaked
        for i in rest:
            if i not in more and peaked:
                members[peaked[first_of([cosine(x[i], x[j]) for j in peaked], max)]].append(i)
    members_of = {}
    for i, others in members.items():
        own = max(1 / (len(others) + 1), method.centre) if others else 1.0
        members_of[i] = [(i, own)] + [(j, (1 - own) / len(others)) for j in others]
    return members_of


def mmg_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    n, x, like = tokens.grid[1] * tokens.grid[2], list(tokens.features), transitions_line_by_line(tokens)
    pieces = segments_line_by_line(tokens, 1, method.threshold)
    made, number = [], 0
    # A lone grid joins the previous one if that is at least as similar or the only one, otherwise the next.
    while number < len(pieces):
        piece = pieces[number]
        while len(piece) == 1 and number + 1 < len(pieces) and (not made or like[piece[-1]] > like[piece[0] - 1]):
            number += 1
            piece = piece + pieces[number]
        if len(piece) == 1 and made:
            made[-1] = made[-1] + piece
        else:
            made.append(piece)
        number += 1
    means = [mean_of([x[i] for g in piece for i in range(g * n, (g + 1) * n)]) for piece in made]
    gains, order = {}, []
    while len(order) < len(made):
        now = {
            s: cosine(means[s], mean_of(x))
            - method.beta * max((cosine(means[s], means[o]) for o in order), default=0.0)
            for s in range(len(made))
            if s not in order
        }
        best = max(now, key=lambda s: (now[s], -s))
        gains[best] = now[best]
        order.append(best)
    weight = [len(piece) * math.exp(gains[s]) for s, piece in enumerate(made)]
    due = apportion(keep, weight, [len(piece) * n for piece in made])
    kept = []
    for piece, total in zip(made, due, strict=True):
        before: list[int] = []
        for g, count in zip(piece, shares(total, len(piece)), strict=True):
            units = range(g * n, (g + 1) * n)
            score = peak_scores_line_by_line([x[i] for i in units], 7)
            if before:
                score = [
                    snapped(s + float((1 - torch.tensor(max(cosine(x[i], x[j]) for j in before))).log()))
                    for s, i in zip(score, units, strict=True)
                ]
            before = sorted(units[i] for i in ranked(score)[:count])
            kept += before
    return kept


def clustered_line_by_line(x: list[torch.Tensor], count: int, neighbours: int) -> dict[int, list[int]]:
    """Return the members per cluster, keyed by its peak."""
    members = {i: [i] for i in peaks_line_by_line(x, count, neighbours)}
    centres, (away, _) = list(members), distances_line_by_line(x)
    for i in range(len(x)):
        if i not in centres:
            members[centres[first_of([away[i][j] for j in centres], min)]].append(i)
    return members


def few_clustered_line_by_line(x: list[torch.Tensor], count: int, neighbours: int) -> dict[int, list[int]]:
    """Cluster like `clustered_line_by_line`, with at most as many neighbours as peaks, but at least two."""
    return clustered_line_by_line(x, count, min(neighbours, max(count, 2)))


def in_proportion(total: int, sizes: list[int]) -> list[int]:
    """Return proportional shares: rounded down, then one more for the groups that lost most."""
    exact = [total * size / sum(sizes) for size in sizes]
    due = [math.floor(value + 1e-9) for value in exact]
    for i in ranked([round(value - count, 9) for value, count in zip(exact, due, strict=True)])[: total - sum(due)]:
        due[i] += 1
    return due


def folded_line_by_line(label: list[int]) -> list[int]:
    """Return labels after folding: runs of one frame pair, or not the longest of their cluster, join a neighbour."""
    start = [max(i for i in range(g + 1) if i == 0 or label[i] != label[i - 1]) for g in range(len(label))]
    length = [start.count(start[g]) for g in range(len(label))]
    stays = [
        length[g] > 1 and length[g] == max(length[i] for i in range(len(label)) if label[i] == label[g])
        for g in range(len(label))
    ]
    label = [each if stay else None for each, stay in zip(label, stays, strict=True)]
    while None in label:
        first = label.index(None)
        last = first
        while last + 1 < len(label) and label[last + 1] is None:
            last += 1
        before, after = label[:first][::-1], label[last + 1 :]
        left, right = (next((len(list(run)) for _, run in groupby(side)), 0) for side in (before, after))
        label[first : last + 1] = [(before or after or [0])[0] if left >= right else after[0]] * (last + 1 - first)
    return label


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=16))
def test_prunevid_folds_short_runs(cluster):
    label = folded_line_by_line(cluster)
    assert folded(cluster) == [len(list(run)) for _, run in groupby(label)] and sum(folded(cluster)) == len(cluster)


def prunevid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    pooled = [mean_of(list(x[g * n : (g + 1) * n])) for g in range(t)]
    clusters = clustered_line_by_line(pooled, max(1, int(method.scenes * t)), 7)
    label = folded_line_by_line([next(c for c, members in clusters.items() if g in members) for g in range(t)])
    pieces = cut({g for g in range(t - 1) if label[g] != label[g + 1]}, label[1:])
    steady = {}
    for piece in pieces:
        for place in range(n) if len(piece) > 1 else ():
            unit = [x[g * n + place] / x[g * n + place].norm().clamp(min=1e-12) for g in piece]
            pairs = [float(a @ b) for i, a in enumerate(unit) for b in unit[i + 1 :]]
            steady[piece[0], place] = snapped(sum(pairs) / len(pairs))
    length = {piece[0]: len(piece) for piece in pieces}
    still = [at for at in steady if steady[at] > method.static]
    saved = sum(length[first] - 1 for first, _ in still)
    if t * n - saved <= keep:
        members_of = {i: [(i, 1.0)] for i in range(t * n)}
        missing = t * n - keep
        for first, place in sorted(still, key=lambda at: -steady[at]):
            for g in range(first + 1, first + length[first]):
                if missing:
                    members_of[first * n + place] += members_of.pop(g * n + place)
                    missing -= 1
        return members_of
    groups = []
    for piece in pieces:
        places = [place for first, place in still if first == piece[0]]
        groups.append([[g * n + place for g in piece] for place in places])
        groups += [[[g * n + place] for place in range(n) if place not in places] for g in piece]
    members_of = {}
    for group, count in zip(groups, in_proportion(keep, [len(group) for group in groups]), strict=True):
        if count:
            means = [mean_of([x[i] for i in units]) for units in group]
            for centre, members in few_clustered_line_by_line(means, count, 7).items():
                members_of[group[centre][0]] = [(i, 1 / len(group[j])) for j in members for i in group[j]]
    return members_of


def diverse_line_by_line(x: list[torch.Tensor], attention: list[float], keep: int) -> list[int]:
    n = len(x)
    far = [[snapped(attention[j] * (1 - cosine(x[i], x[j]))) for j in range(n)] for i in range(n)]
    alone = [snapped(2 * value) for value in attention]
    start = [min([far[i][j] for i in range(n) if i != j], default=alone[j]) for j in range(n)]
    picked = [first_of(start, max)] if keep else []
    while len(picked) < keep:
        picked.append(first_of([-1.0 if j in picked else min(far[i][j] for i in picked) for j in range(n)], max))
    return picked


def flashvid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention = [snapped(float(value)) for value in tokens.attention]
    due, members_of = shares(keep, t), {}
    for piece in segments_line_by_line(tokens, method.segments, method.threshold):
        total, stays = sum(due[g] for g in piece), []
        for g, count in zip(piece, shares(int(method.diverse * total + 0.5), len(piece)), strict=True):
            units = range(g * n, (g + 1) * n)
            picked = diverse_line_by_line([x[i] for i in units], [attention[i] for i in units], count)
            stays += [units[i] for i in picked]
        members_of |= {i: [(i, 1.0)] for i in stays}
        wanted = total - len(stays)
        rest = [i for g in piece for i in range(g * n, (g + 1) * n) if i not in stays]
        if not wanted:
            continue
        links = []
        for i in rest:
            before = [j for j in rest if j // n == i // n - 1]
            if before:
                like = [cosine(x[i], x[j]) for j in before]
                links.append((max(like), i, before[first_of(like, max)]))
        links = [link for link in sorted(links, key=lambda link: (-link[0], link[1])) if link[0] > method.link]
        parent = {i: j for _, i, j in links[: len(rest) - wanted]}
        trees: dict[int, list[int]] = {}
        for i in rest:
            root = i
            while root in parent:
                root = parent[root]
            trees.setdefault(root, []).append(i)
        means = {root: mean_of([x[i] for i in members]) for root, members in trees.items()}
        of_grid = [[root for root in sorted(trees) if root // n == g] for g in piece]
        for roots, count in zip(of_grid, in_proportion(wanted, [len(roots) for roots in of_grid]), strict=True):
            clusters = {i: [i] for i in range(len(roots))}
            if count < len(roots):
                clusters = few_clustered_line_by_line([means[r] for r in roots], count, 7) if count else {}
            for centre, members in clusters.items():
                members_of[roots[centre]] = [(i, 1 / len(trees[roots[j]])) for j in members for i in trees[roots[j]]]
    return members_of


def most_saving_line_by_line(same: list[list[bool]]) -> tuple[int, list[list[int]]]:
    """Return the number of tokens that the best segments save, and the segments; ties go to segments that begin last."""
    ways = []
    for cuts in product([False, True], repeat=len(same)):
        pieces = cut({g for g in range(len(same)) if cuts[g]}, cuts)
        still = [sum(map(all, zip(*(same[g] for g in piece[:-1]), strict=True))) for piece in pieces]
        saves = sum(count * (len(piece) - 1) for count, piece in zip(still, pieces, strict=True))
        ways.append((saves, [piece[0] for piece in pieces[::-1]], pieces))
    saved, _, pieces = max(ways)
    return saved, pieces


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.integers(0, 999))
def test_holitom_cuts_where_it_costs_least(pairs, places, seed):
    same = torch.rand(pairs, places, generator=torch.Generator().manual_seed(seed)) < 0.6
    assert [list(span) for span in most_saving(same)] == most_saving_line_by_line(same.tolist())[1]


def holitom_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention = [snapped(float(value)) for value in tokens.attention]
    like = [[cosine(x[g * n + p], x[(g + 1) * n + p]) for p in range(n)] for g in range(t - 1)]

    def still(piece: list[int]) -> list[int]:
        return [p for p in range(n) if len(piece) > 1 and all(like[g][p] > method.static for g in piece[:-1])]

    saved, pieces = most_saving_line_by_line([[value > method.static for value in of_pair] for of_pair in like])
    if t * n - saved <= keep:
        members_of, missing = {i: [(i, 1.0)] for i in range(t * n)}, t * n - keep
        places = [(min(like[g][p] for g in piece[:-1]), piece, p) for piece in pieces for p in still(piece)]
        for _, piece, p in sorted(places, key=lambda place: -place[0]):
            for g in piece[1:]:
                if missing:
                    members_of[piece[0] * n + p] += members_of.pop(g * n + p)
                    missing -= 1
        return members_of
    groups = [[[g * n + p for g in piece] for p in still(piece)] for piece in pieces]
    groups += [[[g * n + p] for p in range(n) if p not in still(piece)] for piece in pieces for g in piece]
    members_of, due = {}, in_proportion(keep, [len(group) for group in groups])
    for number, (group, count) in enumerate(zip(groups, due, strict=True)):
        if number >= len(pieces):
            for i in ranked([attention[units[0]] for units in group])[:count]:
                members_of[group[i][0]] = [(group[i][0], 1.0)]
        elif count:
            means = [mean_of([x[i] for i in units]) for units in group]
            for centre, members in few_clustered_line_by_line(means, count, 7).items():
                others = [j for j in members if j != centre]
                weight = {j: (1 - method.centre) / len(others) for j in others} | {
                    centre: method.centre if others else 1.0
                }
                members_of[group[centre][0]] = [(i, weight[j] / len(group[j])) for j in members for i in group[j]]
    return members_of


def vcast_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    n = h * w
    x = [row.double() for row in tokens.features]
    frames = [x[f * n : (f + 1) * n] for f in range(t)]

    def cos(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(a @ b / (a.norm().clamp(min=1e-6) * b.norm().clamp(min=1e-6)))

    vectors = [mean_of(frame) / mean_of(frame).norm().clamp(min=1e-6) for frame in frames]
    changes = [b - a if (b - a).norm() >= 1e-4 else 0 * a for a, b in pairwise(vectors)]
    curve = [1.0, *(1 - cos(a, b) for a, b in pairwise(changes)), 1.0][:t]
    power = [math.exp(snapped(c) / method.temperature) for c in curve]
    least = min(1, keep // t)
    due = [least + c for c in apportion(keep - least * t, [p / sum(power) for p in power], [n - least] * t)]
    kept = []
    for f, frame in enumerate(frames):
        norms = [float(token.norm()) for token in frame]
        low, high = min(norms), max(norms)
        score = [1 - cos(a, vectors[f]) + (v - low) / (high - low + 1e-6) for a, v in zip(frame, norms, strict=True)]
        kept += [f * n + i for i in ranked([snapped(value) for value in score])[: due[f]]]
    return sorted(kept)


def rests(x: torch.Tensor, random: torch.Generator) -> None:
    """Make some places of `x`, `[T, n, D]`, stand still."""
    still = torch.rand(x.shape[1], generator=random) < 0.6
    x[:, still] = x[:1, still] + 0.2 * x[:, still]


def goes_on(x: torch.Tensor, random: torch.Generator) -> None:
    """Make some places continue with small changes."""
    for before, now in pairwise(x):
        still = torch.rand(len(now), generator=random) < 0.7
        now[still] = before[still] + 0.1 * now[still]


def moves(x: torch.Tensor, random: torch.Generator) -> None:
    """Shift everything by one place per frame pair."""
    x[1:] = 0.7 * x[:-1].roll(1, 1) + 0.3 * x[1:]


# Settings to draw from; for methods that look at time, also the change in the video.
SPECIFIED = {
    "mmr": (mmr_line_by_line, {"importance": ["attention", "keynorm"], "lam": [0.0, 0.3, 0.5, 1.0]}),
    "visionzip": (visionzip_line_by_line, {"dominant": [0.0, 0.5, 0.85, 1.0]}),
    "scope": (scope_line_by_line, {"alpha": [0.0, 0.5, 1.0, 2.0]}),
    "vispruner": (vispruner_line_by_line, {"important": [0.0, 0.5, 0.8, 1.0], "step": [1, 2, 8]}),
    "cdpruner": (cdpruner_line_by_line, {"question": [True, False], "negative": [True, False]}),
    "dart": (dart_line_by_line, {"visual": range(6), "text": range(5)}),
    "adjacent": (adjacent_line_by_line, {"still": [1.0, 0.9, 0.2, -1.0]}),
    "par": (par_line_by_line, {"link": [0.8, 0.3, -1.0, 1.0]}),
    "vidcom2": (vidcom2_line_by_line, {}),
    "vcast": (vcast_line_by_line, {"temperature": [0.7, 0.1]}, None),
    "fastvid": (
        fastvid_line_by_line,
        {"segments": range(1, 9), "every": range(1, 5), "salient": [0.0, 0.6, 1.0], "ignore": [0.1, 0.95, 1.0]}
        | {"threshold": [-1.0, 0.84]},
        None,
    ),
    "mmg": (mmg_line_by_line, {"threshold": [-0.5, 0.5, 0.95], "beta": [0.0, 0.5, 1.0]}, None),
    "prunevid": (prunevid_line_by_line, {"scenes": [0.0, 0.25, 1.0]}, rests),
    "flashvid": (
        flashvid_line_by_line,
        {"segments": range(1, 5), "diverse": [0.0, 0.7, 1.0], "threshold": [0.9, -1.0]},
        moves,
    ),
    "holitom": (holitom_line_by_line, {"static": [0.8, 0.99, -1.0]}, goes_on),
}


@pytest.mark.parametrize("name", SPECIFIED)
@examples()
def test_it_selects_what_its_specification_says(name, grid, kind, seed, data):
    specified, settings, *time = SPECIFIED[name]
    if time:
        grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    given = {setting: data.draw(st.sampled_from(values)) for setting, values in settings.items()}
    assume(given.get("visual", 1) or given["text"])  # without either, there is no criterion
    if any(time):
        x = tokens.features.clone().view(grid[0], -1, tokens.features.shape[1])
        time[0](x, torch.Generator().manual_seed(seed))
        tokens = replace(tokens, rows=x.flatten(0, 1))
    method = methods.get(":".join([name, *(f"{setting}={value}" for setting, value in given.items())]))
    made, expected = method.select(tokens, keep), specified(tokens, keep, method)
    if isinstance(expected, list):
        assert made.kept.tolist() == expected
    else:
        assert_means(made, tokens, keep, expected)

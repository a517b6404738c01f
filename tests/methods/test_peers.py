"""The peers' methods, each against its specification followed line by line in loops, on random and on adversarial input."""

import math
from dataclasses import replace
from itertools import accumulate, pairwise, product
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.base import Selection, Tokens
from evoprune.methods.holitom import most_saving
from evoprune.methods.mmg import joined, marginal_gains
from evoprune.methods.mmr import most_relevant
from evoprune.pruning import density
from evoprune.pruning.budget import apportion
from evoprune.pruning.density import peak_scores, peaks
from evoprune.pruning.score import settle
from evoprune.pruning.segments import segments, transitions
from tests.methods.tokens import KINDS, chosen, cosine, features_of, first_of, ranked, scaled, settled, tokens_of

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def examples(count: int = 120):
    """The same examples every time: at the edge of rounding the last bits of two ways to compute a score decide."""

    def decorate(test):
        test = given(grids, st.sampled_from(KINDS), st.integers(0, 1000), st.data())(test)
        return settings(max_examples=count, deadline=None, derandomize=True)(test)

    return decorate


def shares(keep: int, count: int) -> list[int]:
    """`keep` over `count` grids, the rounded means of what is due so far."""
    due = [grid * keep // count for grid in range(count + 1)]
    return [later - before for before, later in pairwise(due)]


def assert_selects(name: str, tokens: Tokens, keep: int, parties: dict[int, list[tuple[int, float]]]) -> None:
    """`parties`: of each kept unit, whose mean it becomes, with weights."""
    made = methods.get(name).select(tokens, keep)
    assert made.kept.tolist() == sorted(parties) and len(parties) == keep
    owner = [-1] * len(tokens.owner)
    for number, unit in enumerate(sorted(parties)):
        for member, _ in parties[unit]:
            owner[member] = number
    assert made.owner.tolist() == owner
    x = tokens.features
    for unit, token in zip(sorted(parties), made.features(x), strict=True):
        total = sum(weight for _, weight in parties[unit])
        mean = sum(weight * x[member].double() for member, weight in parties[unit]) / total
        torch.testing.assert_close(token.double(), mean, atol=1e-5, rtol=1e-5)


# --- mmr ---------------------------------------------------------------------------------------------------------------


def mmr_line_by_line(x: torch.Tensor, importance: list[float], keep: int, lam: float) -> list[int]:
    n = len(x)
    importance = [settled(value) for value in scaled(importance)]
    cos = [[cosine(a, b) for b in x] for a in x]
    picked = [first_of([settled(lam * value) for value in importance], max)]
    while len(picked) < keep:
        score = [settled(lam * importance[i] - (1 - lam) * max(cos[i][j] for j in picked)) for i in range(n)]
        picked.append(first_of([-9.0 if i in picked else score[i] for i in range(n)], max))
    return sorted(picked)


@examples()
def test_mmr(grid, kind, seed, data):
    keep, lam = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    tokens = tokens_of(kind, grid, seed)
    for name, importance in (("attention", tokens.attention), ("keynorm", tokens.keys.norm(dim=1))):
        expected = mmr_line_by_line(tokens.features, importance.tolist(), keep, lam)
        assert chosen(f"mmr:importance={name}:lam={lam}", tokens, keep) == expected


def test_mmr_with_any_importance():
    x, importance = features_of("random", 30), torch.arange(30.0) * 1000 - 7
    assert most_relevant(x, importance, 5, lam=1.0).tolist() == [25, 26, 27, 28, 29]
    assert most_relevant(x, importance.half(), 9).tolist() == mmr_line_by_line(x, importance.half().tolist(), 9, 0.5)
    assert most_relevant(torch.eye(4).repeat(2, 1), torch.ones(8), 4, lam=0.2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("argument", "text"), [("lam", "1.1"), ("lam", "nan"), ("importance", "queries")])
def test_mmr_refuses_what_makes_no_sense(argument, text):
    with pytest.raises(UsageError, match=argument):
        methods.get("mmr", {argument: text})


# --- visionzip ---------------------------------------------------------------------------------------------------------


def visionzip_line_by_line(tokens: Tokens, keep: int, share: float) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    parties: dict[int, list[tuple[int, float]]] = {}
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        if not due:
            continue
        attention = [settled(float(tokens.attention[i])) for i in units]
        dominant = [units[i] for i in ranked(attention)[: round(share * due)]]
        rest = [i for i in units if i not in dominant]
        count = due - len(dominant)
        targets = [rest[i * len(rest) // count] for i in range(count)]
        parties |= {i: [(i, 1.0)] for i in dominant + targets}
        for i in rest:
            if i not in targets and targets:
                like = [cosine(tokens.keys[i], tokens.keys[j]) for j in targets]
                parties[targets[first_of(like, max)]].append((i, 1.0))
    return parties


@examples()
def test_visionzip(grid, kind, seed, data):
    keep, share = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.5, 0.85, 1.0]))
    tokens = tokens_of(kind, grid, seed)
    name = f"visionzip:dominant={share}"
    assert_selects(name, tokens, keep, visionzip_line_by_line(tokens, keep, share))


def test_visionzip_by_hand():
    """64 of 576: 54 dominant ones, and 10 that take in all others."""
    tokens = tokens_of("random", (1, 24, 24))
    made = methods.get("visionzip").select(tokens, 64)
    sizes = torch.bincount(made.owner, minlength=64)
    assert isinstance(made, Selection) and (sizes == 1).sum() >= 54 and sizes.sum() == 576
    top = tokens.attention.topk(54).indices
    assert torch.isin(top, made.kept).all() and (sizes[made.owner[top]] == 1).all()


# --- scope -------------------------------------------------------------------------------------------------------------


def scope_line_by_line(tokens: Tokens, keep: int, alpha: float) -> list[int]:
    x, n = tokens.features, len(tokens.features)
    cos = [[cosine(a, b) for b in x] for a in x]
    saliency = [settled(float(value)) ** alpha for value in tokens.attention]
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
    assert chosen(f"scope:alpha={alpha}", tokens, keep) == scope_line_by_line(tokens, keep, alpha)


@pytest.mark.parametrize("kind", ["random", "duplicates", "drift"])
def test_scope_over_many_tokens(kind):
    """More than are brought up to date at a time, and more than a block."""
    tokens = tokens_of(kind, (3, 14, 15), width=4)
    x = torch.nn.functional.normalize(tokens.features, dim=1)
    cos, saliency = settle(x @ x.T).double(), settle(tokens.attention).double()
    cover, picked = torch.zeros(630, dtype=torch.float64), []
    for _ in range(60):
        gain = (cos - cover).clamp(min=0).sum(1) * saliency
        gain[picked] = -1
        picked.append(int(gain.argmax()))
        cover = torch.maximum(cover, cos[picked[-1]])
    assert chosen("scope", tokens, 60) == sorted(picked)


def test_scope_needs_no_attention_where_it_does_not_count():
    assert methods.get("scope").needs == {"attention"} and methods.get("scope:alpha=0").needs == set()
    with pytest.raises(UsageError, match="alpha"):
        methods.get("scope:alpha=-1")


# --- vispruner ---------------------------------------------------------------------------------------------------------


def vispruner_line_by_line(tokens: Tokens, keep: int, share: float, step: int) -> list[int]:
    t, h, w = tokens.grid
    x, picked = tokens.features, []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        order = [units[i] for i in ranked([settled(float(tokens.attention[i])) for i in units])]
        important = int(share * due + 0.5)
        picked += order[:important]
        rest = order[important:] if due > important else []
        while len(rest) > due - important:
            like = {i: max(cosine(x[i], x[j]) for j in rest[1::2]) for i in rest[::2]}
            going = sorted(like, key=lambda i: (-like[i], -rest.index(i)))[: min(step, len(rest) - (due - important))]
            rest = [i for i in rest if i not in going]
        picked += rest
    return sorted(picked)


@examples()
def test_vispruner(grid, kind, seed, data):
    keep, share = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.5, 0.8, 1.0]))
    step, tokens = data.draw(st.sampled_from([1, 2, 8])), tokens_of(kind, grid, seed)
    expected = vispruner_line_by_line(tokens, keep, share, step)
    assert chosen(f"vispruner:important={share}:step={step}", tokens, keep) == expected


def test_vispruner_keeps_what_is_attended_to():
    tokens = tokens_of("random", (1, 8, 8))
    top = tokens.attention.topk(8).indices.tolist()
    assert set(top) <= set(chosen("vispruner", tokens, 16)) and chosen("vispruner:important=1", tokens, 8) == sorted(
        top
    )
    for argument, text in (("important", "-0.1"), ("step", "0")):
        with pytest.raises(UsageError, match=argument):
            methods.get("vispruner", {argument: text})


# --- cdpruner ----------------------------------------------------------------------------------------------------------


def cdpruner_line_by_line(tokens: Tokens, keep: int, question: bool) -> list[int]:
    t, h, w = tokens.grid
    picked = []
    for grid, due in enumerate(shares(keep, t)):
        units = range(grid * h * w, (grid + 1) * h * w)
        x = [tokens.features[i] / tokens.features[i].norm().clamp(min=1e-12) for i in units]
        asked = [q / q.norm().clamp(min=1e-12) for q in tokens.question]
        weight = [1.0] * len(x)
        if question:
            weight = [settled(sum(float(a @ q) for q in asked) / len(asked)) for a in x]
            weight = [max(value, 1 / 128) for value in scaled(weight)] if max(weight) > min(weight) else [1.0] * len(x)
        kernel = [[weight[i] * weight[j] * x[i].double() @ x[j].double() for j in range(len(x))] for i in range(len(x))]
        kernel = torch.tensor(kernel, dtype=torch.float64)
        some = []
        for _ in range(due):
            inner = torch.linalg.pinv(kernel[some][:, some], hermitian=True, atol=1e-5)
            gain = [float(kernel[i, i] - kernel[i, some] @ inner @ kernel[some, i]) for i in range(len(x))]
            gain = [settled(value) for value in gain]
            some.append(first_of([-1.0 if i in some else max(gain[i], 0.0) for i in range(len(x))], max))
        picked += [units[i] for i in some]
    return sorted(picked)


@examples()
def test_cdpruner(grid, kind, seed, data):
    keep, question = data.draw(st.integers(1, prod(grid))), data.draw(st.booleans())
    tokens = tokens_of(kind, grid, seed)
    expected = cdpruner_line_by_line(tokens, keep, question)
    assert chosen(f"cdpruner:question={question}", tokens, keep) == expected


def test_cdpruner_follows_the_question():
    """Two of the directions are asked about; those come first, whatever the others."""
    x, grid = torch.eye(8), (1, 2, 4)
    tokens = tokens_of("random", grid)
    asked = Tokens(x, tokens.owner, grid, 1.0, 0, {"question": x[[2, 5]] + 0.1 * x[[3, 3]]})
    assert chosen("cdpruner", asked, 2) == [2, 5] and chosen("cdpruner", asked, 3) == [2, 3, 5]
    assert methods.get("cdpruner").reads_question and not methods.get("cdpruner:question=false").reads_question
    assert chosen("cdpruner:question=false", replace(asked, given={}), 2) == [0, 1]
    with pytest.raises(TypeError, match="question"):
        chosen("cdpruner", replace(asked, given={}), 2)


def test_cdpruner_when_everything_is_spanned():
    """More tokens than dimensions: no NaN, the count holds, and the rest goes by index."""
    x = features_of("random", 30, width=4)
    tokens = Tokens(x, torch.arange(30), (1, 5, 6), 1.0, 0)
    first = chosen("cdpruner:question=false", tokens, 4)
    more = chosen("cdpruner:question=false", tokens, 12)
    assert set(first) <= set(more) and sorted(set(range(30)) - set(first))[:8] == sorted(set(more) - set(first))


# --- vidcom2 -----------------------------------------------------------------------------------------------------------


def mean_of(vectors: list[torch.Tensor]) -> torch.Tensor:
    return sum(vectors) / len(vectors)


def vidcom2_line_by_line(tokens: Tokens, keep: int) -> list[int]:
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
    means = [settled(sum(of_video[i] for i in units) / len(units)) for units in grids]
    powers = [math.exp((min(means) - mean) / 0.01) for mean in means]
    wish = [keep / t * (1 + settled(power / sum(powers)) - 1 / t) for power in powers]
    due, excess = [0] * t, True
    while excess:  # what a grid cannot hold goes to the others
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
        picked += [units[i] for i in ranked([-settled(of_video[i] + of_grid[i]) for i in units])[:count]]
    return sorted(picked)


@examples()
def test_vidcom2(grid, kind, seed, data):
    keep = data.draw(st.integers(1, prod(grid)))
    tokens = tokens_of(kind, grid, seed)
    assert chosen("vidcom2", tokens, keep) == vidcom2_line_by_line(tokens, keep)


def test_vidcom2_gives_more_to_a_grid_that_is_unlike_the_others():
    tokens = tokens_of("random", (4, 3, 4))
    x = 3 + tokens.features[:12].repeat(4, 1)
    x[24:36] *= -1
    kept = chosen("vidcom2", replace(tokens, rows=x), 24)
    counts = [sum(i // 12 == grid for i in kept) for grid in range(4)]
    assert counts[2] > max(counts[0], counts[1], counts[3]) and sum(counts) == 24


# --- segments and density peaks ----------------------------------------------------------------------------------------


def segments_line_by_line(tokens: Tokens, least: int, threshold: float) -> list[list[int]]:
    t, h, w = tokens.grid
    pooled = [mean_of(list(tokens.features[g * h * w : (g + 1) * h * w])) for g in range(t)]
    like = [cosine(a, b) for a, b in pairwise(pooled)]
    cuts = set(ranked([-value for value in like])[: least - 1]) | {i for i in range(t - 1) if like[i] < threshold}
    made = [[0]]
    for g in range(1, t):
        if g - 1 in cuts:
            made.append([])
        made[-1].append(g)
    return made


@examples(60)
def test_segments(grid, kind, seed, data):
    tokens = tokens_of(kind, (data.draw(st.integers(1, 9)), 1, grid[2]), seed)
    least, threshold = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([-1.0, 0.0, 0.84]))
    made = segments(transitions(tokens), least, threshold)
    assert [list(part) for part in made] == segments_line_by_line(tokens, least, threshold)
    assert len(made) >= min(least, tokens.grid[0])


def peak_scores_line_by_line(x: list[torch.Tensor], neighbours: int) -> list[float]:
    n = len(x)
    square = [[max(0.0, 2 - 2 * cosine(a, b)) for b in x] for a in x]
    density = []
    for i in range(n):
        near = sorted(square[i][j] for j in range(n) if j != i)[:neighbours]
        density.append(settled(math.exp(-sum(near) / len(near))) if near else 1.0)
    score = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        apart = min(square[i][j] for j in denser) if denser else max(square[i])
        score.append(settled(density[i] * math.sqrt(apart)))
    return score


def peaks_line_by_line(x: list[torch.Tensor], count: int, neighbours: int) -> list[int]:
    return sorted(ranked(peak_scores_line_by_line(x, neighbours))[:count])


@examples(80)
def test_density_peaks(grid, kind, seed, data):
    n, neighbours = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 9))
    x, count = features_of(kind, n, seed), data.draw(st.integers(0, n))
    unit = torch.nn.functional.normalize(x, dim=1)
    assert peaks(unit, count, neighbours).tolist() == peaks_line_by_line(list(x), count, neighbours)


def test_density_peaks_in_blocks(monkeypatch):
    x = torch.nn.functional.normalize(features_of("duplicates", 90, width=4), dim=1)
    whole = peak_scores(x, 5)
    monkeypatch.setattr(density, "BLOCK", 16)
    assert torch.equal(peak_scores(x, 5), whole)


def test_of_equal_tokens_one_is_a_peak():
    unit = torch.eye(3).repeat_interleave(4, 0)
    assert peaks(unit, 3, 2).tolist() == [0, 4, 8]


# --- fastvid -----------------------------------------------------------------------------------------------------------


def fastvid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention = [settled(float(value)) for value in tokens.attention]
    due, members, centres = shares(keep, t), {}, []
    for part in segments_line_by_line(tokens, method.segments, method.threshold):
        total = sum(due[g] for g in part)
        salient = shares(int(method.salient * total + 0.5), len(part))
        stays = []
        for g, count in zip(part, salient, strict=True):
            units = list(range(g * n, (g + 1) * n))
            stays += [units[i] for i in ranked([attention[i] for i in units])[:count]]
        anchors, peaked = part[:: method.every], []
        rooms = [n - salient[part.index(g)] for g in anchors]
        wanted = [0] * len(anchors)
        while sum(wanted) < min(total - len(stays), sum(rooms)):  # one each in turn, as long as there is room
            for i in range(len(anchors)):
                if wanted[i] < rooms[i] and sum(wanted) < min(total - len(stays), sum(rooms)):
                    wanted[i] += 1
        for g, count in zip(anchors, wanted, strict=True):
            free = [i for i in range(g * n, (g + 1) * n) if i not in stays]
            peaked += [free[i] for i in peaks_line_by_line([x[i] for i in free], count, method.neighbours)]
        rest = [i for g in part for i in range(g * n, (g + 1) * n) if i not in stays + peaked]
        more = [rest[i] for i in ranked([attention[i] for i in rest])[: total - len(stays) - len(peaked)]]
        members |= {i: [] for i in stays + peaked + more}
        centres += peaked
        for i in rest:
            if i not in more and peaked:
                members[peaked[first_of([cosine(x[i], x[j]) for j in peaked], max)]].append(i)
    parties = {}
    for i, others in members.items():
        own = max(1 / (len(others) + 1), method.centre) if others else 1.0
        parties[i] = [(i, own)] + [(j, (1 - own) / len(others)) for j in others]
    return parties


@examples()
def test_fastvid(grid, kind, seed, data):
    grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    name = (
        f"fastvid:segments={data.draw(st.integers(1, 8))}:every={data.draw(st.integers(1, 4))}"
        f":salient={data.draw(st.sampled_from([0.0, 0.6, 1.0]))}"
    )
    assert_selects(name, tokens, keep, fastvid_line_by_line(tokens, keep, methods.get(name)))


def test_fastvid_refuses_what_makes_no_sense():
    for text in ("salient=1.1", "centre=0", "threshold=2", "segments=0", "every=0", "neighbours=0"):
        with pytest.raises(UsageError):
            methods.get(f"fastvid:{text}")


# --- mmg ---------------------------------------------------------------------------------------------------------------


def mmg_line_by_line(tokens: Tokens, keep: int, method) -> list[int]:
    t, h, w = tokens.grid
    n, x = h * w, list(tokens.features)
    pooled = [mean_of(x[g * n : (g + 1) * n]) for g in range(t)]
    like = [cosine(a, b) for a, b in pairwise(pooled)]
    parts = segments_line_by_line(tokens, 1, method.threshold)
    made, number = [], 0
    # A lone grid joins the one before it where that is as like or all there is, else the one after.
    while number < len(parts):
        part = parts[number]
        while len(part) == 1 and number + 1 < len(parts) and (not made or like[part[-1]] > like[part[0] - 1]):
            number += 1
            part = part + parts[number]
        if len(part) == 1 and made:
            made[-1] = made[-1] + part
        else:
            made.append(part)
        number += 1
    means = [mean_of([x[i] for g in part for i in range(g * n, (g + 1) * n)]) for part in made]
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
    weight = [len(part) * math.exp(gains[s]) for s, part in enumerate(made)]
    due = apportion(keep, weight, [len(part) * n for part in made])
    kept = []
    for part, total in zip(made, due, strict=True):
        before: list[int] = []
        for g, count in zip(part, shares(total, len(part)), strict=True):
            units = range(g * n, (g + 1) * n)
            score = peak_scores_line_by_line([x[i] for i in units], method.neighbours)
            if before:
                score = [
                    settled(s * (1 - max(cosine(x[i], x[j]) for j in before)))
                    for s, i in zip(score, units, strict=True)
                ]
            before = sorted(units[i] for i in ranked(score)[:count])
            kept += before
    return kept


@examples()
def test_mmg(grid, kind, seed, data):
    grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    name = f"mmg:threshold={data.draw(st.sampled_from([-0.5, 0.5, 0.95]))}:beta={data.draw(st.sampled_from([0.0, 0.5, 1.0]))}"
    assert chosen(name, tokens, keep) == mmg_line_by_line(tokens, keep, methods.get(name))


@given(st.lists(st.tuples(st.integers(1, 3), st.floats(-1, 1)), min_size=1, max_size=8))
def test_no_grid_is_left_alone_where_there_is_another(lengths):
    edges = [0, *accumulate(length for length, _ in lengths)]
    like = [like for length, like in lengths for _ in range(length)][:-1]
    made = joined([range(first, last) for first, last in pairwise(edges)], like)
    assert [grid for part in made for grid in part] == list(range(edges[-1]))
    assert min(map(len, made)) > 1 or edges[-1] == 1
    assert {part.start for part in made} <= set(edges)


def test_mmg_gives_less_to_a_scene_shown_before():
    a, b = features_of("random", 2, width=16).unbind()
    first, other, again = marginal_gains(torch.stack([a, b, a]), a + b, 0.5)
    assert again < first and again < other
    free = marginal_gains(torch.stack([a, b, a]), a + b, 0.0)
    assert free[0] == free[2]


def test_mmg_refuses_what_makes_no_sense():
    for text in ("threshold=2", "beta=-0.1", "neighbours=0"):
        with pytest.raises(UsageError):
            methods.get(f"mmg:{text}")


# --- prunevid ----------------------------------------------------------------------------------------------------------


def clustered_line_by_line(x: list[torch.Tensor], count: int, neighbours: int) -> dict[int, list[int]]:
    """The members of each cluster, by its peak."""
    members = {i: [i] for i in peaks_line_by_line(x, count, neighbours)}
    centres = list(members)
    for i in range(len(x)):
        if i not in centres:
            members[centres[first_of([cosine(x[i], x[j]) for j in centres], max)]].append(i)
    return members


def prunevid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    pooled = [mean_of(list(x[g * n : (g + 1) * n])) for g in range(t)]
    clusters = clustered_line_by_line(pooled, max(1, int(method.scenes * t + 0.5)), method.neighbours)
    label = {g: centre for centre, members in clusters.items() for g in members}
    parts = [[0]]
    for g in range(1, t):
        if label[g] != label[g - 1]:
            parts.append([])
        parts[-1].append(g)
    steady = {}
    for part in parts:
        for place in range(n) if len(part) > 1 else ():
            unit = [x[g * n + place] / x[g * n + place].norm().clamp(min=1e-12) for g in part]
            pairs = [float(a @ b) for i, a in enumerate(unit) for b in unit[i + 1 :]]
            steady[part[0], place] = settled(sum(pairs) / len(pairs))
    length = {part[0]: len(part) for part in parts}
    still = [at for at in steady if steady[at] > method.static]
    saved = sum(length[first] - 1 for first, _ in still)
    if t * n - saved <= keep:
        parties = {i: [(i, 1.0)] for i in range(t * n)}
        missing = t * n - keep
        for first, place in sorted(still, key=lambda at: -steady[at]):
            for g in range(first + 1, first + length[first]):
                if missing:
                    parties[first * n + place] += parties.pop(g * n + place)
                    missing -= 1
        return parties
    groups = []
    for part in parts:
        places = [place for first, place in still if first == part[0]]
        groups.append([[g * n + place for g in part] for place in places])
        groups += [[[g * n + place] for place in range(n) if place not in places] for g in part]
    exact = [keep * len(group) / sum(map(len, groups)) for group in groups]
    due = [math.floor(value + 1e-9) for value in exact]
    for i in ranked([round(value - count, 9) for value, count in zip(exact, due, strict=True)])[: keep - sum(due)]:
        due[i] += 1
    parties = {}
    for group, count in zip(groups, due, strict=True):
        if count:
            means = [mean_of([x[i] for i in units]) for units in group]
            for centre, members in clustered_line_by_line(means, count, method.neighbours).items():
                parties[group[centre][0]] = [(i, 1 / len(group[j])) for j in members for i in group[j]]
    return parties


@examples()
def test_prunevid(grid, kind, seed, data):
    grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    still = torch.rand(grid[1] * grid[2], generator=torch.Generator().manual_seed(seed)) < 0.6
    x = tokens.features.clone().view(grid[0], -1, tokens.features.shape[1])
    x[:, still] = x[:1, still] + 0.2 * x[:, still]  # so that some of it stands still
    tokens = replace(tokens, rows=x.flatten(0, 1))
    name = f"prunevid:scenes={data.draw(st.sampled_from([0.0, 0.25, 1.0]))}:neighbours={data.draw(st.integers(1, 7))}"
    assert_selects(name, tokens, keep, prunevid_line_by_line(tokens, keep, methods.get(name)))


def test_prunevid_on_a_video_that_stands_still():
    """Four times the same grid: a token a place, at the first, is all there is; more than that undoes the last means."""
    grid = (4, 3, 4)
    tokens = replace(tokens_of("random", grid), rows=features_of("random", 12).repeat(4, 1))
    made = methods.get("prunevid:scenes=0").select(tokens, 12)
    assert made.kept.tolist() == list(range(12)) and made.owner.tolist() == list(range(12)) * 4
    torch.testing.assert_close(made.features(tokens.features), tokens.features[:12])
    assert len(methods.get("prunevid:scenes=0").select(tokens, 13).kept) == 13


# --- dart --------------------------------------------------------------------------------------------------------------


def dart_line_by_line(tokens: Tokens, keep: int, visual: int, text: int) -> list[int]:
    x, question = list(tokens.features), list(tokens.question)

    def longest(rows: list[torch.Tensor]) -> list[int]:
        norms = [float(row.abs().sum()) for row in rows]
        return ranked([settled(value / (max(norms) or 1.0)) for value in norms])

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
    assert chosen(f"dart:visual={visual}:text={text}", tokens, keep) == expected


def test_dart_without_text_needs_no_question():
    tokens = replace(tokens_of("random", (2, 3, 4)), given={})
    assert not methods.get("dart:text=0").reads_question and len(chosen("dart:text=0", tokens, 9)) == 9
    with pytest.raises(TypeError, match="question"):
        chosen("dart", tokens, 9)
    with pytest.raises(UsageError, match="one of them more"):
        methods.get("dart:text=0:visual=0")


# --- flashvid ----------------------------------------------------------------------------------------------------------


def diverse_line_by_line(x: list[torch.Tensor], attention: list[float], keep: int) -> list[int]:
    n = len(x)
    far = [[settled(attention[j] * (1 - cosine(x[i], x[j]))) for j in range(n)] for i in range(n)]
    alone = [settled(2 * value) for value in attention]
    start = [min([far[i][j] for i in range(n) if i != j], default=alone[j]) for j in range(n)]
    picked = [first_of(start, max)] if keep else []
    while len(picked) < keep:
        picked.append(first_of([-1.0 if j in picked else min(far[i][j] for i in picked) for j in range(n)], max))
    return picked


def flashvid_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention = [settled(float(value)) for value in tokens.attention]
    due, parties = shares(keep, t), {}
    for part in segments_line_by_line(tokens, method.segments, method.threshold):
        total, stays = sum(due[g] for g in part), []
        for g, count in zip(part, shares(int(method.diverse * total + 0.5), len(part)), strict=True):
            units = range(g * n, (g + 1) * n)
            picked = diverse_line_by_line([x[i] for i in units], [attention[i] for i in units], count)
            stays += [units[i] for i in picked]
        parties |= {i: [(i, 1.0)] for i in stays}
        wanted = total - len(stays)
        rest = [i for g in part for i in range(g * n, (g + 1) * n) if i not in stays]
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
        of_grid = [[root for root in sorted(trees) if root // n == g] for g in part]
        exact = [wanted * len(roots) / len(trees) for roots in of_grid]
        counts = [math.floor(value + 1e-9) for value in exact]
        spare = ranked([round(value - count, 9) for value, count in zip(exact, counts, strict=True)])
        for i in spare[: wanted - sum(counts)]:
            counts[i] += 1
        for roots, count in zip(of_grid, counts, strict=True):
            clusters = {i: [i] for i in range(len(roots))}
            if count < len(roots):
                clusters = clustered_line_by_line([means[r] for r in roots], count, method.neighbours) if count else {}
            for centre, members in clusters.items():
                parties[roots[centre]] = [(i, 1 / len(trees[roots[j]])) for j in members for i in trees[roots[j]]]
    return parties


@examples()
def test_flashvid(grid, kind, seed, data):
    grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    x = tokens.features.clone().view(grid[0], -1, tokens.features.shape[1])
    x[1:] = 0.7 * x[:-1].roll(1, 1) + 0.3 * x[1:]  # things move by a place
    tokens = replace(tokens, rows=x.flatten(0, 1))
    name = f"flashvid:segments={data.draw(st.integers(1, 4))}:diverse={data.draw(st.sampled_from([0.0, 0.7, 1.0]))}"
    name += f":threshold={data.draw(st.sampled_from([0.9, -1.0]))}:neighbours={data.draw(st.integers(1, 7))}"
    assert_selects(name, tokens, keep, flashvid_line_by_line(tokens, keep, methods.get(name)))


def test_flashvid_follows_what_moves():
    """Five different things, each a place further in every grid: a tree each, at its first place."""
    grid, things = (4, 1, 5), torch.eye(5)
    x = torch.stack([things.roll(step, 0) for step in range(4)]).flatten(0, 1)
    tokens = replace(tokens_of("random", grid), rows=x)
    made = methods.get("flashvid:segments=1:threshold=-1:diverse=0").select(tokens, 5)
    assert made.kept.tolist() == [0, 1, 2, 3, 4]
    assert made.owner.view(4, 5).tolist() == [[(i - step) % 5 for i in range(5)] for step in range(4)]
    torch.testing.assert_close(made.features(x), things)


# --- holitom -----------------------------------------------------------------------------------------------------------


def holitom_line_by_line(tokens: Tokens, keep: int, method) -> dict[int, list[tuple[int, float]]]:
    t, h, w = tokens.grid
    n, x = h * w, tokens.features
    attention = [settled(float(value)) for value in tokens.attention]
    like = [[cosine(x[g * n + p], x[(g + 1) * n + p]) for p in range(n)] for g in range(t - 1)]

    def still(part: list[int]) -> list[int]:
        return [p for p in range(n) if len(part) > 1 and all(like[g][p] > method.static for g in part[:-1])]

    ways = []
    for cuts in product([False, True], repeat=t - 1):
        parts = [[0]]
        for g in range(1, t):
            if cuts[g - 1]:
                parts.append([])
            parts[-1].append(g)
        ways.append((sum(len(still(part)) * (len(part) - 1) for part in parts), parts))
    saved = max(total for total, _ in ways)
    parts = min((p for total, p in ways if total == saved), key=lambda parts: [part[0] for part in parts[::-1]])
    if t * n - saved <= keep:
        parties, missing = {i: [(i, 1.0)] for i in range(t * n)}, t * n - keep
        places = [(min(like[g][p] for g in part[:-1]), part, p) for part in parts for p in still(part)]
        for _, part, p in sorted(places, key=lambda place: -place[0]):
            for g in part[1:]:
                if missing:
                    parties[part[0] * n + p] += parties.pop(g * n + p)
                    missing -= 1
        return parties
    groups = [[[g * n + p for g in part] for p in still(part)] for part in parts]
    groups += [[[g * n + p] for p in range(n) if p not in still(part)] for part in parts for g in part]
    exact = [keep * len(group) / sum(map(len, groups)) for group in groups]
    due = [math.floor(value + 1e-9) for value in exact]
    for i in ranked([round(value - count, 9) for value, count in zip(exact, due, strict=True)])[: keep - sum(due)]:
        due[i] += 1
    parties = {}
    for number, (group, count) in enumerate(zip(groups, due, strict=True)):
        if number >= len(parts):
            for i in ranked([attention[units[0]] for units in group])[:count]:
                parties[group[i][0]] = [(group[i][0], 1.0)]
        elif count:
            means = [mean_of([x[i] for i in units]) for units in group]
            for centre, members in clustered_line_by_line(means, count, method.neighbours).items():
                parties[group[centre][0]] = [(i, 1 / len(group[j])) for j in members for i in group[j]]
    return parties


@examples()
def test_holitom(grid, kind, seed, data):
    grid = (data.draw(st.integers(1, 7)), *grid[1:])
    keep, tokens = data.draw(st.integers(1, prod(grid))), tokens_of(kind, grid, seed)
    x = tokens.features.clone().view(grid[0], -1, tokens.features.shape[1])
    random = torch.Generator().manual_seed(seed)
    for g in range(1, grid[0]):  # some places go on as they were
        still = torch.rand(x.shape[1], generator=random) < 0.7
        x[g, still] = x[g - 1, still] + 0.1 * x[g, still]
    tokens = replace(tokens, rows=x.flatten(0, 1))
    name = f"holitom:neighbours={data.draw(st.integers(1, 7))}:static={data.draw(st.sampled_from([0.8, 0.99, -1.0]))}"
    assert_selects(name, tokens, keep, holitom_line_by_line(tokens, keep, methods.get(name)))


def test_holitom_cuts_where_it_costs_least():
    """One cut, where two places change, and not where one does."""
    same = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]).bool()
    assert most_saving(same) == [range(0, 3), range(3, 5)] and most_saving(same[:0]) == [range(0, 1)]

"""Methods for one image at a time, each against its specification followed line by line in loops."""

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import strategies as st

from evoprune import methods
from evoprune.contrib.mmr import most_relevant
from evoprune.methods.ranking import snap
from evoprune.methods.types import Tokens
from tests.methods.line_by_line import assert_selects, examples, shares
from tests.methods.tokens import cosine, features_of, first_of, ranked, scaled, selected, snapped, tokens_of

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


def test_mmr_with_any_importance():
    x, importance = features_of("random", 30), torch.arange(30.0) * 1000 - 7
    assert most_relevant(x, importance, 5, lam=1.0).tolist() == [25, 26, 27, 28, 29]
    assert most_relevant(x, importance.half(), 9).tolist() == mmr_line_by_line(x, importance.half().tolist(), 9, 0.5)
    assert most_relevant(torch.eye(4).repeat(2, 1), torch.ones(8), 4, lam=0.2).tolist() == [0, 1, 2, 3]


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


def test_scope_needs_no_attention_where_it_does_not_count():
    assert methods.get("scope").needs == {"attention"} and methods.get("scope:alpha=0").needs == set()


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


def test_cdpruner_follows_the_question():
    """Two of the directions are asked about; those come first, whatever the others."""
    x, grid = torch.eye(8), (1, 2, 4)
    tokens = tokens_of("random", grid)
    asked = Tokens(x, tokens.owner, grid, 0, {"question": x[[2, 5]] + 0.1 * x[[3, 3]]})
    assert selected("cdpruner", asked, 2) == [2, 5] and selected("cdpruner", asked, 3) == [2, 3, 5]
    assert methods.get("cdpruner").reads_question and not methods.get("cdpruner:question=false").reads_question
    assert selected("cdpruner:question=false", replace(asked, given={}), 2) == [0, 1]
    with pytest.raises(TypeError, match="question"):
        selected("cdpruner", replace(asked, given={}), 2)


def test_cdpruner_when_everything_is_spanned():
    """More tokens than dimensions: no NaN, the count holds, and the rest goes by index."""
    x = features_of("random", 30, width=4)
    tokens = Tokens(x, torch.arange(30), (1, 5, 6), 0)
    first = selected("cdpruner:question=false", tokens, 4)
    more = selected("cdpruner:question=false", tokens, 12)
    assert set(first) <= set(more) and sorted(set(range(30)) - set(first))[:8] == sorted(set(more) - set(first))


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


def test_dart_without_text_needs_no_question():
    tokens = replace(tokens_of("random", (2, 3, 4)), given={})
    assert not methods.get("dart:text=0").reads_question and len(selected("dart:text=0", tokens, 9)) == 9
    with pytest.raises(TypeError, match="question"):
        selected("dart", tokens, 9)

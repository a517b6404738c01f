"""Test methods inside the language model, token by token, on a float64 model that removes nothing, and test their plans."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from evoprune import methods
from evoprune.contrib.vitcop import vicinity_clusters
from evoprune.methods import Budget, language
from tests.contrib.eager import (
    BEFORE,
    DROPPING,
    VISUAL,
    Eager,
    EagerLayer,
    a_prompt,
    deep_model,
    inside,
    pairs,
    run_method,
)
from tests.contrib.public import public_layer
from tests.contrib.test_selectors import clustered_line_by_line
from tests.methods.tokens import Largest, snapped


def clusters_line_by_line(x, place, count: int, cutoff: float, near: float) -> list[int]:
    """Return, for each token, the centre of its cluster."""
    n = len(x)
    distance = [[math.dist(a, b) for b in x] for a in x]
    unit = cutoff * math.sqrt(sum(d * d for row in distance for d in row) / n**2) or 1.0
    density = [snapped(sum(math.exp(-((d / unit) ** 2)) for d in row)) for row in distance]
    order = sorted(range(n), key=lambda i: (-density[i], i))
    follows, score = {}, {}
    for rank, i in enumerate(order):
        denser = sorted(order[:rank])
        close = [j for j in denser if math.dist(place[i], place[j]) <= near + 1e-6]
        follows[i] = min(close or denser, key=lambda j: distance[i][j], default=i)
        score[i] = math.inf if not rank else density[i] * distance[i][follows[i]] / unit + 1e9 * (not close)
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:count]
    found = {}
    for i in order:  # the denser token first
        found[i] = i if i in centres else found[follows[i]]
    return [found[i] for i in range(n)]


def merged_line_by_line(clusters: list[list[int]], length: dict[int, float], left: int) -> dict[int, list[int]]:
    """Return the remaining tokens, each with the tokens it is the mean of. `clusters` are in the order of their centres."""
    by_sum = sorted(clusters, key=lambda members: snapped(math.log(sum(length[i] for i in members))))
    alone, together = [], []
    if len(clusters) > left:
        together = [*by_sum[: left - 1], [i for members in by_sum[left - 1 :] for i in members]]
    else:
        spare, others = left - len(clusters), sum(len(members) - 1 for members in clusters)
        quota = [round((len(members) - 1) / others * spare) for members in by_sum]
        for turn in range(len(quota)) if sum(quota) < spare else reversed(range(len(quota))):
            if sum(quota) < spare and quota[turn] < len(by_sum[turn]) - 1:
                quota[turn] += 1
            elif sum(quota) > spare and quota[turn]:
                quota[turn] -= 1
        for members, count in zip(by_sum, quota, strict=True):
            shortest = sorted(members, key=lambda i: (snapped(math.log(length[i])), i))
            alone += shortest[:count]
            together.append(shortest[count:])
    return {i: [] for i in alone} | {sorted(members)[len(members) // 2]: sorted(members) for members in together}


def vitcop_line_by_line(embeds, place, pair, length, left: int, method) -> dict[int, list[int]]:
    groups = {}
    for number in sorted({*pair}):
        mine = [i for i, each in enumerate(pair) if each == number]
        count = max(1, int(method.centres * len(mine)))
        found = clusters_line_by_line(
            [embeds[i] for i in mine], [place[i] for i in mine], count, method.cutoff, method.near
        )
        for i, centre in zip(mine, found, strict=True):
            groups.setdefault(mine[centre], []).append(i)
    return merged_line_by_line([groups[centre] for centre in sorted(groups)], length, left)


def vitcop(seen: EagerLayer, method) -> list[int]:
    keys = seen.model.turn(seen.model.project(seen.number, seen.entering, "k"))
    length = {column: float(keys[column].mean(0).norm()) for column in seen.alive}
    if len(seen.alive) < len(VISUAL):
        return sorted(sorted(seen.alive, key=lambda column: length[column])[: seen.left])
    embeds, first, before = seen.model.embeds[VISUAL].tolist(), VISUAL[0], seen.x.clone()
    lengths = {column - first: value for column, value in length.items()}
    found = vitcop_line_by_line(embeds, inside().tolist(), pairs().tolist(), lengths, seen.left, method)
    for i, members in found.items():
        if members:
            seen.x[first + i] = (before[first + i] + sum(before[first + j] for j in members) / len(members)) / 2
    return sorted(first + i for i in found)


def test_equal_tokens():
    tokens = public_layer("random", 0, (6, 4, 5), 12)
    same = replace(
        tokens, keys=torch.ones_like(tokens.keys), visual_embeds=torch.ones_like(tokens.visual_embeds), memory={}
    )
    rows = [same.visual_embeds.tolist(), same.place.tolist(), same.pair.tolist()]
    method = methods.get("vitcop")
    expected = vitcop_line_by_line(*rows, dict.fromkeys(range(120), 1.0), 12, method)
    assert method.select(same).kept.tolist() == sorted(expected)


def test_clusters_do_not_depend_on_the_blocks(monkeypatch):
    random = torch.Generator().manual_seed(0)
    x, place = torch.randn(50, 6, generator=random), torch.rand(50, 2, generator=random)
    found = vicinity_clusters(x, place, 7, 0.5, 0.4)
    assert found.tolist() == clusters_line_by_line(x.tolist(), place.tolist(), 7, 0.5, 0.4)
    monkeypatch.setattr("evoprune.contrib.vitcop.BLOCK", 8)
    assert torch.equal(vicinity_clusters(x, place, 7, 0.5, 0.4), found)


LAST = -1


def best(score: dict[int, float], count: int) -> list[int]:
    """Return the columns with the highest scores, in ascending order."""
    return sorted(sorted(score, key=lambda column: (-score[column], column))[:count])


def last_attention(weights: torch.Tensor, columns: list[int]) -> dict[int, float]:
    """Return the last column's attention to each column, averaged over heads."""
    return {column: float(sum(head[LAST, column] for head in weights) / len(weights)) for column in columns}


def fastv(seen: EagerLayer) -> list[int]:
    return best(last_attention(seen.weights(), seen.alive), seen.left)


def pyramiddrop(seen: EagerLayer) -> list[int]:
    return best(last_attention(seen.weights(next_layer=True), seen.alive), seen.left)


def sparsevlm(seen: EagerLayer) -> list[int]:
    embeds = seen.model.embeds
    text = list(range(VISUAL[-1] + 1, len(embeds)))
    rating = {word: 0.0 for word in text}
    for column in VISUAL:
        weight = {word: math.exp(float(embeds[column] @ embeds[word])) for word in text}
        for word in text:
            rating[word] += weight[word] / sum(weight.values()) / len(VISUAL)
    raters = [word for word in text if rating[word] > sum(rating.values()) / len(text)]
    weights = seen.weights()
    score = {c: float(sum(head[word, c] for head in weights for word in raters)) for c in seen.alive}
    stay = next(  # the most that leave room for the means: a tenth of three tenths of the others
        count
        for count in range(seen.left, 0, -1)
        if count + (int((len(seen.alive) - count) * 0.3) + 1) // 10 + 1 <= seen.left
    )
    kept = best(score, stay)
    dropped = {column: score[column] for column in seen.alive if column not in kept}
    again = best(dropped, int(len(dropped) * 0.3) + 1)
    means = len(again) // 10 + 1
    for peak, members in clustered_line_by_line([seen.x[column] for column in again], means, means).items():
        seen.x[again[peak]] = sum(seen.x[again[member]].clone() for member in members) / len(members)
        kept.append(again[peak])
    return sorted(kept)


def visipruner(seen: EagerLayer, method) -> list[int] | None:
    if not seen.alive:
        return None
    weights = seen.weights()
    values = seen.model.project(seen.number, seen.entering, "v")
    values = values.repeat_interleave(seen.model.heads // seen.model.kv_heads, 1)
    each = [torch.cat([weights[h, LAST, c] * values[c, h] for h in range(len(weights))]) for c in range(len(values))]
    out = sum(each)
    cosine = {c: float(torch.cosine_similarity(out - each[c], out, dim=0)) for c in seen.alive}
    length = {c: float(each[c].norm()) for c in seen.alive}
    if "decided" not in seen.memory:
        decisive = any(value < method.layer for value in cosine.values())
        if not decisive and not seen.due:
            return None
        seen.memory["decided"], seen.memory["calm"] = True, 0
        enough = sum(value > method.token for value in length.values()) if decisive else seen.left
        return best(length, max(1, min(enough, seen.left)))
    seen.memory["calm"] += all(value >= method.exit for value in cosine.values())
    return [] if method.exits and seen.memory["calm"] == method.exits else None


def d2pruner(seen: EagerLayer) -> list[int]:
    own = last_attention(seen.weights(), seen.alive)
    keys = seen.model.project(seen.number, seen.entering, "k")
    mean = sum(keys[column].clone() for column in seen.alive) / len(seen.alive)
    keys[seen.alive] = mean
    prior = last_attention(seen.weights(keys=keys), seen.alive)
    score = {column: own[column] / (prior[column] + 1e-7) for column in seen.alive}
    kept = best(score, int(seen.left * 0.7))
    for column in sorted(score, key=lambda c: -score[c]):
        others = [c for c in kept[int(seen.left * 0.7) :] if c != column]
        unlike = all(torch.cosine_similarity(seen.x[column], seen.x[c], dim=0) <= 0.8 for c in others)
        if column not in kept and unlike and len(kept) < seen.left:
            kept.append(column)
    for column in sorted(score, key=lambda c: -score[c]):
        if column not in kept and len(kept) < seen.left:
            kept.append(column)
    return sorted(kept)


def prunevid(seen: EagerLayer) -> list[int]:
    weights, pair = seen.weights(rotated=False, causal=False), pairs().tolist()
    score = {c: float(weights[:, VISUAL[-1] + 1 :, c].max()) for c in seen.alive}
    groups = [[c for c in seen.alive if pair[c - BEFORE] == number] for number in range(max(pair) + 1)]
    exact = [seen.left * len(group) / len(seen.alive) for group in groups]
    counts = [int(share) for share in exact]
    for number in sorted(range(len(groups)), key=lambda n: (counts[n] - exact[n], n))[: seen.left - sum(counts)]:
        counts[number] += 1
    return [c for group, n in zip(groups, counts, strict=True) for c in best({c: score[c] for c in group}, n)]


def holitom(seen: EagerLayer) -> list[int]:
    kept, x = fastv(seen), seen.x.clone()
    for column in seen.alive:
        if column not in kept:
            near = max(kept, key=lambda c: float(torch.cosine_similarity(x[column], x[c], dim=0)))
            seen.x[near] = (seen.x[near] + x[column]) / 2
    return kept


def nuwa(seen: EagerLayer) -> list[int]:
    weights = seen.weights()
    score = {c: max(float(sum(head[row, c] for row in (-3, -2, -1)) / 3) for head in weights) for c in seen.alive}
    return best(score, seen.left)


RULES = {
    "fastv": fastv,
    "pyramiddrop": pyramiddrop,
    "sparsevlm": sparsevlm,
    "d2pruner": d2pruner,
    "prunevid-inner": prunevid,
    "holitom-inner": holitom,
    "flashvid-inner": fastv,
    "nuwa-inner": nuwa,
}
BY_SETTINGS = (
    "vitcop",
    "vitcop:centres=0.5:near=0.3",
    "vitcop:cutoff=0.1:near=0:centres=0.3",
    "visipruner",
    "visipruner:token=0.05",
    "visipruner:token=1000",
    "visipruner:layer=0.9:exit=0.9",
    "visipruner:layer=0.5:exits=1:exit=0.5",
    "visipruner:layer=0.01:exits=0",
    "visipruner:exit=0.01:exits=3",
    "visipruner:shallow=0.5:exits=0",
)


def rule_of(name: str):
    method, kind = methods.get(name), name.partition(":")[0]
    if kind in ("visipruner", "vitcop"):
        return method, lambda seen: {"visipruner": visipruner, "vitcop": vitcop}[kind](seen, method)
    return method, RULES[name]


@pytest.mark.few(4)
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("name", [*RULES, *BY_SETTINGS])
def test_the_prompt_reads_as_if_a_mask_barred_what_left(name, budget, sizes):
    method, rule = rule_of(name)
    embeds, positions = a_prompt()
    sizes = torch.rand(len(embeds), generator=torch.Generator().manual_seed(1)) * 9 + 0.5 if sizes else None
    made, dropping, cache = run_method(deep_model(), method, embeds, positions, budget, sizes)
    eager = Eager(deep_model(), embeds, positions, sizes)
    plan = method.drops(8, len(VISUAL), budget)
    expected, dropped = eager.run(rule, plan)
    assert dropping.dropped == dropped and dropped
    torch.testing.assert_close(made[0].double(), expected, atol=2e-4, rtol=2e-4)
    left = dict(dropped)
    columns, lengths = len(embeds), []
    for layer in range(8):
        columns = len(embeds) - len(VISUAL) + left[layer] if layer in left else columns
        lengths.append(columns)
    assert cache.lengths == lengths
    assert method.exact == (dropped == [(drop.after, drop.left) for drop in plan.drops]) or not method.exact


def test_every_method_is_tested():
    assert {*RULES, "visipruner", "vitcop"} == set(DROPPING)


def alike_prompt(copies: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a prompt whose visual tokens come in groups of nearly equal ones."""
    embeds, positions = a_prompt(3)
    things = embeds[VISUAL[: len(VISUAL) // copies]].repeat(copies, 1)
    embeds[VISUAL] = things + 0.05 * embeds[VISUAL]
    return embeds, positions


@pytest.mark.parametrize("name", ["d2pruner", "sparsevlm", "holitom-inner", "visipruner:exits=1:exit=0.3:token=0.1"])
@pytest.mark.parametrize("budget", [0.5, 0.25])
def test_tokens_that_are_alike(name, budget):
    method, rule = rule_of(name)
    embeds, positions = alike_prompt()
    made, dropping, _ = run_method(deep_model(), method, embeds, positions, budget)
    expected, dropped = Eager(deep_model(), embeds, positions).run(rule, method.drops(8, len(VISUAL), budget))
    assert dropping.dropped == dropped
    torch.testing.assert_close(made[0].double(), expected, atol=2e-4, rtol=2e-4)
    if name == "d2pruner":
        by_score = run_method(deep_model(), methods.get("d2pruner:alike=2"), embeds, positions, budget)[0]
        assert not torch.allclose(made, by_score, atol=1e-3)
    elif name.startswith("visipruner"):
        assert dropped[-1][1] == 0 and len(dropped) == 2


GRID = (6, 4, 5)


@pytest.mark.few(9)
@pytest.mark.parametrize("name", DROPPING)
@pytest.mark.parametrize("left", [1, 2, 7, 60, 119])
def test_exactly_so_many_stay(name, left):
    method = methods.get(f"{name}:token=0" if name == "visipruner" else name)
    for kind in ("random", "clustered", "video"):
        made = method.select(public_layer(kind, 0, GRID, left))
        assert len(made.kept) == left and (made.kept.diff() > 0).all()
        assert made.features(public_layer(kind, 0, GRID, left).hidden).isfinite().all()


@pytest.mark.parametrize("name", [name for name in DROPPING if name != "vitcop"])  # its clusters: test_equal_tokens
def test_equal_tokens_go_by_index_and_nothing_is_drawn(name):
    tokens = public_layer("random", 0, GRID, 12)
    same = {f"{part}": torch.ones_like(getattr(tokens, part)) for part in ("hidden", "queries", "keys", "values")}
    same |= {"visual_embeds": torch.ones_like(tokens.visual_embeds), "text_embeds": torch.ones_like(tokens.text_embeds)}
    equal = replace(tokens, **same)
    equal = replace(equal, following=lambda: equal, unrotated=lambda: equal, evened=lambda: equal)
    before = torch.get_rng_state()
    kept = methods.get(name).select(replace(equal, memory={})).kept.tolist()
    assert torch.equal(before, torch.get_rng_state())
    firsts = [20 * pair + place for pair in range(6) for place in (0, 1)] if name == "prunevid-inner" else [*range(12)]
    assert kept == firsts


@pytest.mark.parametrize("name", DROPPING)
def test_every_tensor_is_made_beside_the_tokens(name):
    """The default device has no values here, so tensors created on it cannot be mixed with the tokens."""
    expected = methods.get(name).select(public_layer("random", 0, GRID, 23))
    tokens = public_layer("random", 0, GRID, 23)
    with torch.device("meta"):
        made = methods.get(name).select(tokens)
        assert torch.equal(made.kept, expected.kept)
        assert made.features(tokens.hidden).device.type == "cpu"


def test_no_matrix_of_all_pairs_of_columns(monkeypatch):
    """With 1,200 visual tokens. SparseVLM searches peaks among a tenth of its dropped tokens."""
    for name in DROPPING:
        tokens = public_layer("random", 0, (12, 10, 10), 300)
        with Largest() as largest:
            methods.get(name).select(tokens)
        assert largest.numbers < len(tokens.keys) ** 2 / 2, name


def test_attention_in_strips(monkeypatch):
    tokens, rows = public_layer("random", 0, GRID, 12), torch.tensor([1, 4, 5, 11])
    whole = [tokens.attention(rows, most=most, causal=causal) for most in (False, True) for causal in (False, True)]
    monkeypatch.setattr(language, "MAX_WEIGHTS", 1)
    strips = [tokens.attention(rows, most=most, causal=causal) for most in (False, True) for causal in (False, True)]
    for one, other in zip(whole, strips, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(tokens.attention(), tokens.last_weights().mean(0)[tokens.visual])


ONE = ("fastv", "d2pruner", "prunevid-inner", "holitom-inner", "flashvid-inner", "nuwa-inner")


def drops(name, depth, tokens, budget):
    return [(drop.after, drop.left) for drop in methods.get(name).drops(depth, tokens, budget).drops]


@pytest.mark.parametrize("name", DROPPING)
def test_what_every_plan_holds(name):
    sizes = product((1, 2, 3, 4, 28, 36), (1.0, 0.9, 0.5, 0.25, 0.1, 0.001), (1, 2, 5, 576, 24_576))
    for depth, budget, tokens in sizes:
        check_plan(name, depth, budget, tokens)


def check_plan(name, depth, budget, tokens):
    plan = methods.get(name).drops(depth, tokens, budget)
    layers, counts = [drop.after for drop in plan.drops], [tokens, *(drop.left for drop in plan.drops)]
    assert layers == sorted(set(layers)) and all(1 <= layer < depth for layer in layers)
    assert counts == sorted(set(counts), reverse=True) and counts[-1] >= 1
    assert len(plan.layers) == depth and plan.layers[0] == tokens
    assert {*layers} <= {*plan.looks} or not layers
    if budget == 1.0 or depth == 1:
        assert not plan.drops
    elif plan.drops and plan.exact:
        after = plan.layers[layers[0] :]
        assert abs(sum(after) / len(after) - budget * tokens) <= 1.01
    if name in ONE and plan.drops:
        assert plan.drops[0].left == Budget.count(budget, tokens)


def test_published_counts_at_published_depths():
    assert drops("fastv", 32, 576, 0.5) == [(2, 288)]
    assert drops("d2pruner", 32, 576, 0.1) == [(2, 58)]
    assert drops("pyramiddrop", 32, 576, 7 / 24) == [(8, 288), (16, 144), (24, 72)]
    for counts in ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)):
        mean = sum(run * count for run, count in zip((4, 9, 16), counts, strict=True)) / 29 / 576
        assert drops("sparsevlm", 32, 576, mean) == [*zip((3, 7, 16), counts, strict=True)]
    assert drops("prunevid-inner", 32, 1000, 0.4) == [(11, 400)]
    assert drops("holitom-inner", 28, 1000, 0.5) == [(18, 500)]
    assert drops("flashvid-inner", 28, 1000, 0.3) == [(20, 300)]
    assert drops("nuwa-inner", 28, 1000, 0.42) == [(15, 420)]
    for tokens, counts in (
        (288, (253, 51)),
        (230, (165, 33)),
        (172, (77, 15)),
    ):  # remaining tokens at 0.5, 0.4 and 0.3 of 576
        mean = (20 * counts[0] + 10 * counts[1]) / 30 / tokens
        assert drops("vitcop", 32, tokens, mean) == [*zip((2, 22), counts, strict=True)]
    plan = methods.get("visipruner").drops(32, 576, 0.1)
    assert (plan.blind, plan.looks[0], plan.looks[-1], plan.drops[0].after) == (6, 8, 31, 16)


@pytest.mark.parametrize("name", DROPPING)
def test_the_default_share_is_its_papers(name):
    for combined, share in ((f"divprune+{name}", None), (f"divprune+{name}:share=0.2", 0.2)):
        both, alone = methods.MethodChain.parse(combined), methods.MethodChain.parse(name)
        assert both.language_work(32, 576, 0.1) == alone.language_work(32, 576, share or both.language.left)


def test_columns_of_a_prompt():
    assert methods.MethodChain.parse("fastv").prompt_columns(4, 100, 7, 0.25) == (107, 32, 32, 32)
    assert methods.MethodChain.parse("fastv").prompt_columns(4, 100, 7, 1.0) == 107
    assert methods.MethodChain.parse("divprune").prompt_columns(4, 100, 7, 0.25) == 107
    assert methods.MethodChain.parse("divprune+fastv:share=0.1").prompt_columns(4, 100, 7, 0.25) == (107, 17, 17, 17)

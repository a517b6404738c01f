"""ViTCoP's stages inside the language model, token by token from the paper's definitions and the authors' order of steps."""

import math
from dataclasses import replace

import pytest
import torch

from evoprune import methods
from evoprune.contrib import common
from evoprune.contrib.common import vicinity_clusters
from tests.contrib.eager import VISUAL, Eager, EagerLayer, a_prompt, deep_model, inside, pairs, run_method
from tests.contrib.public_layers import public_layer
from tests.methods.tokens import snapped


def clusters_line_by_line(x, place, count: int, cutoff: float, near: float) -> list[int]:
    """The centre of each token's cluster."""
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
    """The tokens that are left, and which others each is the mean of; `clusters`: in the order of their centres."""
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


def rule(seen: EagerLayer, method) -> list[int]:
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


@pytest.mark.parametrize("budget", [0.6, 0.3, 0.1, 0.05])
@pytest.mark.parametrize("name", ["vitcop", "vitcop:centres=0.5:near=0.3", "vitcop:cutoff=0.1:near=0:centres=0.3"])
def test_the_prompt_reads_as_it_does_token_by_token(name, budget):
    method, (embeds, positions) = methods.get(name), a_prompt(1)
    made, dropping, _ = run_method(deep_model(), method, embeds, positions, budget)
    plan = method.drops(8, len(VISUAL), budget)
    expected, dropped = Eager(deep_model(), embeds, positions).run(lambda seen: rule(seen, method), plan)
    assert dropping.dropped == dropped and [after for after, _ in dropped] == [1, 6][: len(dropped)]
    torch.testing.assert_close(made[0].double(), expected, atol=2e-4, rtol=2e-4)


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
    monkeypatch.setattr(common, "BLOCK", 8)
    assert torch.equal(vicinity_clusters(x, place, 7, 0.5, 0.4), found)

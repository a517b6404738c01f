"""Plans of language methods: exact counts, and budgets as means over the layers after the first drop."""

from itertools import product

import pytest

from evoprune import methods
from evoprune.methods.plans import keep_count, layers_before, tokens_of_layers
from tests.methods.eager import DROPPING

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
        assert plan.drops[0].left == keep_count(budget, tokens)


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
    ):  # what 0.5, 0.4 and 0.3 of 576 tokens leave
        mean = (20 * counts[0] + 10 * counts[1]) / 30 / tokens
        assert drops("vitcop", 32, tokens, mean) == [*zip((2, 22), counts, strict=True)]
    plan = methods.get("visipruner").drops(32, 576, 0.1)
    assert (plan.blind, plan.looks[0], plan.looks[-1], plan.drops[0].after) == (6, 8, 31, 16)


@pytest.mark.parametrize("name", DROPPING)
def test_the_default_share_is_its_papers(name):
    combined = methods.parse(f"divprune+{name}")
    assert combined.language_plan(32, 576, 0.1) == methods.parse(name).language_plan(32, 576, combined.language.left)
    assert methods.parse(f"divprune+{name}:share=0.2").language_plan(32, 576, 0.9) == methods.get(name).drops(
        32, 576, 0.2
    )


def test_relative_depth():
    assert [layers_before(0.25, depth) for depth in (1, 2, 4, 28, 36)] == [0, 1, 1, 7, 9]
    assert layers_before(0.99, 36) == 35
    assert tokens_of_layers(5, 9, [(2, 4), (4, 1)]) == (9, 9, 4, 4, 1)


def test_columns_of_a_prompt():
    assert methods.parse("fastv").prompt_columns(4, 100, 7, 0.25) == (107, 32, 32, 32)
    assert methods.parse("fastv").prompt_columns(4, 100, 7, 1.0) == 107
    assert methods.parse("divprune").prompt_columns(4, 100, 7, 0.25) == 107
    assert methods.parse("divprune+fastv:share=0.1").prompt_columns(4, 100, 7, 0.25) == (107, 17, 17, 17)

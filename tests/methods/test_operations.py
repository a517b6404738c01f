"""Operation pruning against its specification, followed line by line, and the plans that come of a recipe."""

import random
from dataclasses import replace

import pytest
import torch

from evoprune import methods
from evoprune.contrib.operations import Operations
from evoprune.errors import UsageError
from evoprune.language import decoder
from evoprune.language.decoder import KVCache
from evoprune.methods.chain import Pipeline
from evoprune.methods.operation_plans import ALL, REST, Recipe, closed
from evoprune.methods.plans import KINDS
from tests.language.test_decoder import assert_close
from tests.language.test_dropping import more, sizes_of
from tests.methods.eager import COLUMNS, VISUAL, Eager, a_prompt, deep_model, run_method
from tests.methods.test_language_methods import best, last_attention

DEPTH, AFTER, KEY = 8, 2, 12  # a quarter of 48 visual tokens is key
WEIGHTS = (0.1, 0.2, 0.7)
EVERY = [(layer, group, kind) for layer in range(AFTER, DEPTH) for group in (ALL, REST) for kind in KINDS]


def recipe_of(*steps) -> Recipe:
    return Recipe(DEPTH, AFTER, 0.25, WEIGHTS, steps)


def some(seed: int, count: int) -> tuple:
    return tuple(random.Random(seed).sample(EVERY, count))


def by_the_book(eager: Eager, removed) -> torch.Tensor:
    """Logits of the last column. Nothing leaves, nothing is closed: a layer computes everything and a mask bars what is removed."""
    x, columns, eager.cached = eager.embeds, list(range(len(eager.embeds))), []
    rest: list[int] = []
    for layer in range(eager.config.num_hidden_layers):
        at = f"model.language_model.layers.{layer}"
        without = {
            kind: VISUAL if (layer, ALL, kind) in removed else rest * ((layer, REST, kind) in removed) for kind in KINDS
        }
        q, k, v = (eager.project(layer, x, kind) for kind in "qkv")
        q, k = eager.turn(q), eager.turn(k)
        eager.cached.append((k, v, [column for column in VISUAL if column not in without["keys"]]))
        k, v = (t.repeat_interleave(eager.heads // eager.kv_heads, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / eager.dim**0.5 + eager.bias
        seen = torch.ones(len(columns), len(columns), dtype=torch.bool).tril()
        seen[:, without["keys"]] = False
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        asks = [column for column in columns if column not in without["queries"]]
        y = x.clone()
        out = eager.linear(f"{at}.self_attn.o_proj", torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
        y[asks] += out[asks]
        h = eager.norm(f"{at}.post_attention_layernorm", y)
        gate = eager.linear(f"{at}.mlp.gate_proj", h)
        made = eager.linear(f"{at}.mlp.down_proj", gate / (1 + (-gate).exp()) * eager.linear(f"{at}.mlp.up_proj", h))
        x = y.clone()
        fed = [column for column in columns if column not in without["mlp"]]
        x[fed] += made[fed]
        if layer + 1 == AFTER:
            key = best(last_attention(weights, VISUAL), KEY)
            rest = [column for column in VISUAL if column not in key]
    return eager.linear("lm_head", eager.norm("model.language_model.norm", x[-1]))


CASES = {
    "one-keys": ((4, REST, "keys"),),
    "one-queries": ((3, REST, "queries"),),
    "one-mlp": ((5, ALL, "mlp"),),
    "keys-and-queries-of-all": ((3, ALL, "keys"), (4, ALL, "queries")),
    "the-rest-leaves": tuple((layer, REST, kind) for layer in range(4, DEPTH) for kind in KINDS),
    "both-leave": (*((layer, ALL, kind) for layer in range(5, DEPTH) for kind in KINDS), (6, REST, "keys")),
    "everything": tuple(EVERY),
    "the-top-keys": ((DEPTH - 1, ALL, "keys"),),
    **{f"random-{seed}": some(seed, 1 + 5 * seed) for seed in range(6)},
}


@pytest.mark.few(7)
@pytest.mark.parametrize("sizes", [None, sizes_of()])
@pytest.mark.parametrize("name", CASES)
def test_the_prompt_and_the_answer_read_as_if_a_mask_barred_what_is_removed(name, sizes):
    """Also decoded columns, in portions: they see in each layer the keys that it computed."""
    method, (embeds, positions) = Operations(recipe=recipe_of(CASES[name])), a_prompt()
    eager = Eager(deep_model(), embeds, positions, sizes)
    expected = by_the_book(eager, CASES[name])
    made, dropping, cache = run_method(deep_model(), method, embeds, positions, 1e-9, sizes)
    assert_close(made[0].double(), expected, 2e-4)
    after, places = more(5)
    plan = method.drops(DEPTH, len(VISUAL), 1e-9)
    assert cache.lengths == [COLUMNS - len(VISUAL) + keys for keys, _, _ in plan.work] == list(dropping.columns)
    if sizes is not None:
        assert [len(each) for each in cache.sizes] == cache.lengths
    decoded = [
        decoder.logits(deep_model(), each, where, cache, last=len(each))
        for each, where in zip(after.split((2, 1, 2)), places.split((2, 1, 2), 1), strict=True)
    ]
    assert_close(torch.cat(decoded).double(), eager.decoded(after, places), 2e-4)


@pytest.mark.parametrize("strip", [1, 3, 1024])
def test_attention_in_strips_of_any_length(strip, monkeypatch):
    method, (embeds, positions) = Operations(recipe=recipe_of(CASES["random-4"])), a_prompt()
    whole = run_method(deep_model(), method, embeds, positions, 1e-9)[0]
    monkeypatch.setattr(decoder, "STRIP", strip)
    assert_close(run_method(deep_model(), method, embeds, positions, 1e-9)[0], whole)


def test_with_nothing_removed_nothing_changes_bit_for_bit():
    method, (embeds, positions) = Operations(recipe=recipe_of(*((each,) for each in EVERY))), a_prompt()
    assert Pipeline.of(method).language_plan(DEPTH, len(VISUAL), 1.0) is None
    plain = decoder.logits(deep_model(), embeds, positions, KVCache(deep_model(), COLUMNS))
    assert torch.equal(plain, run_method(deep_model(), method, embeds, positions, 1.0)[0])


def test_layers_are_not_asked_for_what_is_removed():
    """Rows that go through a layer's linear layers, counted."""
    method, (embeds, positions), seen = Operations(recipe=recipe_of(CASES["random-3"])), a_prompt(), {}
    hooks = [
        getattr(getattr(layer, block), name).register_forward_pre_hook(
            lambda _, given, at=(number, kind): seen.__setitem__(at, len(given[0]))
        )
        for number, layer in enumerate(deep_model().model.language_model.layers)
        for kind, block, name in zip(KINDS, ("self_attn", "self_attn", "mlp"), ("k_proj", "q_proj", "gate_proj"), strict=True)
    ]  # fmt: skip
    try:
        run_method(deep_model(), method, embeds, positions, 1e-9)
    finally:
        for hook in hooks:
            hook.remove()
    text, work = COLUMNS - len(VISUAL), method.drops(DEPTH, len(VISUAL), 1e-9).work
    computed = {(layer, kind): text + work[layer][i] for layer in range(DEPTH - 1) for i, kind in enumerate(KINDS)}
    top = {(DEPTH - 1, "keys"): text + work[-1][0], (DEPTH - 1, "queries"): 1, (DEPTH - 1, "mlp"): 1}
    assert seen == computed | top


def test_a_budget_is_the_share_of_the_work_that_is_left():
    recipe = recipe_of(*((each,) for each in sorted(EVERY, reverse=True)))
    shares = [recipe.share(recipe.removed(budget)) for budget in (1.0, 0.75, 0.5, 0.25, 0.1, 0.01)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)
    assert all(share <= budget for share, budget in zip(shares, (1.0, 0.75, 0.5, 0.25, 0.1, 0.01), strict=True))
    for budget in (0.75, 0.5, 0.25):  # one step less would leave more
        gone = recipe.removed(budget)
        steps = next(n for n in range(len(EVERY) + 1) if {each for step in recipe.steps[:n] for each in step} == gone)
        assert recipe.share({each for step in recipe.steps[: steps - 1] for each in step}) > budget
    half = recipe_of(tuple((layer, REST, "mlp") for layer in range(AFTER, DEPTH - 1)))
    assert half.share(half.removed(1e-9)) == pytest.approx(1 - 0.75 * 0.7 * 5 / 6)


def test_a_share_that_is_a_budget_but_for_rounding_fits():
    for depth in range(2, 40):
        steps = tuple((layer, REST, kind) for layer in range(1, depth) for kind in KINDS), ((depth - 1, ALL, "keys"),)
        recipe = Recipe(depth, 1, 0.25, (0.028, 0.11, 0.862), steps)
        assert recipe.share(()) == 1 and recipe.removed(0.25) == frozenset(steps[0])


@pytest.mark.parametrize("removed", CASES.values(), ids=CASES)
def test_what_follows_for_nothing_changes_neither_plan_nor_cost(removed):
    recipe, both = recipe_of(), closed(removed, DEPTH)
    assert closed(both, DEPTH) == both >= set(removed)
    assert recipe.plan(48, removed) == recipe.plan(48, both) and recipe.share(removed) == recipe.share(both)
    counts = recipe.plan(48, both).work
    assert all(0 <= n <= 48 for layer in counts for n in layer) and counts[:AFTER] == ((48, 48, 48),) * AFTER


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_few_visual_tokens(tokens):
    for removed in CASES.values():
        plan = recipe_of().plan(tokens, removed)
        assert all(0 <= n <= tokens for layer in plan.work for n in layer)
        assert [drop.left for drop in plan.drops] == sorted((drop.left for drop in plan.drops), reverse=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"after": 0},
        {"after": 9},
        {"key": 1.0},
        {"weights": (1.0, 1.0)},
        {"weights": (0.0, 1.0, 1.0)},
        {"steps": (((1, ALL, "keys"),),)},
        {"steps": (((8, ALL, "keys"),),)},
        {"steps": (((3, "key", "keys"),),)},
        {"steps": (((3, ALL, "values"),),)},
    ],
)
def test_recipes_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"must be|no operation"):
        replace(recipe_of(), **wrong)


def test_without_a_recipe_of_this_model():
    with pytest.raises(UsageError, match="has no recipe"):
        methods.get("operations").drops(DEPTH, 48, 0.5)
    with pytest.raises(UsageError, match="for 8 layers, and this model has 28"):
        Operations(recipe=recipe_of()).drops(28, 48, 0.5)
    with pytest.raises(UsageError, match="cannot read the recipe"):
        methods.get("operations:recipe=1")

"""What a method is given after the encoder: against loops in which every unit is there itself, and what must not change it."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError
from evoprune.methods.base import Method, Tokens
from evoprune.methods.evoprune import EvoPrune
from evoprune.pruning.score import unit_features
from evoprune.vision import encoder
from evoprune.vision.buckets import Packed, buckets
from evoprune.vision.encoder import choose, encode, encode_rows
from evoprune.vision.gather import Gathering, rows_attention
from evoprune.vision.layout import attention_groups, geometry
from tests.vision.clips import changes, clip
from tests.vision.devices import take_gpu_route
from tests.vision.reference import Row, place_key, run_layer
from tests.vision.test_attention import rows_of
from tests.vision.test_encoder import units
from tests.vision.tower import random_layout, random_patches, tiny_tower

BOTH = frozenset({"attention", "keys"})
SEEN: list[Tokens] = []


@dataclass(frozen=True)
class After(Method):
    """Looks at what it is given, and takes the first tokens."""

    name: ClassVar[str] = "after"
    acts: ClassVar[str] = "after"
    needs: ClassVar[frozenset[str]] = BOTH

    def select(self, tokens, keep):
        SEEN.append(tokens)
        return torch.arange(keep)


@dataclass(frozen=True)
class Inside(EvoPrune):
    """The same on rows that have merged and references in time."""

    depth: float = 1.0

    @property
    def needs_after(self):
        return BOTH

    def select(self, tokens, keep):
        return After.select(self, tokens, keep)


def tokens_of(patches, grid, method, keep=None, full_layers=(1, 3), **how) -> Tokens:
    SEEN.clear()
    encode(tiny_tower(full_layers), [patches], grid, method, keep or max(1, units(grid) // 8), **how)
    (tokens,) = SEEN
    return tokens


# --- definition --------------------------------------------------------------------------------------------------------


def attention_by_hand(q, k, layout, size_bias) -> torch.Tensor:
    """float64 `[R]`: every unit asks and is asked for itself, with its row's queries and keys; without the bias, units of a row
    that see each other in a grid are there once and share what it gets."""
    geo, owner = layout.geometry, layout.owner.tolist()
    home = [unit // geo.units for unit in layout.home.tolist()]
    got = defaultdict(list)
    q, k = q.double(), k.double()
    for grid in sorted(set(home)):
        there = [unit for unit in range(len(owner)) if unit // geo.units == grid]
        asking = [unit for unit in there if home[owner[unit]] == grid]
        keys = there if size_bias else sorted({owner[unit]: unit for unit in there}.values())
        held = torch.stack([k[owner[unit]] for unit in keys])
        total = torch.zeros(len(keys), dtype=torch.float64)
        for unit in asking:
            scores = torch.einsum("phd,kshd->phks", q[owner[unit]], held) * q.shape[-1] ** -0.5
            total += scores.flatten(2).softmax(-1).view(scores.shape).mean((0, 1)).sum(-1) / len(asking)
        of_row = defaultdict(float)
        for unit, share in zip(keys, total.tolist(), strict=True):
            of_row[owner[unit]] += share
        for unit in there:
            row = owner[unit]
            if home[row] // layout.block == grid // layout.block:
                got[row].append(of_row[row] / sum(owner[other] == row for other in there) * geo.units)
    return torch.tensor([sum(got[row]) / len(got[row]) for row in range(layout.rows)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "merges"),
    [
        ((1, 1, 1), []),
        ((3, 3, 5), []),
        ((2, 5, 6), ["window"]),
        ((3, 4, 5), ["grid", "grid"]),
        ((4, 3, 4), ["block"]),
        ((5, 3, 4), ["window", "block", "block"]),
    ],
)
def test_every_unit_counts_once_however_rows_have_merged(shape, merges, size_bias, packed):
    layout = random_layout(geometry(*shape[1:]), shape[0], merges, seed=3, share=0.8)
    layout.per_block  # which the encoder's own layouts know # noqa: B018
    q, k, _ = rows_of(layout)
    groups = attention_groups(layout, "grid", exact=not packed)
    plan = Packed(groups, layout.rows) if packed else buckets(groups)
    made = rows_attention(q, k, layout, plan, size_bias)
    expected = attention_by_hand(q, k, layout, size_bias)
    torch.testing.assert_close(made.double(), expected.double(), atol=1e-5, rtol=1e-5)
    whole = torch.bincount(layout.home // layout.geometry.units, minlength=shape[0]) > 0
    if size_bias and whole.all():
        assert float(made[layout.owner].sum()) == pytest.approx(units(shape), rel=1e-4)


@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2), (2,)])
def test_without_pruning_it_is_that_of_the_towers_last_layer_that_sees_whole_grids(full_layers):
    grid, visual = (2, 5, 7), tiny_tower(full_layers)
    patches, geo = random_patches(grid), geometry(5, 7)
    embedding = visual.patch_embed.proj.weight.double().flatten(1)
    pixels = patches.double().view(units(grid), 4, -1)
    rows = [Row(unit, [unit], pixels[unit] @ embedding.T) for unit in range(units(grid))]
    rows.sort(key=lambda row: place_key(geo, row.home))
    method = EvoPrune(block=1)
    with torch.no_grad():
        for layer, block in enumerate(visual.blocks[: full_layers[-1] + 1]):
            run_layer(block, rows, geo, "grid" if layer in full_layers else "window", method)
    rows.sort(key=lambda row: row.home)
    tokens = tokens_of(patches, grid, After(), full_layers=full_layers, chunk_units=1)
    expected = torch.tensor([row.attention for row in rows]) * geo.units
    torch.testing.assert_close(tokens.attention, expected, atol=1e-4, rtol=1e-4)
    keys = torch.stack([row.plain.mean(1).flatten() for row in rows]).float()
    torch.testing.assert_close(tokens.keys, keys, atol=1e-4, rtol=1e-4)
    assert tokens.attention.dtype == tokens.keys.dtype == torch.float32
    torch.testing.assert_close(tokens.attention.view(2, -1).mean(1), torch.ones(2), atol=1e-5, rtol=0)


def test_rows_that_merge_later_have_the_mean_over_their_units(monkeypatch):
    """Merging after the layer that is looked at: the last full-attention layer is the first of all here."""
    grid, method = (4, 3, 5), Inside(block=2, reuse=0.0, encoder_budget=0.3, first=0.3, last=0.9)
    patches, before = random_patches(grid), {}
    settle = Gathering.settle

    def watched(self, layout, order):
        seen, values = self._seen
        before.update(values, units=values["attention"][seen.owner], keys=values["keys"][seen.owner])
        settle(self, layout, order)

    monkeypatch.setattr(Gathering, "settle", watched)
    tokens = tokens_of(patches, grid, method, full_layers=(0,))
    assert len(tokens.rows) < units(grid)
    for row in range(len(tokens.rows)):
        mine = tokens.owner == row
        torch.testing.assert_close(tokens.given["attention"][row], before["units"][mine].mean())
        torch.testing.assert_close(tokens.given["keys"][row], before["keys"][mine].mean(0))


# --- what must not change it -------------------------------------------------------------------------------------------


def assert_same(a: Tokens, b: Tokens) -> None:
    assert torch.equal(a.owner, b.owner)
    torch.testing.assert_close(a.attention, b.attention, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(a.keys, b.keys, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    encoder_share=st.sampled_from([0.1, 0.4, 1.0]),
    full_layers=st.sampled_from([(1, 3), (1,), (0,)]),
    inside=st.booleans(),
    chunk_units=st.integers(1, 120),
)
def test_the_chunk_size(grid, share, seed, block, encoder_share, full_layers, inside, chunk_units):
    method = Inside(block=block, encoder_budget=encoder_share, first=0.0, last=0.8) if inside else After()
    patches = clip(grid, changes(grid, share, seed), seed)
    if inside and units(grid) == 1:
        return  # nothing to prune
    whole = tokens_of(patches, grid, method, full_layers=full_layers, chunk_units=10**6)
    assert_same(tokens_of(patches, grid, method, full_layers=full_layers, chunk_units=chunk_units), whole)
    assert whole.attention.shape == (units(grid),) and (whole.attention > 0).all()
    if share == 1.0 or not inside:  # every grid asks, and what it gives away stays in its block
        assert float(whole.attention.mean()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_grids_that_repeat_the_first(chunk_units):
    still = clip((5, 4, 5), changes((5, 4, 5), 0.0))
    tokens = tokens_of(still, (5, 4, 5), Inside(encoder_budget=1.0), chunk_units=chunk_units)
    alone = tokens_of(still[:80], (1, 4, 5), After())
    assert len(tokens.rows) == 20
    torch.testing.assert_close(tokens.attention.view(5, 20), alone.attention.expand(5, 20), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens.keys.view(5, 20, -1), alone.keys.expand(5, 20, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("chunk_units", [1, 10**6])
def test_the_device(kernel, chunk_units, monkeypatch):
    grid = (6, 4, 5)
    patches = clip(grid, changes(grid, 0.4))
    for method in (After(), Inside(block=2, encoder_budget=0.2, first=0.0)):
        expected = tokens_of(patches, grid, method, chunk_units=chunk_units)
        with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
            made = tokens_of(patches, grid, method, chunk_units=chunk_units)
        assert_same(made, expected)


# --- asked for, or not -------------------------------------------------------------------------------------------------


def test_a_method_gets_only_what_it_asked_for():
    grid = (2, 3, 4)

    @dataclass(frozen=True)
    class Keys(After):
        needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    tokens = tokens_of(random_patches(grid), grid, Keys())
    assert tokens.keys.shape == (24, 64)
    with pytest.raises(TypeError, match=r"attention was not asked for.*`needs`"):
        tokens.attention  # noqa: B018
    with pytest.raises(TypeError, match=r"question was not asked for.*`reads_question`"):
        tokens.question  # noqa: B018


def test_what_there_is_not_cannot_be_asked_for():
    grid = (2, 3, 4)

    @dataclass(frozen=True)
    class Values(After):
        needs: ClassVar[frozenset[str]] = frozenset({"values"})

    with pytest.raises(TypeError, match="after needs 'values'; after the encoder there is attention and keys"):
        encode(tiny_tower(), [random_patches(grid)], grid, Values(), 3)
    with pytest.raises(ValueError, match="sees whole grids"):
        encode(tiny_tower(()), [random_patches(grid)], grid, After(), 3)


def test_nothing_is_gathered_for_those_who_do_not_ask(monkeypatch):
    grid = (2, 3, 4)
    monkeypatch.setattr(encoder, "Gathering", lambda *_: pytest.fail("gathered"))
    for method, keep in ((replace(EvoPrune(), choice="evs-nofloor"), 3), (EvoPrune(), 3), (Inside(), 24)):
        encode(tiny_tower(), [random_patches(grid)], grid, method, keep)


@dataclass(frozen=True)
class Asks(After):
    reads_question: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    def select(self, tokens, keep):
        return (tokens.features @ tokens.question.mean(0)).topk(keep).indices.sort().values


def test_the_question_is_read_after_the_encoder():
    grid, questions = (2, 3, 4), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))
    args = tiny_tower(), [random_patches(grid)], grid, Asks(), 4
    with pytest.raises(UsageError, match="reads the question, and there is none"):
        encode(*args)
    rows = encode_rows(*args)
    made = [choose(rows, question) for question in questions.bfloat16()]
    for question, one in zip(questions.bfloat16(), made, strict=True):
        assert torch.equal(one.kept, encode(*args, question=question).kept) and len(one.kept) == 4
        assert torch.equal(one.features, one.rows[one.kept])
    assert not torch.equal(made[0].kept, made[1].kept)
    nothing = rows.nothing()
    assert (
        len(nothing.kept) == len(nothing.features) == 0 and nothing.live_share == 1 and nothing.kept_per_grid == [0, 0]
    )


def test_keys_of_a_unit_are_its_patches_side_by_side():
    x = torch.randn(3, 4, 2, 8)
    assert torch.equal(unit_features(x), torch.cat([x[:, patch].mean(1) for patch in range(4)], 1))

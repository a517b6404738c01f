"""What a selector is given: attention and keys of the last full-attention layer, states of the middle, the question."""

from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError
from evoprune.methods.base import Selector
from evoprune.methods.chain import Pipeline
from evoprune.methods.evoprune import EvoPrune, Reuse
from evoprune.methods.ranking import unit_features
from evoprune.methods.types import Selection, Tokens
from evoprune.vision import encoder
from evoprune.vision.encoder import encode, encode_rows, select_tokens
from evoprune.vision.layout import geometry
from evoprune.vision.tower import tower_shape
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.devices import take_gpu_route
from tests.vision.reference import embedded, linear, rms_norm, run_layer
from tests.vision.results import encode_noise, encode_patches
from tests.vision.tower import random_patches, tiny_tower


@dataclass(frozen=True, eq=False)
class Looks(Selector):
    """Looks at what it is given, and takes the first tokens."""

    name: ClassVar[str] = "looks"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    seen: list[Tokens] = field(default_factory=list)

    def select(self, tokens, keep):
        self.seen.append(tokens)
        return Selection(torch.arange(keep))


def tokens_of(patches, grid, reuse=False, full_layers=(1, 3), selector=None, **how) -> Tokens:
    selector = selector or Looks()
    method = Pipeline(encoder=Reuse(), selector=selector) if reuse else selector
    encode_patches(patches, grid, method, max(1, prod(grid) // 8), tiny_tower(full_layers), **how)
    (tokens,) = selector.seen
    return tokens


@dataclass(frozen=True, eq=False)
class LooksInside(Looks):
    needs: ClassVar[frozenset[str]] = frozenset({"middle"})


# --- definition --------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2), (2,)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_attention_and_keys_are_those_of_the_last_full_attention_layer(share, full_layers):
    """A reused unit has what its row had when it was encoded."""
    grid, visual = (3, 5, 7), tiny_tower(full_layers)
    changed, geo = changes(grid, share), geometry(5, 7)
    patches = clip(grid, changed)
    with torch.no_grad():
        rows = embedded(visual, patches, geo, prod(grid), changed)
        for layer, block in enumerate(visual.blocks[: full_layers[-1] + 1]):
            run_layer(block, rows, geo, "pair" if layer in full_layers else "window", True)
    row_of = {unit: row for row in rows for unit in row.units}
    for size in (1, 10**6):
        tokens = tokens_of(patches, grid, True, full_layers, chunk_units=size)
        expected = torch.tensor([row_of[unit].attention for unit in range(prod(grid))]) * geo.units
        torch.testing.assert_close(tokens.attention, expected, atol=1e-4, rtol=1e-4)
        keys = torch.stack([row_of[unit].plain.mean(1).flatten() for unit in range(prod(grid))]).float()
        torch.testing.assert_close(tokens.keys, keys, atol=1e-4, rtol=1e-4)
    assert tokens.attention.dtype == tokens.keys.dtype == torch.float32
    if share == 1.0:  # an even share is 1
        torch.testing.assert_close(tokens.attention.view(3, -1).mean(1), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_middle_is_the_mean_of_states_after_the_patch_merger(share):
    """Layers 7 to 23 of 32 are layers 1 to 3 of 4."""
    grid, visual = (3, 5, 7), tiny_tower()
    changed, geo = changes(grid, share), geometry(5, 7)
    patches, states = clip(grid, changed), []
    with torch.no_grad():
        rows = embedded(visual, patches, geo, prod(grid), changed)
        for layer, block in enumerate(visual.blocks):
            run_layer(block, rows, geo, "pair" if layer in (1, 3) else "window", True)
            states.append({unit: row.x for row in rows for unit in row.units})
        first, second, expected = visual.merger.mlp[0], visual.merger.mlp[2], []
        for unit in range(prod(grid)):
            mean = (states[1][unit] + states[2][unit] + states[3][unit]) / 3
            hidden = linear(first, rms_norm(visual.merger.ln_q, mean).flatten())
            expected.append(linear(second, torch.nn.functional.gelu(hidden)))
    for size in (1, 10**6):
        tokens = tokens_of(patches, grid, True, selector=LooksInside(), chunk_units=size)
        torch.testing.assert_close(tokens.middle.double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_keys_of_a_unit_are_those_of_its_patches_joined():
    x = torch.randn(3, 4, 2, 8)
    assert torch.equal(unit_features(x), torch.cat([x[:, patch].mean(1) for patch in range(4)], 1))


# --- what must not change it -------------------------------------------------------------------------------------------


def assert_same_tokens(a: Tokens, b: Tokens) -> None:
    assert torch.equal(a.owner, b.owner)
    torch.testing.assert_close(a.attention, b.attention, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(a.keys, b.keys, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    grid=st.tuples(st.integers(2, 7), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 99),
    full_layers=st.sampled_from([(1, 3), (1,), (0,)]),
    reuse=st.booleans(),
    chunk_units=st.integers(1, 120),
)
def test_attention_and_keys_do_not_depend_on_the_chunk_size(grid, share, seed, full_layers, reuse, chunk_units):
    patches = clip(grid, changes(grid, share, seed), seed)
    whole = tokens_of(patches, grid, reuse, full_layers, chunk_units=10**6)
    assert_same_tokens(tokens_of(patches, grid, reuse, full_layers, chunk_units=chunk_units), whole)
    assert whole.attention.shape == (prod(grid),) and (whole.attention > 0).all()


@pytest.mark.few(2)
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("chunk_units", [1, 10**6])
@pytest.mark.parametrize("reuse", [True, False])
def test_attention_and_keys_do_not_depend_on_the_device(reuse, chunk_units, kernel, monkeypatch):
    grid = (6, 4, 5)
    patches = clip(grid, changes(grid, 0.4))
    expected = tokens_of(patches, grid, reuse, chunk_units=chunk_units)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
        made = tokens_of(patches, grid, reuse, chunk_units=chunk_units)
    assert_same_tokens(made, expected)


# --- declared, or not --------------------------------------------------------------------------------------------------


def test_a_selector_gets_only_what_it_declares():
    @dataclass(frozen=True, eq=False)
    class Keys(Looks):
        needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    tokens = tokens_of(random_patches((2, 3, 4)), (2, 3, 4), selector=Keys(), seed=3)
    assert tokens.keys.shape == (24, 64)
    assert (tokens.grid, tokens.seed) == ((2, 3, 4), 3)
    with pytest.raises(TypeError, match=r'no attention here: .*"attention" in its `needs`'):
        tokens.attention  # noqa: B018
    with pytest.raises(TypeError, match=r"no question here: .*`reads_question`"):
        tokens.question  # noqa: B018


def test_what_does_not_exist_cannot_be_declared():
    @dataclass(frozen=True, eq=False)
    class Values(Looks):
        needs: ClassVar[frozenset[str]] = frozenset({"values"})

    with pytest.raises(TypeError, match="looks needs 'values'; after the encoder there is attention, keys, middle"):
        encode_noise((2, 3, 4), Values(), 3)
    with pytest.raises(ValueError, match="needs a full-attention layer"):
        encode_noise((2, 3, 4), Looks(), 3, full_layers=())


def test_nothing_is_gathered_that_is_not_declared(monkeypatch):
    monkeypatch.setattr(encoder, "Gathering", lambda *_: pytest.fail("gathered"))
    encode_noise((2, 3, 4), EvoPrune(), 3)
    encode_noise((2, 3, 4), Looks(), 24)  # keeps everything


@dataclass(frozen=True, eq=False)
class Asks(Selector):
    reads_question: ClassVar[bool] = True

    def select(self, tokens, keep):
        return Selection((tokens.features @ tokens.question.mean(0)).topk(keep).indices.sort().values)


def test_the_question_is_read_after_the_encoder():
    grid, questions = (2, 3, 4), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    visual = tiny_tower()
    args = visual, [random_patches(grid)], plan_of(Asks(), tower_shape(visual), grid, 4)
    with pytest.raises(UsageError, match="reads the question, and there is none"):
        encode(*args)
    rows = encode_rows(*args)
    made = [select_tokens(rows, question) for question in questions]
    for question, one in zip(questions, made, strict=True):
        assert torch.equal(one.kept, encode(*args, question=question).kept) and len(one.kept) == 4
        assert torch.equal(one.features, one.rows[one.kept])
    assert not torch.equal(made[0].kept, made[1].kept)
    none = rows.nothing_selected()
    assert len(none.kept) == len(none.features) == 0 and none.live_share == 1 and none.kept_per_pair == [0, 0]

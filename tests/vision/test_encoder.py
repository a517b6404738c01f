"""The encoder without reuse: at budget 1, with merging between layers, and with selection after the tower."""

from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.backend import Packing, attention
from evoprune.contrib.tome import ToMe
from evoprune.errors import UsageError
from evoprune.methods import (
    Budget,
    EvoPrunePaper,
    MethodChain,
    Selection,
    Selector,
    Tokens,
    TowerShape,
    available,
)
from evoprune.methods.baselines import Nothing, Random
from evoprune.methods.evoprune import EvoPruneMethod, Reuse
from evoprune.methods.merger import ALLOCATIONS
from evoprune.vision.encoder import encode_rows
from evoprune.vision.layout import geometry
from evoprune.vision.patches import normalised
from evoprune.vision.preprocess import pixel_patches
from tests.methods.kinds import INNER, NEED_FILES
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.devices import take_gpu_route, varlen_by_hand
from tests.vision.reference import embedded, encode_slowly, merged_patches, run_layer
from tests.vision.results import assert_same, check_result, encode_noise, encode_patches
from tests.vision.tower import random_patches, tiny_tower

SIZES = [(1, 1, 1), (3, 1, 1), (1, 4, 4), (1, 5, 7), (2, 3, 5), (3, 8, 4), (2, 9, 6), (1, 1, 9), (4, 6, 2)]


@pytest.mark.few(8)
@pytest.mark.parametrize("grid", SIZES)
@pytest.mark.parametrize("full_layers", [(1, 3), (), (0, 1, 2, 3)])
def test_budget_one_is_hugging_faces_tower(grid, full_layers):
    visual, patches = tiny_tower(full_layers), random_patches(grid)
    with torch.inference_mode():
        theirs = visual(patches, torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])).pooler_output
    for method in (Nothing(), EvoPruneMethod(), EvoPrunePaper(), Random()):
        ours = encode_patches(patches, grid, method, prod(grid), visual)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert torch.equal(ours.kept, torch.arange(prod(grid))) and torch.equal(ours.unit_to_row, ours.kept)
        assert ours.live_share == 1 and ours.size is None


@pytest.mark.few(2)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("grid", [(2, 8, 12), (1, 5, 7)])
def test_bf16_is_as_near_to_float32_as_hugging_faces(grid, packed):
    exact, half, own = (deepcopy(tiny_tower()) for _ in range(3))
    half.bfloat16(), own.bfloat16()
    if packed:
        Packing.now(own)
    patches, thw = random_patches(grid), torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]])
    with torch.inference_mode():
        truth = exact(patches, grid_thw=thw).pooler_output
        theirs = half(patches.bfloat16(), grid_thw=thw).pooler_output.float()
    ours = encode_patches(patches.bfloat16(), grid, Nothing(), prod(grid), own).features.float()
    error, usual = ((x - truth).norm() / truth.norm() for x in (ours, theirs))
    assert 0 < error < 1.3 * usual


# --- chunks, pieces and threads ----------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["evoprune", "evoprune-paper", "divprune"])
def test_the_result_does_not_depend_on_the_number_of_threads(name):
    grid, made = (4, 6, 8), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            made.append(encode_patches(clip(grid, changes(grid, 0.5)), grid, methods.MethodChain.parse(name), 60))
        finally:
            torch.set_num_threads(1)
    assert_same(*made)


def still_frames(grid, scene: str) -> torch.Tensor:
    """Return a still video: black, one noise image, or noise next to a plain area."""
    t, h, w = grid
    random = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 256, (1, h * 28, w * 28, 3), dtype=torch.uint8, generator=random)
    if scene == "black":
        picture.zero_()
    elif scene == "half plain":
        picture[:, :, w * 14 :] = 60
    return picture.expand(t * 2, -1, -1, -1)


@pytest.mark.few(4)
@pytest.mark.parametrize("scene", ["black", "half plain", "still noise", "noise"])
@pytest.mark.parametrize(
    ("grid", "keep", "method"),
    [
        ((4, 8, 8), 179, EvoPrunePaper()),
        ((4, 8, 8), 13, EvoPrunePaper()),
        ((4, 4, 5), 79, EvoPrunePaper()),
        ((3, 6, 9), 16, EvoPrunePaper(features="hidden")),
    ],
)
def test_the_result_does_not_depend_on_the_size_of_pieces(scene, grid, keep, method):
    """Holds with ties too."""
    patches = random_patches(grid) if scene == "noise" else normalised(pixel_patches(still_frames(grid, scene)))
    units = grid[1] * grid[2]
    whole, *others = (
        encode_patches(patches, grid, method, keep, piece_units=size) for size in (10**6, 1, 2 * units, 3 * units)
    )
    assert len(whole.kept) == keep and whole.features.isfinite().all()
    check_result(whole, grid)
    for other in others:
        assert_same(other, whole)


@pytest.mark.few(4)
@pytest.mark.parametrize("cuts", [[139], [140, 140], [0, 5, 400], [140, 280, 420, 560], [700]])
@pytest.mark.parametrize("piece_units", [35, 70])
def test_the_result_does_not_depend_on_how_patches_are_cut_into_pieces(cuts, piece_units):
    grid, method = (5, 5, 7), EvoPrunePaper()
    whole = encode_noise(grid, method, 40, piece_units=piece_units)
    pieces = iter(random_patches(grid).tensor_split(cuts))
    assert_same(encode_patches(pieces, grid, method, 40, piece_units=piece_units), whole, atol=0)


@pytest.mark.parametrize("rows", [[], [136], [140], [276, 3], [280, 1], [280, 140]], ids=str)
@pytest.mark.parametrize("piece_units", [1, 10**6])
def test_patches_that_do_not_add_up_are_refused(rows, piece_units):
    pieces = [torch.zeros(n, 1176) for n in rows]
    with pytest.raises(ValueError, match="patches"):
        encode_patches(pieces, (2, 5, 7), EvoPrunePaper(), 20, piece_units=piece_units)


@st.composite
def papers(draw):
    first, last = sorted((draw(st.floats(0, 1)), draw(st.floats(0, 1))))
    return EvoPrunePaper(
        allocation=draw(st.sampled_from(ALLOCATIONS)),
        first=first,
        last=last,
        critical=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        neighbours=draw(st.integers(1, 5)),
        features=draw(st.sampled_from(["keys", "keys_rotary", "hidden"])),
        size_bias=draw(st.booleans()),
    )


@settings(deadline=None, max_examples=25)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    st.floats(0, 1, exclude_min=True),
    papers(),
    st.sampled_from([(1, 3), (), (0,), (1,), (2,), (0, 1, 2, 3)]),
    st.integers(1, 200),
)
def test_exactly_the_budget_comes_out(grid, budget, method, full_layers, piece_units):
    keep, visual = Budget.count(budget, prod(grid)), tiny_tower(full_layers)
    encoded = encode_noise(grid, method, keep, full_layers, piece_units=piece_units)
    plan = plan_of(method, TowerShape.of_tower(visual), grid, keep)
    assert len(encoded.kept) == len(encoded.features) == keep
    assert encoded.layers == list(enumerate(plan.layers)) and len(encoded.rows) == plan.rows
    assert encoded.live_share == pytest.approx(sum(plan.layers) / 4 / prod(grid))
    check_result(encoded, grid)


@pytest.mark.parametrize("keep", [1, 2, 3, 5, 8])
def test_below_a_token_a_frame_pair_the_whole_clip_is_covered(keep):
    encoded = encode_noise((9, 3, 3), EvoPrunePaper(), keep)
    assert len(encoded.rows) == 9 and len(encoded.kept) == keep
    for length in range(1, 10):  # every range of frame pairs has its share, rounded up or down
        for at in range(10 - length):
            assert abs(sum(encoded.kept_per_pair[at : at + length]) - keep * length / 9) < 1


def test_the_largest_rows_are_kept_where_merging_cannot_reach_the_count():
    # No layer attends to whole frame pairs, so each of the six windows keeps a row, and the last selection drops four of them.
    encoded = encode_noise((1, 5, 12), EvoPrunePaper(), 2, full_layers=())
    assert len(encoded.rows) == 6 and len(encoded.kept) == 2
    sizes = torch.bincount(encoded.unit_to_row)
    assert sizes.tolist() == [16, 16, 16, 4, 4, 4]
    assert sizes[encoded.unit_to_row[encoded.kept]].tolist() == [16, 16]


@dataclass(frozen=True, eq=False)
class Sees(EvoPrunePaper):
    """Records the candidates it is given."""

    seen: list = field(default_factory=list)

    def match(self, candidates, remove):
        self.seen.append(candidates)
        return super().match(candidates, remove)


def test_a_merger_sees_the_places_of_rows_and_how_many_units_they_represent():
    method = Sees(first=0.0, last=1.0)
    encode_noise((3, 5, 7), method, 12, full_layers=(0, 1, 2, 3))
    for seen in method.seen:
        assert seen.width == 7 and torch.equal(seen.size.masked_fill(~seen.valid, 0).sum(1), torch.tensor([35] * 3))
        for place, valid in zip(seen.place, seen.valid, strict=True):
            assert len({*place[valid].tolist()}) == int(valid.sum())
    assert method.seen[0].place.sort().values.tolist() == [list(range(35))] * 3 and method.seen[-1].size.max() > 1


LIKE = [
    *(((2, 5, 7), {"features": features}, keep, (1, 3))
      for features in ("keys", "keys_rotary", "hidden") for keep in (48, 18, 7)),
    *(((1, 6, 6), weights, 9, (1, 3))
      for weights in (
          {"size_bias": False},
          {"diversity": 0.0, "attention": 0.0, "critical": 0.0},
          {"diversity": -0.5, "attention": 1.0, "neighbours": 1},
          {"diversity": 1.0, "critical": 0.5, "neighbours": 40},
          {"critical": 1.0},
      )),
    # If a full-attention layer comes first, rows own units of other windows when a window layer follows.
    *(((2, 4, 6), {"allocation": allocation, "first": 0, "last": 0.8}, 11, full_layers)
      for allocation in ALLOCATIONS for full_layers in ((1, 3), (0, 3), (2,))),
    *(((2, 5, 7), {"name": "tome", "size_bias": size_bias}, keep, (1, 3)) for keep in (48, 17, 2) for size_bias in (True, False)),
]  # fmt: skip


@pytest.mark.few(3)
@pytest.mark.parametrize(("grid", "settings_", "keep", "full_layers"), LIKE)
def test_merging_against_loops(grid, settings_, keep, full_layers):
    settings_ = dict(settings_)
    method = ToMe(**settings_) if settings_.pop("name", None) else EvoPrunePaper(**settings_)
    units, owner, tokens = encode_slowly(tiny_tower(full_layers), random_patches(grid), grid, method, keep)
    encoded = encode_noise(grid, method, keep, full_layers)
    assert len(units) == keep  # otherwise the reference would have to reduce rows by size too
    assert encoded.kept.tolist() == units and encoded.unit_to_row.tolist() == owner
    torch.testing.assert_close(encoded.features.double(), tokens, atol=1e-4, rtol=1e-4)


# Every method on the GPU path, with groups packed for the varlen kernel or padded without it, equals the CPU's result

GRID = (5, 5, 7)
METHODS = [name for name in available(plugins=False) if name not in (*INNER, *NEED_FILES, "downscale", "subsample")]
COMBINED = ["reuse+divprune", "reuse+visionzip", "ipcv+divprune", "ipcv+nuwa"]


def encoded(name: str, piece_units: int):
    method, visual = MethodChain.parse(name), tiny_tower((1, 3))
    plan = method.plan(TowerShape.of_tower(visual), GRID, 40)
    random = torch.Generator().manual_seed(1)
    question = torch.randn(6, 24, generator=random) if method.reads_question else None
    patches = clip(GRID, changes(GRID, 0.4))
    return encode_rows(visual, [patches], plan, piece_units=piece_units).select_tokens(question)


@pytest.mark.few(4)
@pytest.mark.parametrize("piece_units", [70, 10**6])
@pytest.mark.parametrize("kernel", [True, False], ids=["varlen", "padded"])
@pytest.mark.parametrize("name", [*METHODS, *COMBINED])
def test_every_method_is_the_cpus(name, kernel, piece_units, monkeypatch):
    expected = encoded(name, piece_units)
    take_gpu_route(monkeypatch, kernel)  # methods may wait for the device when they select
    calls = []

    def counted(*given, **how):
        calls.append(given)
        return varlen_by_hand(*given, **how)

    monkeypatch.setattr(attention.Attention, "varlen_kernel", property(lambda _: counted if kernel else None))
    assert_same(encoded(name, piece_units), expected, atol=1e-4)
    assert bool(calls) == kernel


# Inputs of a selector: attention and keys of the last full-attention layer, states of the middle, the question.


@dataclass(frozen=True, eq=False)
class Looks(Selector):
    """Records its inputs and takes the first tokens."""

    name: ClassVar[str] = "looks"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})
    seen: list[Tokens] = field(default_factory=list)

    def select(self, tokens, keep):
        self.seen.append(tokens)
        return Selection(torch.arange(keep))


def tokens_of(patches, grid, reuse=False, full_layers=(1, 3), selector=None, **how) -> Tokens:
    selector = selector or Looks()
    method = MethodChain(encoder=Reuse(), selector=selector) if reuse else selector
    encode_patches(patches, grid, method, max(1, prod(grid) // 8), tiny_tower(full_layers), **how)
    (tokens,) = selector.seen
    return tokens


@dataclass(frozen=True, eq=False)
class LooksInside(Looks):
    needs: ClassVar[frozenset[str]] = frozenset({"middle"})


@pytest.mark.few(1)
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2), (2,)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_attention_and_keys_are_those_of_the_last_full_attention_layer(share, full_layers):
    """A reused unit has the values that its row had when it was encoded."""
    grid, visual = (3, 5, 7), tiny_tower(full_layers)
    changed, geo = changes(grid, share), geometry(5, 7)
    patches = clip(grid, changed)
    with torch.no_grad():
        rows = embedded(visual, patches, geo, prod(grid), changed)
        for layer, block in enumerate(visual.blocks[: full_layers[-1] + 1]):
            run_layer(block, rows, geo, "pair" if layer in full_layers else "window", True)
    row_of = {unit: row for row in rows for unit in row.units}
    for size in (1, 10**6):
        tokens = tokens_of(patches, grid, True, full_layers, piece_units=size)
        expected = torch.tensor([row_of[unit].attention for unit in range(prod(grid))]) * geo.units
        torch.testing.assert_close(tokens.attention, expected, atol=1e-4, rtol=1e-4)
        keys = torch.stack([row_of[unit].plain.mean(1).flatten() for unit in range(prod(grid))]).float()
        torch.testing.assert_close(tokens.keys, keys, atol=1e-4, rtol=1e-4)
    assert tokens.attention.dtype == tokens.keys.dtype == torch.float32
    if share == 1.0:  # the mean share is 1
        torch.testing.assert_close(tokens.attention.view(3, -1).mean(1), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_middle_is_the_mean_of_states_after_the_patch_merger(share):
    """Layers 7 to 23 of 32 correspond to layers 1 to 3 of 4."""
    grid, visual = (3, 5, 7), tiny_tower()
    changed, geo = changes(grid, share), geometry(5, 7)
    patches, states = clip(grid, changed), []
    with torch.no_grad():
        rows = embedded(visual, patches, geo, prod(grid), changed)
        for layer, block in enumerate(visual.blocks):
            run_layer(block, rows, geo, "pair" if layer in (1, 3) else "window", True)
            states.append({unit: row.x for row in rows for unit in row.units})
        means = [(states[1][unit] + states[2][unit] + states[3][unit]) / 3 for unit in range(prod(grid))]
        expected = [merged_patches(visual.merger, mean) for mean in means]
    for size in (1, 10**6):
        tokens = tokens_of(patches, grid, True, selector=LooksInside(), piece_units=size)
        torch.testing.assert_close(tokens.middle.double(), torch.stack(expected), atol=1e-4, rtol=1e-4)


def test_a_selector_gets_only_what_it_declares():
    @dataclass(frozen=True, eq=False)
    class Keys(Looks):
        needs: ClassVar[frozenset[str]] = frozenset({"keys"})

    tokens = tokens_of(random_patches((2, 3, 4)), (2, 3, 4), selector=Keys(), seed=3)
    assert tokens.keys.shape == (24, 64)
    assert (tokens.grid, tokens.seed) == ((2, 3, 4), 3)
    with pytest.raises(TypeError, match=r'attention is not available: .*"attention" in its `needs`'):
        tokens.attention  # noqa: B018
    with pytest.raises(TypeError, match=r"question is not available: .*`reads_question`"):
        tokens.question  # noqa: B018


def test_what_does_not_exist_cannot_be_declared():
    @dataclass(frozen=True, eq=False)
    class Values(Looks):
        needs: ClassVar[frozenset[str]] = frozenset({"values"})

    with pytest.raises(TypeError, match="looks needs 'values'; the encoder provides attention, keys, middle"):
        encode_noise((2, 3, 4), Values(), 3)
    with pytest.raises(ValueError, match="needs a full-attention layer"):
        encode_noise((2, 3, 4), Looks(), 3, full_layers=())


def test_nothing_is_gathered_that_is_not_declared(monkeypatch):
    monkeypatch.setattr("evoprune.vision.hooks.selector_hooks", lambda *_: pytest.fail("gathered"))
    encode_noise((2, 3, 4), EvoPruneMethod(), 3)
    encode_noise((2, 3, 4), Looks(), 24)  # keeps everything


@dataclass(frozen=True, eq=False)
class Asks(Selector):
    reads_question: ClassVar[bool] = True

    def select(self, tokens, keep):
        return Selection((tokens.features @ tokens.question.mean(0)).topk(keep).indices.sort().values)


def test_the_question_is_read_after_the_encoder():
    grid, questions = (2, 3, 4), torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    visual = tiny_tower()
    args = visual, [random_patches(grid)], plan_of(Asks(), TowerShape.of_tower(visual), grid, 4)
    with pytest.raises(UsageError, match="reads the question, but there is no question"):
        encode_rows(*args).select_tokens()
    rows = encode_rows(*args)
    made = [rows.select_tokens(question) for question in questions]
    for question, one in zip(questions, made, strict=True):
        assert torch.equal(one.kept, encode_rows(*args).select_tokens(question).kept) and len(one.kept) == 4
        assert torch.equal(one.features, one.rows[one.kept])
    assert not torch.equal(made[0].kept, made[1].kept)
    none = rows.nothing_selected()
    assert len(none.kept) == len(none.features) == 0 and none.live_share == 1 and none.kept_per_pair == [0, 0]

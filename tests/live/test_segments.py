"""Segments of a longer video: unchanged units are not encoded again, and the result is the same as for the whole video."""

from math import prod
from types import SimpleNamespace

import pytest
import torch

from evoprune import methods
from evoprune.live.segments import NothingNew, SegmentRun, encode_segment
from evoprune.methods import TowerShape
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune.model import Cost
from evoprune.vision import encode_rows
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.tower import QWEN3_WIDTH, tiny_qwen3, tiny_tower

PLACES = 5, 6


def in_segments(visual, patches, method, pairs, budget, **how):
    """Encode a video in segments of `pairs` frame pairs, each with K tokens or this share of its units."""
    earlier, made = None, []
    for piece, count in zip(patches.split([4 * prod(PLACES) * n for n in pairs]), pairs, strict=True):
        grid = (count, *PLACES)
        plan = plan_of(method, TowerShape.of_tower(visual), grid, max(1, round(budget * prod(grid))))
        made.append(encode_segment(visual, [piece], plan, earlier, **how))
        earlier = made[-1][1]
    return made


@pytest.mark.few(4)
@pytest.mark.parametrize("piece_units", [1, 60, 10**6])
@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("tower", [tiny_tower, tiny_qwen3])
def test_without_selections_between_layers_segments_are_the_whole(tower, share, piece_units):
    visual, grid, pairs = tower(), (9, *PLACES), (3, 1, 3, 2)
    changed = changes(grid, share)
    patches = clip(grid, changed, width=QWEN3_WIDTH if tower is tiny_qwen3 else 1176)
    method = methods.MethodChain.parse("evoprune:depth=1:first=0")
    ((whole, _),) = in_segments(visual, patches, method, (9,), 1 / 3)  # a plan with another count has the same rows
    parts = [rows for rows, _ in in_segments(visual, patches, method, pairs, 1 / 3, piece_units=piece_units)]
    for values in (lambda rows: rows.selector_input.rows, lambda rows: rows.rows.deepstack):
        of_units = torch.cat([values(part)[part.selector_input.unit_to_row] for part in parts])
        torch.testing.assert_close(of_units, values(whole)[whole.selector_input.unit_to_row], atol=2e-5, rtol=1e-5)
    assert sum(part.layers[0][1] for part in parts) == whole.layers[0][1] == changed.sum()
    assert all(len(part.select_tokens().kept) == round(prod(part.plan.grid) / 3) for part in parts)


@pytest.mark.parametrize("name", ["evoprune", "evoprune:first=0", "evoprune:first=0.2:rows=0.4:depth=0.5"])
def test_selections_between_layers_see_rows_of_their_own_segment_alone(name, monkeypatch):
    visual, grid, pairs = tiny_tower(), (9, *PLACES), (3, 3, 3)
    entered, select_rows = [], SegmentRun.select_rows
    monkeypatch.setattr(SegmentRun, "select_rows", lambda *args: entered.append(select_rows(*args)) or entered[-1])
    patches = clip(grid, changes(grid, 0.3))
    method = methods.MethodChain.parse(name)
    parts, cut = (in_segments(visual, patches, method, pairs, 0.4, piece_units=size) for size in (10**6, 1))
    for number, ((part, _), (other, _)) in enumerate(zip(parts, cut, strict=True)):
        torch.testing.assert_close(part.selector_input.rows, other.selector_input.rows, atol=2e-5, rtol=1e-5)
        assert (
            torch.equal(part.selector_input.unit_to_row, other.selector_input.unit_to_row)
            and part.layers == other.layers
        )
        owner, computed = part.selector_input.unit_to_row, part.layers[-1][1]
        assert (owner >= 0).all() and owner.unique().numel() == len(part.rows.unit) >= computed
        assert (part.rows.unit.diff() > 0).all() and torch.equal(
            owner[part.rows.unit], torch.arange(len(part.rows.unit))
        )
        tokens = part.select_tokens()
        assert len(tokens.kept) == 36 and tokens.features.isfinite().all()
        if number:
            before, place = parts[number - 1][1].features, part.rows.unit % prod(PLACES)
            taken = torch.tensor(
                [bool((row == of).all()) for row, of in zip(part.selector_input.rows, before[place], strict=True)]
            )
            assert taken.sum() == len(part.rows.unit) - computed > 0
    for rows in entered:  # units of the previous segment have their row at their place
        outside = (rows.unit_to_row >= len(rows)).nonzero()[:, 0]
        assert torch.equal(rows.unit_to_row[outside] - len(rows), outside % prod(PLACES))


def test_a_segment_without_anything_new_is_refused():
    patches = clip((4, *PLACES), changes((4, *PLACES), 0.0))
    with pytest.raises(NothingNew):
        in_segments(tiny_tower(), patches, methods.MethodChain.parse("evoprune"), (2, 2), 0.5)


@pytest.mark.parametrize("name", ["tome", "evoprune-paper", "divprune", "reuse+vispruner", "evoprune:reuse=0", "none"])
def test_what_needs_more_than_rows_leaves_nothing(name):
    patches = clip((4, *PLACES), changes((4, *PLACES), 0.3))
    visual, method = tiny_tower(), methods.MethodChain.parse(name)
    parts = in_segments(visual, patches, method, (2, 2), 0.5)
    plan = plan_of(method, TowerShape.of_tower(visual), (2, *PLACES), 30)
    alone = encode_rows(visual, [patches[len(patches) // 2 :]], plan)
    assert parts[0][1] is None and torch.equal(parts[1][0].selector_input.rows, alone.selector_input.rows)


def test_what_a_segment_leaves_to_the_next_one():
    grid = (6, 3, 5)
    patches, visual = clip(grid, changes(grid, 0.1)), tiny_tower()
    _, left = encode_segment(
        visual, [patches], plan_of(EvoPruneMethod(depth=1.0), TowerShape.of_tower(visual), grid, 30), None
    )
    per_place = 4 * (2 * 4 * 32 * 4)  # keys and values of four patches in four layers
    assert sum(x.untyped_storage().nbytes() for x in left.keys_values.values()) == 15 * per_place
    cost = Cost(SimpleNamespace(vision_config=visual.config, text_config=None))
    assert cost.carried_bytes(15, 4) == 15 * per_place

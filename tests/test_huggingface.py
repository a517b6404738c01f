"""The two-line use on somebody's own model."""

import pytest
import torch

import evoprune
from evoprune.errors import UsageError
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def inputs(*grids):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator), torch.tensor(grids)


@pytest.mark.parametrize("grids", [[(3, 8, 12)], [(1, 2, 2)], [(2, 10, 14), (1, 4, 4), (3, 6, 18)]])
def test_full_budget_is_the_models_own_tower(model, grids):
    patches, thw = inputs(*grids)
    with torch.inference_mode():
        expected = torch.cat(model.model.get_video_features(patches, thw).pooler_output)
    made = evoprune.encode(model, patches, thw, budget=1.0)
    assert (made.features - expected).norm() <= 1e-5 * expected.norm()
    assert made.kept.tolist() == list(range(len(expected))) and made.live_share == 1.0


def test_several_videos_are_pruned_each_on_its_own(model):
    grids = [(2, 10, 14), (1, 4, 4), (3, 6, 18)]
    patches, thw = inputs(*grids)
    made = evoprune.encode(model, patches, thw, budget=0.25)
    first_unit = first_row = 0
    for i, (t, h, w) in enumerate(grids):
        start, n = first_unit * 4, t * h * w
        alone = evoprune.encode(model, patches[start : start + n], thw[i : i + 1], budget=0.25)
        mine = (made.kept >= first_unit) & (made.kept < first_unit + n // 4)
        assert torch.equal(made.kept[mine] - first_unit, alone.kept)
        torch.testing.assert_close(made.features[mine], alone.features)
        assert torch.equal(made.owner[first_unit : first_unit + n // 4] - first_row, alone.owner)
        first_unit, first_row = first_unit + n // 4, first_row + len(alone.rows)
    assert sum(made.kept_per_grid) == len(made.kept) and len(made.kept_per_grid) == 6


def test_patches_that_do_not_fit(model):
    patches, thw = inputs((1, 4, 4))
    with pytest.raises(evoprune.UsageError, match="do not fit"):
        evoprune.encode(model, patches[:-4], thw)


def test_methods_that_act_on_frames_are_refused():
    with pytest.raises(evoprune.UsageError, match="acts on frames"):
        evoprune.encode(None, torch.zeros(4, 1176), torch.tensor([[1, 2, 2]]), method="downscale")


def test_methods_that_read_the_question_are_given_it_or_refused(model):
    patches, thw = inputs((2, 10, 14))
    with pytest.raises(UsageError, match="cdpruner reads the question"):
        evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner")
    asked = [model.get_input_embeddings()(torch.tensor(ids)) for ids in ([5, 9, 40], [77, 3])]
    kept = [evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner", question=q).kept for q in asked]
    assert [len(each) for each in kept] == [18, 18] and not torch.equal(*kept)

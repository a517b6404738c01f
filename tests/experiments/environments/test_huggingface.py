"""The counts of the comparison, and the plugin's changes to inputs of transformers' tests. Those tests themselves are not here."""

import pytest
import torch

from experiments.environments.huggingface import compare, with_patches
from tests.tiny import tiny_config, tiny_model


def record(outcome, refused=False, message=None):
    return {"outcome": outcome, "refused": refused, "message": message}


def test_only_tests_that_pass_unpatched_are_compared():
    before = {name: record("passed") for name in "abcde"} | {"f": record("failed"), "g": record("skipped")}
    after = {
        "a": record("passed"),
        "b": record("failed", True, "UsageError: no"),
        "c": record("failed", True, "UsageError: no"),
        "d": record("skipped", message="Skipped: odd"),
        "f": record("failed"),
    }
    refused, failed = compare(before, after)
    assert refused == {"UsageError: no": 2}
    assert [record["message"] for record in failed] == ["Skipped: odd", "did not run"]


@pytest.mark.parametrize("videos", [False, True])
def test_the_model_takes_inputs_with_more_patches(videos):
    config = tiny_config()
    ids = torch.randint(1, 200, (2, 9))
    ids[:, 2], ids[:, 3:7] = config.vision_start_token_id, config.image_token_id
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": torch.randn(8, 1176),
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2),  # one patch per unit
    }
    config, made = with_patches(config, dict(inputs), 1, videos)
    name, grids = ("video", [[2, 2, 4]] * 2) if videos else ("image", [[1, 4, 4]] * 2)
    assert made[f"{name}_grid_thw"].tolist() == grids and ("pixel_values" in made) is not videos
    assert torch.equal(made["mm_token_type_ids"].bool(), inputs["mm_token_type_ids"].bool())
    assert tiny_model()(**made).logits.shape == (2, 9, config.text_config.vocab_size)

"""Test that all three variants of the tower encode the same video, at sizes that take milliseconds."""

import pytest
import torch

from evoprune.backend import Packing
from experiments.speed.packed_tower import measure
from tests.tiny import tiny_model


@pytest.mark.skipif(not Packing.supports(torch.empty(1)), reason="this torch has no packed products")
def test_every_way_gives_the_tokens_of_hugging_face():
    patches = torch.randn(2 * 8 * 12, 1176, generator=torch.Generator().manual_seed(0))
    rows = measure(tiny_model().model.visual, patches, torch.tensor([[2, 8, 12]]), rounds=1)
    assert [name for name, *_ in rows] == ["Hugging Face", "EvoPrune", "EvoPrune, pack=True"]
    assert all(ms > 0 and apart < 1e-5 for _, ms, apart in rows)

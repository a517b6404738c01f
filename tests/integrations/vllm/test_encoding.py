"""One video of a request, as vLLM's model encodes it."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from evoprune import methods
from evoprune.errors import PluginError, UsageError
from evoprune.integrations.vllm.encoding import Item, Normalised, encoded, try_out, with_columns
from evoprune.integrations.vllm.positions import COLUMNS, from_columns, split_bias
from evoprune.integrations.vllm.settings import served_method
from evoprune.language.prompt import video_positions
from evoprune.methods.base import Selector
from evoprune.methods.chain import Pipeline
from evoprune.methods.types import Selection
from evoprune.vision.preprocess import CLIP_MEAN, CLIP_STD, patchify
from tests.tiny import tiny_model

GRID = (4, 4, 6)


@pytest.fixture(scope="module")
def visual():
    return tiny_model().model.visual


def patches(grid=GRID):
    return torch.randn(math.prod(grid) * 4, 1176, generator=torch.Generator().manual_seed(1))


def test_columns_hold_position_and_log_of_the_cluster_size(visual):
    item = Item(GRID, 20, 0.7)
    found = encoded(visual, [patches()], item, methods.parse("evoprune"))
    made = with_columns(found, item, 2.0)
    wide = found.features.shape[1]
    plain, bias = split_bias(from_columns(made[:, wide:]))
    assert made.shape == (20, wide + COLUMNS) and torch.equal(made[:, :wide], found.features)
    assert torch.equal(plain, video_positions(GRID, 0.7, 2.0)[:, found.kept])
    assert torch.equal(bias, found.size.log()) and bias.max() > 0


def test_bytes_are_normalised_as_in_preprocessing():
    frames = torch.randint(0, 256, (4, 56, 84, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    pixels = patchify(frames, (0.0,) * 3, (1 / 255,) * 3).round().to(torch.uint8)  # in their order, as bytes
    made = torch.cat(list(Normalised(CLIP_MEAN, CLIP_STD, 1 / 255)(pixels)))
    assert torch.equal(made, patchify(frames))


@pytest.mark.parametrize(("mean", "std", "scale"), [(0.1, 5.0, 1 / 255), (25.5, 1275.0, 1.0)])
def test_what_counts_as_unchanged_does_not_depend_on_the_normalisation(visual, mean, std, scale):
    levels = torch.full((1, 28 * 4, 28 * 6, 3), 100, dtype=torch.uint8).repeat(8, 1, 1, 1)
    levels[4:, :56] = 115  # half of each frame, from the third pair on
    pixels = patchify(levels, (0.0,) * 3, (1 / 255,) * 3).round().to(torch.uint8)
    normalised = Normalised((mean,) * 3, (std,) * 3, scale)
    found = encoded(visual, normalised(pixels), Item(GRID, 20), methods.parse("reuse+divprune"), normalised.normal)
    assert found.layers[0] == (0, 24 + 12)


def test_a_video_of_which_all_is_kept_has_no_bias(visual):
    item = Item(GRID, math.prod(GRID))
    made = with_columns(encoded(visual, [patches()], item, methods.parse("evoprune")), item, 2.0)
    assert not split_bias(from_columns(made[:, -COLUMNS:]))[1].any()


@dataclass(frozen=True)
class TooFew(Selector):
    name: ClassVar[str] = "too-few"
    exact: ClassVar[bool] = False

    def select(self, tokens, keep):
        return Selection(torch.arange(keep - 1))


@dataclass(frozen=True)
class Undeclared(Selector):
    name: ClassVar[str] = "undeclared"

    def select(self, tokens, keep):
        return Selection(torch.arange(keep), size=torch.full((keep,), 2.0))


def test_a_method_that_does_not_hold_what_it_declares_fails_at_the_start(visual):
    with pytest.raises(PluginError, match="kept 15 tokens of 16"):
        try_out(visual, Pipeline.of(TooFew()))
    with pytest.raises(UsageError, match="sizes"):
        try_out(visual, Pipeline.of(Undeclared()))
    try_out(visual, methods.parse("evoprune"))


def served() -> list[str]:
    """The methods that a server takes."""
    found = ["evoprune:count=0", "reuse+divprune", "ipcv+divprune"]
    for name in methods.built_in():
        with suppress(UsageError):
            served_method(name)
            found.append(name)
    return found


@pytest.mark.parametrize("name", served())
def test_whether_tokens_have_weights_is_declared(visual, name):
    method = methods.parse(name)
    found = encoded(visual, [patches()], Item(GRID, 20), method)
    assert (found.size is not None) == method.weighs

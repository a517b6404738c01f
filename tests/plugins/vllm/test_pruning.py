"""Pruning on a server: accepted methods and budgets, and how one video of a request is encoded."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from evoprune import methods
from evoprune.errors import PluginError, UsageError
from evoprune.language import video_positions
from evoprune.methods import MethodChain, Selection, Selector
from evoprune.video import InputLimits
from evoprune.vision import normalised, pixel_patches
from evoprune_vllm.positions import COLUMNS, from_columns, split_bias
from evoprune_vllm.pruning import encoded, normalisation, request_budget, served_method, try_out, with_columns
from tests.methods.kinds import NEED_FILES
from tests.tiny import tiny_model

GRID = (4, 4, 6)


@pytest.fixture(scope="module")
def visual():
    return tiny_model().model.visual


def patches(grid=GRID):
    return torch.randn(math.prod(grid) * 4, 1176, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "cdpruner"}, "reads the question"),
        ({"method": "downscale"}, "acts on frames"),
        ({"method": "evoprune+fastv"}, "inside the language model"),
        ({"method": "none"}, "prunes nothing"),
        ({"method": "evs"}, "how many tokens"),
        ({"method": "evoprune:within=0.01"}, "how many tokens"),
        ({"method": "evoprun"}, "unknown pruning method"),
        ({"method": "evoprune:reuse=-1"}, "at least 0"),
        ({"method": 3}, "not a name"),
        ({"budget": 0.1}, "no setting 'budget'"),
        ("divprune", "no setting 'divprune'"),
    ],
)
def test_a_method_that_cannot_work_is_refused_with_a_hint(section, says):
    with pytest.raises(UsageError, match=says) as caught:
        served_method({"evoprune": section})
    assert caught.value.hint


def test_methods_and_budgets():
    assert served_method({}).name == "evoprune"
    assert served_method({"evoprune": {"method": "evoprune:count=0"}}).encoder.count == 0
    assert [request_budget({}, rate).recorded for rate in (None, 0.0, 0.75, 0.9)] == [1.0, 1.0, 0.25, 0.1]
    assert request_budget({"evoprune_budget": "50%", "fps": 2}, 0.9).recorded == 0.5
    assert request_budget({"evoprune_budget": 1.0}, None).recorded == 1.0


@pytest.mark.parametrize(
    ("options", "rate", "says"),
    [
        ({"evoprune_budget": 0}, 0.5, "not a share"),
        ({"evoprune_budget": "auto"}, 0.5, "does not work here"),
        ({"evoprune_budget": [0.5]}, 0.5, "not a share"),
        ({"evoprune_budget": 0.5}, None, "prunes nothing"),
        ({"evoprune_bugdet": 0.5}, 0.5, "no option"),
    ],
)
def test_a_bad_budget_of_a_request_is_refused(options, rate, says):
    with pytest.raises(UsageError, match=says):
        request_budget(options, rate)


def test_columns_hold_position_and_log_of_the_cluster_size(visual):
    found = encoded(visual, patches(), GRID, 20, methods.MethodChain.parse("evoprune"))
    made = with_columns(found, 0.7, 2.0)
    wide = found.features.shape[1]
    plain, bias = split_bias(from_columns(made[:, wide:]))
    assert made.shape == (20, wide + COLUMNS) and torch.equal(made[:, :wide], found.features)
    assert torch.equal(plain, video_positions(GRID, 0.7, 2.0)[:, found.kept])
    assert torch.equal(bias, found.size.log()) and bias.max() > 0
    whole = with_columns(
        encoded(visual, patches(), GRID, math.prod(GRID), methods.MethodChain.parse("evoprune")), 1.0, 2.0
    )
    assert not split_bias(from_columns(whole[:, -COLUMNS:]))[1].any()


@pytest.mark.parametrize(("mean", "std", "scale"), [(0.1, 5.0, 1 / 255), (25.5, 1275.0, 1.0)])
def test_what_counts_as_unchanged_does_not_depend_on_the_normalisation(visual, mean, std, scale):
    levels = torch.full((8, 28 * 4, 28 * 6, 3), 100, dtype=torch.uint8)
    levels[4:, :56] = 115  # half of each frame, from the third pair on
    pixels, normal = pixel_patches(levels), normalisation((mean,) * 3, (std,) * 3, scale)
    assert [each[0] for each in normal] == pytest.approx([0.1, 5.0])
    for each in (pixels, (pixels * scale - mean) / std):  # bytes, and values normalized as by Hugging Face's processor
        found = encoded(visual, each, GRID, 20, methods.MethodChain.parse("reuse+divprune"), normal)
        assert found.layers[0] == (0, 24 + 12)


def test_bytes_are_normalised_as_in_preprocessing(visual):
    pixels = torch.randint(0, 256, (math.prod(GRID) * 4, 1176), generator=torch.Generator().manual_seed(0)).byte()
    normal, method = normalisation(*InputLimits().normal, 1 / 255), methods.MethodChain.parse("divprune")
    assert normal == InputLimits().normal
    both = [encoded(visual, each, GRID, 20, method, normal) for each in (pixels, normalised(pixels))]
    assert torch.equal(both[0].features, both[1].features) and torch.equal(both[0].kept, both[1].kept)


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
        try_out(visual, MethodChain.of(TooFew()))
    with pytest.raises(UsageError, match="sizes"):
        try_out(visual, MethodChain.of(Undeclared()))
    try_out(visual, methods.MethodChain.parse("evoprune"))


def served() -> list[str]:
    """Return the methods that a server accepts."""
    found = ["evoprune:count=0", "reuse+divprune", "ipcv+divprune"]
    for name in sorted({*methods.available(plugins=False)} - {*NEED_FILES}):
        with suppress(UsageError):
            served_method({"evoprune": {"method": name}})
            found.append(name)
    return found


@pytest.mark.parametrize("name", served())
def test_whether_tokens_have_weights_is_declared(visual, name):
    method = methods.MethodChain.parse(name)
    found = encoded(visual, patches(), GRID, 20, method)
    assert (found.size is not None) == method.weighs

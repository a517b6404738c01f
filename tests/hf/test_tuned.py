"""A budget of "tuned" inside a Hugging Face model."""

from dataclasses import replace

import pytest
import torch

import evoprune
from evoprune.errors import UsageError
from evoprune.session.loading.weights import model_fingerprint
from evoprune.session.saved import tuned
from tests.prompts import processed
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_model
from tests.tuned import ORIGIN, SETTING, tune


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_it_is_the_setting_of_the_weights(model, saved, config):
    tune(saved)
    call = processed(model, [3, ("video", 4, 8, 8), 5])
    with torch.no_grad(), evoprune.EvoPrune(budget="tuned", seed=1)(model) as run:
        found = model(**call).logits
    pruning = run.report.pruning
    assert (pruning.method, pruning.budget, pruning.tuned) == (SETTING.method, SETTING.budget, ORIGIN)
    assert (run.settings.budget, run.settings.seed) == (SETTING.budget, 1)
    with torch.no_grad(), evoprune.EvoPrune(SETTING.budget, SETTING.method)(model) as given:
        assert torch.equal(model(**call).logits, found)
    assert given.report.pruning.tuned is None
    evoprune.apply(model, budget="tuned").remove()


def test_refused(model, config):
    context = evoprune.EvoPrune(budget="tuned")
    with pytest.raises(UsageError, match="no tuned setting for this model"):
        context(model)
    refused = (
        ("subsample", "acts on frames"),
        ("cdpruner", "reads the question"),
        ("evoprune+fastv", "inside the language"),
    )
    for method, message in refused:
        tuned.save(model_fingerprint(model), replace(SETTING, method=method))
        with pytest.raises(UsageError, match=message):
            context(model)

"""Check what is computed while a model is being loaded, so that the first question doesn't have to wait for it."""

import torch

from evoprune.backend import limits
from evoprune.session import load_model
from evoprune.session.loading import model
from evoprune.vision import encode_rows


def test_warming_up_compiles_what_larger_inputs_need(monkeypatch):
    plans = []
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", 150)
    monkeypatch.setattr(model, "encode_rows", lambda *given: plans.append(given[2]) or encode_rows(*given))
    model._warm_up(load_model("demo", device="cpu").model.config, torch.float32, torch.device("cpu"), native=True)
    assert len(plans[0].stages) == 3 and plans[0].reuse

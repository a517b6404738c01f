"""Weights: random ones are the same numbers in every program."""

import torch

from evoprune.session.loading.model import load_model


def test_they_do_not_depend_on_the_default_dtype(saved):
    def weights():
        return load_model(str(saved), load_format="dummy", dtype="bf16", pack=False).model.state_dict()

    expected = weights()
    torch.set_default_dtype(torch.float64)
    try:
        made = weights()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(made[name], weight) for name, weight in expected.items())
    assert {weight.dtype for weight in made.values()} == {torch.bfloat16}

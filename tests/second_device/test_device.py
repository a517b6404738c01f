"""The device itself: what it computes, and what it refuses."""

import pytest
import torch

from tests.second_device import far

pytestmark = pytest.mark.device


def test_it_computes_and_its_values_come_back():
    x = torch.arange(6, dtype=torch.float32, device=far.NAME).view(2, 3)
    y = torch.ones(3, 4).to(far.NAME)
    assert x.device.type == far.NAME and isinstance(x @ y, far.Far)
    assert (x @ y).tolist() == (x.cpu() @ y.cpu()).tolist() and int(x.argmax()) == 5
    x[0] += 1
    assert x.cpu().tolist() == [[1, 2, 3], [3, 4, 5]]
    torch.mul(x, 2, out=(out := torch.empty_like(x)))
    assert out.tolist() == [[2, 4, 6], [6, 8, 10]] and x.new_zeros(2).device == x.device
    assert torch.accelerator.current_accelerator().type == far.NAME


def test_it_refuses_tensors_of_the_cpu():
    x, here = torch.zeros(2, 3, device=far.NAME), torch.zeros(2, 3)
    for mixed in (lambda: x + here, lambda: x @ here.T, lambda: x[torch.tensor([0])], lambda: torch.cat([x, here])):
        with pytest.raises(far.ElsewhereError):
            mixed()
    assert (x + torch.tensor(1.0)).sum().item() == 6  # a number is no tensor of the CPU
    x.copy_(torch.ones(2, 3))
    assert x.sum().item() == 6

"""Quantization kinds that this CPU supports: some CPUs have no exact products of bytes."""

import pytest
import torch

from evoprune.backend import Quantization
from evoprune.backend.cpu.quantize import Int8Linear, int8_weights

KINDS = Quantization.kinds(torch.device("cpu"))
SOME = KINDS[0] if KINDS else "none"  # a kind that works here


def parameters(*names: str) -> list:
    """Return `names` as test parameters; kinds that do not work here are skipped."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(name not in ("none", *KINDS), reason=f"no {name} on this CPU"))
        for name in names
    ]


def int8(layer, large=None, to_bytes=None) -> Int8Linear:
    return Int8Linear(int8_weights(layer.weight, large), layer.weight.shape, layer.bias, to_bytes)

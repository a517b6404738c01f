"""A transformers model computing in a wider dtype than its weights have: what rounding does to it is its own noise.

No second copy of the weights is made: each module widens its own while it computes, large ones a piece at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

PIECE = 2**24  # weights that are widened at a time
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


def wider(dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype that shows the rounding of another; None where the device has none."""
    found = WIDER.get(dtype)
    return None if found == torch.float64 and device.type == "mps" else found


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Until the context ends, the modules of `model` that hold weights compute in `dtype`."""
    held = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    for module in held:
        module.forward = partial(_forward_of(module), module, type(module).forward, dtype)
    try:
        yield
    finally:
        for module in held:
            del module.forward


def _forward_of(module: nn.Module) -> Callable:
    if isinstance(module, nn.Linear):
        return _linear
    return _embedding if isinstance(module, nn.Embedding) else _others


def _linear(layer: nn.Linear, _forward: Callable, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    rows = layer.weight.split(max(1, PIECE // layer.in_features))
    made = torch.cat([F.linear(x.to(dtype), piece.to(dtype)) for piece in rows], -1)
    return made if layer.bias is None else made + layer.bias.to(dtype)


def _embedding(layer: nn.Embedding, forward: Callable, dtype: torch.dtype, ids: torch.Tensor) -> torch.Tensor:
    return forward(layer, ids).to(dtype)


def _others(module: nn.Module, forward: Callable, dtype: torch.dtype, *given: torch.Tensor, **named) -> torch.Tensor:
    """Norms and the convolution of patches, whose weights are small."""
    plain = dict(module.named_parameters(recurse=False))
    for name, weight in plain.items():
        module._parameters[name] = nn.Parameter(weight.to(dtype), requires_grad=False)
    try:
        return forward(module, *(x.to(dtype) for x in given), **named)
    finally:
        module._parameters |= plain

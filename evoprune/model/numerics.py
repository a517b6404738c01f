"""Disable autocast and check tensors for NaN and infinity.

torch.autocast computes float32 matrix products in 16 bits. When users prune their own transformers model, its layers follow
autocast, just like without pruning. Pruning methods and scores ignore autocast, because they compare values in float32. Models
loaded by evoprune also ignore it, because users can already choose their dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import Device


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Check that a tensor contains no NaN or infinity. Returns a 0-dimensional bool tensor on the same device.

    The check reads the tensor once, without copying it or synchronizing the device. The tensor must not be empty.
    """
    low, high = x.aminmax()  # both are NaN if `x` contains NaN
    return low * 0 == high * 0


@contextmanager
def without_autocast() -> Iterator[None]:
    """Context manager and decorator that disables autocast, so that products are computed in the dtype of their factors."""
    with ExitStack() as stack:
        for kind in Device.kinds():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

"""Disable autocast and check tensors for NaN and infinity.

torch.autocast computes float32 matrix products in 16 bits. If users prune their own transformers model, its layers follow autocast,
just as they do without pruning. Pruning methods and scores ignore autocast, because they need to compare values in float32. Models
that evoprune loads ignore it, because their dtype is already an option.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import Device


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Check that a tensor contains neither NaN nor infinity. Returns a 0-dimensional bool tensor on the same device.

    The check reads the tensor once, without copying it or synchronizing the device. The tensor must not be empty.
    """
    low, high = x.aminmax()  # both are NaN if `x` contains NaN
    return low * 0 == high * 0


@contextmanager
def without_autocast() -> Iterator[None]:
    """Disable autocast, so that products are computed in the dtype of their factors. Use it as a context manager or a decorator."""
    with ExitStack() as stack:
        for kind in Device.kinds():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

"""Turn autocast off, and check tensors for NaN and infinity.

torch.autocast computes float32 matrix products in 16 bits. If users prune their own transformers model, its layers follow autocast,
just as they do without pruning. Pruning methods and scores ignore autocast because they compare values in float32. Models that
evoprune loads ignore it because users choose their dtype with an option.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import Device


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Return whether a tensor contains neither NaN nor infinity, as a 0-dimensional bool tensor on the same device.

    The check reads the tensor once, and needs neither a copy nor a synchronization. The tensor must not be empty.
    """
    low, high = x.aminmax()  # both are NaN if `x` contains NaN
    return low * 0 == high * 0


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast, so that products are computed in their factors' dtype. Works as a context manager and a decorator."""
    with ExitStack() as stack:
        for kind in Device.kinds():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

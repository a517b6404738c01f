"""The dtype of matrix products, and a check for NaN and infinity.

torch.autocast computes float32 products in 16 bits. The layers of a user's own transformers model follow it, as they do without
pruning. Pruning methods, scores and evoprune's own models ignore it, because methods compare in float32 and users choose the dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import Device


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Check that `x`, which must not be empty, contains neither NaN nor infinity.

    Returns a 0-dimensional bool tensor on the device of `x`. The check takes one pass over `x`, without a copy or synchronization.
    """
    low, high = x.aminmax()  # both are NaN if `x` contains NaN
    return low * 0 == high * 0


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast, so that products are computed in the dtype of their factors (context manager and decorator)."""
    with ExitStack() as stack:
        for kind in Device.kinds():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

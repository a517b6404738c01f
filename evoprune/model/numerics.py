"""The dtype of matrix products, and a check for NaN and infinity.

torch.autocast would compute float32 products in 16 bits. The layers of a user's own transformers model obey it, as they do without
pruning. Methods, scores and evoprune's own models ignore it: methods compare in float32, and users choose the dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import Device


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Return whether `x`, which must not be empty, has neither NaN nor infinity, as a 0-dimensional bool tensor on its device.

    It takes one pass over `x`, without a copy or synchronization.
    """
    low, high = x.aminmax()  # both NaN if any number is
    return low * 0 == high * 0


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn off autocast, so that products are computed in the dtype of their factors. A context manager and a decorator."""
    with ExitStack() as stack:
        for kind in Device.kinds():
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

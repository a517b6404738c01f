"""Torch's autocast: inside it, products of a host program's float32 tensors are computed in 16 bits.

The layers of a transformers model that a user holds obey it, as they do without pruning. Methods, scores and this package's own
models do not: methods compare in float32, and a model that this package loads has the dtype that its user chose.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def without_autocast() -> Iterator[None]:
    """A context, and a decorator, in which products are computed in the dtype of their factors."""
    accelerator = torch.accelerator.current_accelerator()
    with ExitStack() as stack:
        for kind in {"cpu"} if accelerator is None else {"cpu", accelerator.type}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

"""In which dtype products are computed; and checks for NaN and infinity: a stage that finds one raises an error.

Torch's autocast would compute float32 products in 16 bits. The layers of a transformers model that a user holds obey it, as
without pruning. Methods, scores and this package's own models do not: methods compare in float32, and users choose the dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from evoprune.backend import accelerator
from evoprune.errors import ModelError


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """Return bool without dimension, on the device of `x`: whether that, which is not empty, holds neither NaN nor infinity.

    One pass over `x`, no copy, no synchronisation.
    """
    low, high = x.aminmax()  # both NaN if any number is
    return low * 0 == high * 0


def not_a_number_error(stage: str) -> ModelError:
    """Return the error to raise where the output of `stage` holds NaN or infinity."""
    return ModelError(
        f"NaN or infinity among the numbers of {stage}",
        "fp16 can overflow: take dtype bf16 or fp32; if it stays, the weights are damaged: get them again",
        stage=stage,
    )


@contextmanager
def without_autocast() -> Iterator[None]:
    """Provide a context, and a decorator, in which products are computed in the dtype of their factors."""
    with ExitStack() as stack:
        for kind in {"cpu", accelerator() or "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield

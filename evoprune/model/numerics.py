"""Checks for NaN and infinity. A stage that finds one raises an error instead of answering with it."""

import torch

from evoprune.errors import ModelError

HINT = "fp16 can overflow: take dtype bf16 or fp32; if it stays, the weights are damaged: get them again"


def all_numbers(x: torch.Tensor) -> torch.Tensor:
    """Whether `x`, which is not empty, holds neither NaN nor infinity.

    Returns:
        bool, no dimension, on the device of `x`. One pass over `x`, no copy, no synchronisation.
    """
    low, high = x.aminmax()
    return low.isfinite() & high.isfinite()


def not_a_number_error(stage: str) -> ModelError:
    """The error to raise where the output of `stage` holds NaN or infinity."""
    return ModelError(f"NaN or infinity among the numbers of {stage}", HINT, stage=stage)

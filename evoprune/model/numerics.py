"""NaN and infinity: they are said to be there, not answered over."""

import torch

from evoprune.errors import ModelError

HINT = "fp16 can overflow: take dtype bf16 or fp32; if it stays, the weights are damaged: get them again"


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """Whether no number in `x`, which has some, is NaN or infinite: bool, no dimension, where `x` is. One pass, no copy."""
    low, high = x.aminmax()
    return low.isfinite() & high.isfinite()


def not_finite(stage: str) -> ModelError:
    """The error of a stage that made such numbers."""
    return ModelError(f"NaN or infinity among the numbers of {stage}", HINT, stage=stage)

"""Input-independent components of a model: its configuration, weights, layer helpers, and cost estimates.

The `vision` and `language` packages implement the computation with these weights.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.model.config import (
        ANSWER_COLUMNS,
        FAMILIES,
        PATCHES,
        Config,
        GenerationSettings,
        Unsupported,
        VisionConfig,
        head_size,
    )
    from evoprune.model.cost import Clock, Cost, matmul_rate
    from evoprune.model.heads import heads_of, norm, rotate
    from evoprune.model.numerics import all_finite, without_autocast
    from evoprune.model.weights import HostedVL, Model, QwenVL, Tower

__all__ = [
    "ANSWER_COLUMNS",
    "FAMILIES",
    "PATCHES",
    "Clock",
    "Config",
    "Cost",
    "GenerationSettings",
    "HostedVL",
    "Model",
    "QwenVL",
    "Tower",
    "Unsupported",
    "VisionConfig",
    "all_finite",
    "head_size",
    "heads_of",
    "matmul_rate",
    "norm",
    "rotate",
    "without_autocast",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "config": [
            "ANSWER_COLUMNS",
            "FAMILIES",
            "PATCHES",
            "Config",
            "GenerationSettings",
            "Unsupported",
            "VisionConfig",
            "head_size",
        ],
        "cost": ["Clock", "Cost", "matmul_rate"],
        "heads": ["heads_of", "norm", "rotate"],
        "numerics": ["all_finite", "without_autocast"],
        "weights": ["HostedVL", "Model", "QwenVL", "Tower"],
    },
)

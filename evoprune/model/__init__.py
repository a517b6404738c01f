"""The static side of a model: its configuration, its weights, helpers for its layers, and its costs.

`vision` and `language` compute with these weights.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.model import cost
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
    from evoprune.model.cost import (
        Clock,
        carried_bytes,
        kv_bytes,
        language_bytes,
        matmul_rate,
        parameter_count,
        prefill_flop,
        shortage,
        stretched,
        tower_flop,
        working_memory,
    )
    from evoprune.model.heads import heads_of, norm, rotate
    from evoprune.model.numerics import all_finite, not_a_number_error, without_autocast
    from evoprune.model.weights import HostedVL, Model, QwenVL, Tower, Tree, empty, fill_random, name_in_memory, shared

__all__ = [
    "ANSWER_COLUMNS",
    "FAMILIES",
    "PATCHES",
    "Clock",
    "Config",
    "GenerationSettings",
    "HostedVL",
    "Model",
    "QwenVL",
    "Tower",
    "Tree",
    "Unsupported",
    "VisionConfig",
    "all_finite",
    "carried_bytes",
    "cost",
    "empty",
    "fill_random",
    "head_size",
    "heads_of",
    "kv_bytes",
    "language_bytes",
    "matmul_rate",
    "name_in_memory",
    "norm",
    "not_a_number_error",
    "parameter_count",
    "prefill_flop",
    "rotate",
    "shared",
    "shortage",
    "stretched",
    "tower_flop",
    "without_autocast",
    "working_memory",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "config": [
            "ANSWER_COLUMNS",
            "Config",
            "FAMILIES",
            "GenerationSettings",
            "FAMILIES",
            "PATCHES",
            "Unsupported",
            "VisionConfig",
            "head_size",
        ],
        "cost": [
            "Clock",
            "carried_bytes",
            "kv_bytes",
            "language_bytes",
            "matmul_rate",
            "parameter_count",
            "prefill_flop",
            "shortage",
            "stretched",
            "tower_flop",
            "working_memory",
        ],
        "heads": ["heads_of", "norm", "rotate"],
        "numerics": ["all_finite", "not_a_number_error", "without_autocast"],
        "weights": ["HostedVL", "Model", "QwenVL", "Tower", "Tree", "empty", "fill_random", "name_in_memory", "shared"],
    },
)

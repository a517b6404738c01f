"""Pruning inside a user's Hugging Face model: `evoprune.EvoPrune`, `evoprune.apply` and `evoprune.encode`.

The model's `generate` and `forward` take the usual inputs from its processor, and run on fewer video tokens.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.hf import interface
    from evoprune.hf.columns import Columns
    from evoprune.hf.context import EvoPrune, PrunedModel, apply, remove
    from evoprune.hf.encoding import PackedTower, encode, encode_each, patch_config
    from evoprune.hf.inputs import NAMES, TYPES, arguments, processor_inputs, read_patches
    from evoprune.hf.interface import MODELS

__all__ = [
    "MODELS",
    "NAMES",
    "TYPES",
    "Columns",
    "EvoPrune",
    "PackedTower",
    "PrunedModel",
    "apply",
    "arguments",
    "encode",
    "encode_each",
    "interface",
    "patch_config",
    "processor_inputs",
    "read_patches",
    "remove",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "columns": ["Columns"],
        "context": ["EvoPrune", "PrunedModel", "apply", "remove"],
        "encoding": ["PackedTower", "encode", "encode_each", "patch_config"],
        "inputs": ["NAMES", "TYPES", "arguments", "processor_inputs", "read_patches"],
        "interface": ["MODELS"],
    },
)

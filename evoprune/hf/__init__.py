"""Prune videos inside a user's own Hugging Face model using `evoprune.EvoPrune`, `evoprune.apply`, or `evoprune.encode`.

The model's `generate` and `forward` methods accept the usual inputs from the processor, but run on fewer video tokens.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.hf.columns import Columns
    from evoprune.hf.context import EvoPrune, PrunedModel, apply, remove
    from evoprune.hf.encoding import PackedTower, encode, encode_each
    from evoprune.hf.inputs import arguments, processor_inputs, read_patches
    from evoprune.hf.interface import model_positions, takes_encoded

__all__ = [
    "Columns",
    "EvoPrune",
    "PackedTower",
    "PrunedModel",
    "apply",
    "arguments",
    "encode",
    "encode_each",
    "model_positions",
    "processor_inputs",
    "read_patches",
    "remove",
    "takes_encoded",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "columns": ["Columns"],
        "context": ["EvoPrune", "PrunedModel", "apply", "remove"],
        "encoding": ["PackedTower", "encode", "encode_each"],
        "inputs": ["arguments", "processor_inputs", "read_patches"],
        "interface": ["model_positions", "takes_encoded"],
    },
)

"""Prune videos inside a user's own Hugging Face model using `evoprune.EvoPrune`, `evoprune.apply`, or `evoprune.encode`.

The model's `generate` and `forward` methods accept the usual inputs from the processor, but run on fewer video tokens.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

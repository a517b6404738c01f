"""Prune videos inside a user's own Hugging Face model using `evoprune.EvoPrune`, `evoprune.apply`, or `evoprune.encode`.

The model's `generate` and `forward` methods accept the usual inputs from the processor, but run on fewer video tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

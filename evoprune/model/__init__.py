"""Input-independent components of a model: its configuration, weights, layer helpers, and cost estimates.

The `vision` and `language` packages implement the computation with these weights.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

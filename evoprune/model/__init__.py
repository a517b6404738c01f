"""Input-independent components of a model: its configuration, weights, layer helpers, and cost estimates.

The `vision` and `language` packages implement the computation with these weights.
"""

from evoprune.doors import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

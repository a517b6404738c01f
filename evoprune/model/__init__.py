"""Input-independent components of a model: its configuration, weights, layer helpers, and cost estimates.

The `vision` and `language` packages implement the computation with these weights.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

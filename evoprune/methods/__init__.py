"""The registry of pruning methods, and the building blocks for writing new ones.

Importing this package loads neither torch nor the methods. Names that require torch are imported lazily, on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

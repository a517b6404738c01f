"""The registry of pruning methods, and the building blocks for writing new ones.

Importing this package loads neither torch nor the methods. Names that require torch are imported lazily, on first use.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__, call="evoprune.methods.available()")

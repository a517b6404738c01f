"""Measurements for the `profile`, `eval`, `tune`, and `verify` commands, and images that show which units pruning keeps.

Public names are imported lazily, on first use, because most of them require torch.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

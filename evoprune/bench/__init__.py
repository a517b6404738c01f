"""Measurements for the `profile`, `eval`, `tune`, and `verify` commands, and images that show which units pruning keeps.

Public names are imported lazily, on first use, because most of them require torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Pruning methods from the literature, included for comparison, and their helpers. Like plug-ins, they load via entry points."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Pruning methods from the literature, included for comparison, and their helpers. Like plug-ins, they load via entry points."""

from evoprune.doors import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

"""Pruning methods from the literature, included for comparison, and their helpers. Like plug-ins, they load via entry points."""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

"""Answers questions about live video, which is encoded in time windows and stored in a memory of limited size."""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

"""Finds the moments in a long video that match a query by scoring every segment and then locating the start and end times."""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)

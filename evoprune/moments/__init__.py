"""Finds the moments in a long video that match a query by scoring every segment and then locating the start and end times."""

from evoprune.doors import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

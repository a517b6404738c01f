"""Answers questions about live video, which is encoded in time windows and stored in a memory of limited size."""

from evoprune.doors import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

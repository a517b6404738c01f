"""Answers questions about live video, which is encoded in time windows and stored in a memory of limited size."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

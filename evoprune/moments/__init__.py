"""Finds the moments in a long video that match a query by scoring every segment and then locating the start and end times."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

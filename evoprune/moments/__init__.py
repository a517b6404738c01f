"""Finds the moments in a long video that match a query by scoring every segment and then locating the start and end times."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.moments.search import Moment, Search

__all__ = ["Moment", "Search"]

__getattr__, __dir__ = door(__name__, {"search": ["Moment", "Search"]})

"""Finds the moments of a long video that match a query: asks about every segment, then locates the borders of the moments."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.moments.search import Moment, Search

__all__ = ["Moment", "Search"]

__getattr__, __dir__ = door(__name__, {"search": ["Moment", "Search"]})

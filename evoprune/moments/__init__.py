"""Find the moments of a long video that match a query: ask about every segment, then locate the moments' borders."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.moments.search import Moment, Search
    from evoprune.moments.subtitles import chapters, srt

__all__ = [
    "Moment",
    "Search",
    "chapters",
    "srt",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "search": ["Moment", "Search"],
        "subtitles": ["chapters", "srt"],
    },
)

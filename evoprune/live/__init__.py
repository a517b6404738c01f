"""Answers questions about live video, which is encoded in time windows and kept in a memory of bounded size."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.live.feed import LiveFeed
    from evoprune.live.stream import VideoStream

__all__ = ["LiveFeed", "VideoStream"]

__getattr__, __dir__ = door(
    __name__,
    {
        "feed": ["LiveFeed"],
        "stream": ["VideoStream"],
    },
)

"""Answers questions about live video, which is encoded in time windows and stored in a memory of limited size."""

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

"""Answers questions about live video: encodes it in time windows, keeps a stream's memory, and runs the threads that feed it."""

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

"""Live video: sources without a known end, time windows, and the memory of a stream."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.live.feed import LiveFeed
    from evoprune.live.source import FROM_SOURCE, PACES, STDIN, LiveSource
    from evoprune.live.stream import VideoStream

__all__ = ["FROM_SOURCE", "PACES", "STDIN", "LiveFeed", "LiveSource", "VideoStream"]

__getattr__, __dir__ = door(
    __name__,
    {
        "feed": ["LiveFeed"],
        "source": ["FROM_SOURCE", "LiveSource", "PACES", "STDIN"],
        "stream": ["VideoStream"],
    },
)

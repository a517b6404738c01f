from .feed import LiveFeed as LiveFeed
from .stream import VideoStream as VideoStream

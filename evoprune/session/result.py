"""What encoding a video or image produced."""

import threading
from dataclasses import dataclass, field

from evoprune.report import EncodingTimes
from evoprune.video import Plan
from evoprune.vision import Encoded


@dataclass(frozen=True)
class Entry:
    """A cache entry containing an encoded video and the timestamps of its frames."""

    encoded: Encoded
    read_s: tuple[float, ...]  # timestamps of the decoded frames, in seconds
    moved: bool  # whether any frames were replaced with nearby keyframes; see `FrameChunk`


@dataclass(frozen=True)
class InputResult:
    """The visual tokens of one video or image, together with its final plan, stage times, and warnings."""

    plan: Plan
    encoded: Encoded
    seconds: dict[str, float]  # time spent in each stage in `report.INPUT_STAGES`
    wall_seconds: float  # wall-clock time from the start of planning to the end of encoding
    waited_seconds: float  # time the encoding thread spent waiting for patches and transcripts
    cache: str  # "hit" (loaded from disk), "miss" (encoded and then stored), or "off"
    warnings: tuple[str, ...]  # warning names, as they appear in reports
    damaged: int  # number of packets that could not be decoded
    # Held by the first answer whose report includes these times. Copies share it, so no two answers report the same times.
    reported: threading.Lock = field(default_factory=threading.Lock)

    @property
    def times(self) -> EncodingTimes:
        return EncodingTimes(self.seconds, self.wall_seconds, self.encoded.prune_seconds)

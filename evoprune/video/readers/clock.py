"""Finds the jumps in a stream's timestamps, and corrects the timestamps so that they continue after a jump.

FFmpeg's command line places every packet whose timestamp jumps right after the packet before it. `Clock` also looks at the packets
that follow. If they continue as if nothing had happened, only the packets with wrong timestamps are moved. Otherwise, the clock has
restarted.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from av.packet import Packet
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video.readers import ffmpeg

Item = TypeVar("Item")

# A backward jump in the timestamps by more than this means that the clock has restarted, if it is not a wrong timestamp.
BACK_S = 0.1
# The same for forward jumps, in formats whose clock may restart. This is FFmpeg's limit.
FORWARD_S = 10.0
# The limit in files. If it is possible that only the first or last few timestamps are wrong, `FORWARD_S` applies.
LONGEST_GAP_S = 60.0
# Containers that store each packet's decoding time. FFmpeg guesses it in others.
WITH_DECODING_TIMES = (*ffmpeg.JOINED, "flv")
LOOK_AHEAD = 8  # maximum number of consecutive wrong timestamps


def longest_gap_s(container: str) -> float:
    """Return the limit in seconds above which a forward jump in a file is interpreted as a restart of its clock."""
    return LONGEST_GAP_S if container in ffmpeg.JOINED else math.inf


class Clock:
    """The clock of one pass over a stream's packets or frames.

    Attributes:
        restarts: Number of clock restarts so far.
        gap_s: Largest forward jump interpreted as a restart, in seconds.

    Args:
        longest_gap_s: Limit in seconds above which a forward jump is interpreted as a restart.
        live: Whether items arrive while they are recorded. A small jump is then judged by only one more item, and jumps ahead that
            are not much larger than recent ones are accepted immediately.
    """

    def __init__(self, longest_gap_s: float = math.inf, live: bool = False):
        self.restarts = 0
        self.gap_s = 0.0
        self._longest_gap_s = longest_gap_s
        self._live = live

    def corrections(
        self, items: Iterable[Item], stamp_of: Callable[[Item], float | None], step_of: Callable[[Item], float]
    ) -> Iterator[tuple[Item, float]]:
        """Yield each item with the number of seconds to add to its timestamp. After a restart, times continue without a gap.

        Items are yielded immediately, except that an item whose timestamp jumps is held back until a few more have been read.

        Args:
            stamp_of: Returns an item's timestamp in seconds, or None if it has no timestamp. Without errors, timestamps ascend.
            step_of: Returns an item's duration in seconds.
        """
        source = iter(items)
        ahead: deque[Item | VideoError] = deque()  # items that have been read ahead, and the error that followed them
        moved: deque[float] = deque()  # corrected times of the next items, if their timestamps are wrong
        last = last_s = None  # previous item, and its corrected time
        interval_s = shift_s = 0.0
        recent_s = 0.0  # longest recent interval between two items
        count = 0  # number of items with timestamps so far

        def following() -> Iterator[float]:
            for place in range(4 * LOOK_AHEAD):  # a few items may have no timestamp
                if place == len(ahead):
                    try:
                        ahead.append(next(source))
                    except StopIteration:
                        return
                    except VideoError as problem:
                        ahead.append(problem)
                if isinstance(item := ahead[place], VideoError):
                    return
                if (stamp := stamp_of(item)) is not None:
                    yield stamp + shift_s

        while True:
            if not ahead:
                item = next(source, ahead)
                if item is ahead:
                    return
            elif isinstance(item := ahead.popleft(), VideoError):
                raise item
            stamp = stamp_of(item)
            if stamp is None:
                yield item, shift_s
                continue
            time_s = stamp + shift_s
            if moved:
                time_s = moved.popleft()
            elif last_s is not None and not -BACK_S <= time_s - last_s <= 2 * recent_s + BACK_S / 2:
                passed_s = time_s - last_s
                step_s = step_of(last)
                usual_s = max(step_s, interval_s)
                if passed_s < -BACK_S or passed_s > 2 * max(usual_s, recent_s) + BACK_S / 2:
                    looks = 1 if self._live and abs(passed_s) <= FORWARD_S else LOOK_AHEAD
                    later_s = list(islice(following(), looks))
                    moved = deque(_corrected_times(time_s, last_s, step_s, usual_s, later_s))
                    longest_s = self._longest_gap_s
                    if longest_s < math.inf and min(count, len(later_s)) < LOOK_AHEAD:
                        longest_s = FORWARD_S
                    if moved:
                        time_s = moved.popleft()
                    elif passed_s < -BACK_S or passed_s - usual_s > longest_s:
                        self.restarts += 1
                        self.gap_s = max(self.gap_s, passed_s)
                        time_s = last_s + step_s
                        shift_s = time_s - stamp
            if last_s is not None:
                interval_s = time_s - last_s
                recent_s = max(interval_s, 0.9 * recent_s) if self._live else interval_s
            count += 1
            last = item
            last_s = time_s
            yield item, time_s - stamp

    def steady(self, packets: Iterator[Packet | None], stream: VideoStream) -> Iterator[Packet | None]:
        """Yield a file's packets with corrected timestamps. They are not changed if FFmpeg guesses the decoding times."""
        if stream.container.format.name not in WITH_DECODING_TIMES:
            yield from packets
            return
        tick = float(stream.time_base)  # Fraction would be several times slower

        def stamp_of(packet: Packet | None) -> float | None:
            return None if packet is None or (dts := packet.dts) is None else dts * tick

        def step_of(packet: Packet) -> float:
            return (packet.duration or 0) * tick or 1 / ffmpeg.FALLBACK_FPS

        for packet, shift_s in self.corrections(packets, stamp_of, step_of):
            if shift_s and packet is not None:
                shift = round(shift_s / tick)
                if packet.dts is not None:
                    packet.dts += shift
                if packet.pts is not None:
                    packet.pts += shift
            yield packet


def _corrected_times(
    time_s: float, last_s: float, step_s: float, usual_s: float, later_s: Sequence[float]
) -> list[float]:
    """Return the corrected times of a few items with wrong timestamps, or an empty list if the timestamps are not wrong.

    Timestamps are wrong if, at most `LOOK_AHEAD` items later, they are closer to the times expected from the items before the jump
    than to the times expected from the items after the jump.

    Args:
        time_s: Time of the item whose timestamp jumps.
        last_s, step_s: Time and duration of the item before.
        usual_s: Interval between two items before the jump.
        later_s: Times of the next items.
    """
    for count, next_s in enumerate(later_s, 1):
        if abs(next_s - last_s - (count + 1) * usual_s) < abs(next_s - time_s - usual_s):
            if next_s > last_s:
                return [last_s + (next_s - last_s) * number / (count + 1) for number in range(1, count + 1)]
            return [last_s + step_s * number for number in range(1, count + 1)]
        time_s = next_s
    return []

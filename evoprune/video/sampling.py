"""Which frames of a video are sampled: pure functions on numbers, no files.

All times are seconds from the video's first frame.
"""

import math
import re
import sys
from dataclasses import dataclass, replace

from evoprune.errors import UsageError, VideoError

# How times are written: hours, minutes and seconds, each with all that follow it, or with their letters.
CLOCK = re.compile(r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]+)?)")
UNITS = re.compile(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?")


@dataclass(frozen=True)
class SamplingPlan:
    """The times at which frames are taken: `times_s`, ascending, the middles of equal shares of the span that they cover.

    `wanted` is the number of frames before `max_frames` limited it.
    """

    start_s: float
    end_s: float
    times_s: tuple[float, ...]
    wanted: int

    @property
    def frames(self) -> int:
        """Number of frames: of a video even, of a picture one."""
        return len(self.times_s)

    @property
    def seconds_per_frame(self) -> float:
        return (self.end_s - self.start_s) / self.frames

    def seconds_per_pair(self, temporal_patch: int = 2) -> float:
        """Time from one frame pair (`temporal_patch` frames) to the next."""
        return temporal_patch * self.seconds_per_frame

    def thinned(self, frames: int) -> "SamplingPlan":
        """The same span of the video with this number of frames."""
        return replace(self, times_s=even_times(self.start_s, self.end_s, frames))


def even_times(start_s: float, end_s: float, count: int) -> tuple[float, ...]:
    """The middles of `count` equal shares of the span from `start_s` to `end_s`, in seconds."""
    return tuple(start_s + (i + 0.5) * (end_s - start_s) / count for i in range(count))


def plan_sampling(
    duration_s: float,
    *,
    fps: float | None = 2.0,
    frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    min_frames: int = 4,
    max_frames: int = 768,
) -> SamplingPlan:
    """Spread an even number of frames over a video, or over a span of it: t_i = start + (i + 0.5) * span / n.

    Args, otherwise as of `plan.make_plan`:
        fps: the count is rounded to the nearest even number, at least 2, within the limits. Ignored when `frames` is given.
        frames: an odd number is rounded up, and only `max_frames` limits it.
        min_frames, max_frames: an odd `min_frames` is rounded up, an odd `max_frames` down; of two that contradict each other
            `max_frames` wins.

    Raises UsageError: a number out of range. VideoError: the span is empty.
    """
    if frames is None and fps is None:
        raise UsageError("neither fps nor frames is given", "give one of the two")
    rate = fps if frames is None else None
    check_sampling(fps=rate, frames=frames, start_s=start_s, end_s=end_s, max_frames=max_frames)
    _check("min_frames", min_frames, least=0)
    start, end = _span(duration_s, start_s, end_s)
    if rate is None:
        wanted = frames + frames % 2
    else:
        nearest = 2 * math.floor(min((end - start) * rate, sys.maxsize) / 2 + 0.5)
        wanted = max(nearest, 2, min_frames + min_frames % 2)
    count = min(wanted, max_frames - max_frames % 2)
    return SamplingPlan(start, end, even_times(start, end, count), wanted)


def _span(duration_s: float, start_s: float, end_s: float | None) -> tuple[float, float]:
    if not 0 < duration_s < math.inf:
        raise VideoError(f"the video has no length that frames could be spread over ({duration_s} s)")
    start = start_s if start_s >= 0 else max(0.0, duration_s + start_s)
    end = duration_s if end_s is None else min(end_s if end_s >= 0 else duration_s + end_s, duration_s)
    video = f"the video, which is {duration_s:g} s long"
    if start >= duration_s:
        raise VideoError(f"start {start_s:g} s lies beyond {video}", "choose an earlier start")
    if end <= start:
        hint = "choose an end after the start; below 0 both count back from the video's end"
        raise VideoError(f"nothing between start {start_s:g} s and end {end_s:g} s of {video}", hint)
    return start, end


def check_sampling(
    *,
    fps: float | None = None,
    frames: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    max_frames: int | None = None,
    max_visual_tokens: int | None = None,
) -> None:
    """Checks what can be checked without a video; arguments as of `plan.make_plan`, None for the default.

    Raises UsageError: a number that makes no sense, or fps and frames together.
    """
    if max_visual_tokens is not None and max_visual_tokens < 1:
        raise UsageError(f"at most {max_visual_tokens} visual tokens", "allow at least one")
    if fps is not None and frames is not None:
        raise UsageError("fps and frames exclude each other", "give one of the two")
    for name, time_s in (("start", start_s), ("end", end_s)):
        if time_s is not None and not math.isfinite(time_s):
            raise UsageError(f"{name} is {time_s}", "give seconds from the beginning, or below 0 from the end")
    _check("max_frames", max_frames, least=2)
    _check("frames", frames, least=1)
    if fps is not None and not 0 < fps < math.inf:
        raise UsageError(f"fps is {fps:g}", "give a number above 0")


def parse_time(text: str) -> float:
    """Seconds from `90`, `90.5`, `1:30`, `01:30:00`, `1:02:03.5`, `90s`, `1m30s` or `2h`; below 0 with a minus sign in front.

    Raises UsageError: the text is none of these.
    """
    sign, digits = (-1.0, text.strip()[1:]) if text.strip().startswith("-") else (1.0, text.strip())
    if digits and (match := CLOCK.fullmatch(digits) or UNITS.fullmatch(digits)):
        hours, minutes, seconds = (float(group or 0) for group in match.groups())
        total = hours * 3600 + minutes * 60 + seconds
        # The first field may be any number (90:00 is an hour and a half); those after it are below 60.
        proper = (minutes < 60 or not match[1]) and (seconds < 60 or not (match[1] or match[2]))
        if proper and math.isfinite(total):
            return sign * total if total else 0.0
    hint = (
        "write seconds (90.5 or 90.5s), minutes (1:30 or 1m30s) or hours (1:02:03 or 1h2m3s); from the end: -5 or -5s"
    )
    raise UsageError(f"{text!r} is not a time", hint)


def _check(name: str, value: float | None, *, least: float) -> None:
    if value is not None and not least <= value < math.inf:
        raise UsageError(f"{name} is {value}", f"give a number, {least} or more")

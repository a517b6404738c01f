"""Wraps an array of frames so that it can be used like a video file. NumPy is imported only when an array is passed."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.util import brief, check_type
from evoprune.video.info import Video

if TYPE_CHECKING:
    import numpy as np

TOLERANCE_S = 1e-4  # maximum tolerance, which is less than for files, because timestamps are not rounded
RATE_HINT = "give frame_rate=30 (frames per second) or times_s=[...] (seconds)"


@dataclass(frozen=True, eq=False)
class HeldVideo(Video):
    """A video whose frames are already in memory as an array. Instances are compared by identity."""

    held: "np.ndarray" = field(kw_only=True, repr=False)  # the frames: uint8 `[T, H, W, 3]`, RGB as displayed
    # Start times of the frames in seconds from the first frame, in ascending order.
    frames_s: tuple[float, ...] = field(kw_only=True, repr=False)

    @classmethod
    def of(
        cls, frames: Any, frame_rate: float | None, times_s: Sequence[float] | None, several: bool = False
    ) -> "HeldVideo":
        """Wrap an array of frames as a video.

        Args:
            frames: An RGB array of shape `[T, H, W, 3]` and dtype uint8, or anything that `numpy.asarray` converts to one.
            frame_rate: Frames per second, or None if `times_s` is given.
            times_s: Start times of the frames in seconds, in ascending order, or None if `frame_rate` is given. The video begins at
                the first of these times.
            several: True if the call has multiple inputs. This affects only the hints in error messages.

        Raises:
            UsageError: The shape, dtype, frame rate or times are invalid; or `frame_rate` and `times_s` are both given or both
                None.
        """
        import numpy as np

        try:
            array = np.asarray(frames)
        except Exception as problem:
            # Array classes from other packages may raise any exception, such as TypeError for a tensor on a GPU.
            hint = "give a NumPy array; for a tensor: tensor.cpu().numpy()"
            raise UsageError(
                f"frames of class {type(frames).__name__} cannot become an array: {problem}", hint
            ) from problem
        shape = list(array.shape)
        if array.ndim == 3 and shape[-1] == 3:
            hint = "for an image: PIL.Image.fromarray(array)"
            if several:
                hint = f"for frames of one video: numpy.stack(list); {hint}"
            raise UsageError(f"an array of shape {shape} is one frame", hint)
        if array.ndim != 4 or shape[-1] != 3:
            hint = "frames are [T, H, W, 3], RGB"
            if array.ndim == 4 and shape[1] == 3:
                hint += "; to move channels last: array.transpose(0, 2, 3, 1)"
            raise UsageError(f"an array of shape {shape} is not a video", hint)
        if array.dtype != np.uint8:
            hint = "frames are uint8, 0 to 255; for floats from 0 to 1: (array * 255).round().astype('uint8')"
            raise UsageError(f"an array of {array.dtype} is not a video", hint)
        if not array.size:
            raise UsageError(f"an array of shape {shape} contains no pixels", "give at least one frame")
        if (frame_rate is None) == (times_s is None):
            problem = "no frame rate" if frame_rate is None else "both a frame rate and times"
            raise UsageError(f"an array of {len(array)} frames has {problem}", RATE_HINT)
        if times_s is None:
            frame_rate = check_type("frame_rate", frame_rate, float)
            return _as_video(array, tuple(number / frame_rate for number in range(len(array))), frame_rate, 0.0)
        times = _checked_times(times_s, len(array))
        first = times[0]
        lasted = times[-1] - first
        rate = (len(times) - 1) / lasted if lasted else 1.0  # a single frame lasts one second
        return _as_video(array, tuple(time - first for time in times), rate, first)

    @property
    def is_file(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    @cached_property
    def tolerance_s(self) -> float:
        """See `Video.tolerance_s`. At most a tenth of the shortest frame."""
        gaps = (later - earlier for earlier, later in pairwise(self.frames_s))
        return min(TOLERANCE_S, min(gaps, default=math.inf) / 10)

    def on_screen(self, times_s: Sequence[float]) -> "tuple[np.ndarray, tuple[float, ...]]":
        """Return the frames on screen at n times as C-contiguous uint8 `[n, H, W, 3]`, along with their start times in seconds."""
        counts = [bisect_right(self.frames_s, time_s + self.tolerance_s) for time_s in times_s]
        numbers = [max(count - 1, 0) for count in counts]
        frames = self.held[numbers]
        if not frames.flags.c_contiguous:
            frames = frames.copy()
        return frames, tuple(self.frames_s[number] for number in numbers)


def _as_video(array: "np.ndarray", frames_s: tuple[float, ...], rate: float, start_s: float) -> HeldVideo:
    """Build a `HeldVideo` from an array of frames. Raises UsageError if the frame rate or duration is not finite and positive."""
    if not (0 < rate < math.inf and math.isfinite(frames_s[-1] + 1 / rate)):
        raise UsageError(f"{rate:g} frames per second is not a valid frame rate", RATE_HINT)
    gaps = [later - earlier for earlier, later in pairwise(frames_s)]
    return HeldVideo(
        path="<array>",
        duration_s=frames_s[-1] + 1 / rate,
        width=array.shape[2],
        height=array.shape[1],
        rotation_deg=0,
        codec="rawvideo",
        pix_fmt="rgb24",
        container="array",
        fps=rate,
        variable_rate=any(abs(gap - 1 / rate) > min(TOLERANCE_S, 0.1 / rate) for gap in gaps),
        frames_total=len(array),
        start_s=start_s,
        held=array,
        frames_s=frames_s,
    )


def _checked_times(times_s: Any, count: int) -> list[float]:
    """Return the times as Python floats. Raises UsageError unless they are `count` finite, strictly ascending numbers."""
    try:
        times = [float(time) for time in times_s]
    except (TypeError, ValueError, OverflowError):
        raise UsageError(f"times_s is {brief(times_s)}, not a list of numbers", RATE_HINT) from None
    if len(times) != count:
        raise UsageError(f"{len(times)} times for {count} frames", "give the time of each frame in seconds")
    if not all(map(math.isfinite, times)) or any(later <= earlier for earlier, later in pairwise(times)):
        raise UsageError(
            "times_s is not a list of ascending numbers", "give times in seconds, each later than the one before"
        )
    return times

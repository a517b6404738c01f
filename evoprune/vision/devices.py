"""What differs between a CPU and an accelerator: how much is computed at a time, and how time is taken."""

import time

import torch

from evoprune.model.machine import is_accelerator, reading_waits, to_device

__all__ = ["Timer", "largest_chunk", "reading_waits", "scores_at_a_time", "to_device"]

# Units encoded at a time, rounded up to whole frame pairs. 512 units (2,048 patches) keep matrix products at full speed and their
# results in a CPU's caches (`python -m experiments.kernels`). A GPU needs more to be busy.
CHUNK_UNITS = 512
GPU_CHUNK_UNITS = 8192
# A chunk may represent this many times more units than it has rows. Attention reads a key for each row that represents its units.
SPARSE = 8
# Entries of a score matrix held at a time, for the same reasons.
SCORES = 1 << 21
GPU_SCORES = 1 << 26


def largest_chunk(device: torch.device) -> int:
    """How many units are encoded at a time; the caller rounds up to whole frame pairs."""
    return GPU_CHUNK_UNITS if reading_waits(device) else CHUNK_UNITS


def scores_at_a_time(device: torch.device) -> int:
    """How many entries of a score matrix are held at a time."""
    return GPU_SCORES if reading_waits(device) else SCORES


class Timer:
    """A context that adds up the time of its blocks; on an accelerator it records events, which only `seconds` reads."""

    def __init__(self, device: torch.device):
        self._device = device if is_accelerator(device) else None
        self._marks = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_) -> None:
        self._marks.append(self._mark())

    def copy(self) -> "Timer":
        """A new timer that starts from the same sum."""
        made = Timer(self._device or torch.device("cpu"))
        made._marks = list(self._marks)
        return made

    def _mark(self):
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """The sum so far, in seconds. On an accelerator this synchronises with the last block."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device is None:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000

"""Measures the time of blocks of code without waiting for the device in between."""

import time

import torch


class Timer:
    """A context that adds up the time of its blocks; on CUDA it records events, which only `seconds` reads."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None
        self._marks = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_) -> None:
        self._marks.append(self._mark())

    def copy(self) -> "Timer":
        """A new timer that starts from the same sum."""
        made = Timer(self._cuda or torch.device("cpu"))
        made._marks = list(self._marks)
        return made

    def _mark(self):
        if self._cuda is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._cuda))
        return event

    def seconds(self) -> float:
        """The sum so far, in seconds. On CUDA this waits for the last block."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._cuda is None:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000

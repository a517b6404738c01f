"""How long each stage is busy, and which one ran out of memory."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from evoprune.errors import OutOfMemory

T = TypeVar("T")


def now(device: torch.device) -> float:
    """Seconds. On CUDA only once what was asked for is done: kernels run on after Python has gone ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Adds up the time each stage is busy, in seconds."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        return now(self._device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block; running out of memory in it becomes an error that names the stage."""
        start = self.now()
        try:
            with memory_guard(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Passes items on, timing only the making of them."""
        source = iter(items)
        while True:
            with self.stage(name):
                item = next(source, None)
            if item is None:
                return
            yield item


@contextmanager
def memory_guard(stage: str) -> Iterator[None]:
    """Turns running out of memory, on host or device, into an error that names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        hint = "take fewer frames (--frames) or a lower budget (-b)"
        raise OutOfMemory(f"out of memory in {stage}", hint, stage=stage) from problem


def is_out_of_memory(problem: BaseException) -> bool:
    """Whether a host or a device ran out of memory; on the CPU torch raises a plain RuntimeError."""
    return isinstance(problem, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(problem)

"""The time that each stage is busy."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from evoprune.model.memory import memory_guard

T = TypeVar("T")


def now(device: torch.device) -> float:
    """Seconds. On CUDA it waits until all kernels are done, which run on after Python has gone on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Clock:
    """Adds up the seconds that each stage is busy."""

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
        """Yields items, and times only how they are made."""
        source = iter(items)
        while True:
            with self.stage(name):
                item = next(source, None)
            if item is None:
                return
            yield item

"""Measure the times of multiple functions in turn. Imported by experiments that measure; not run by itself."""

import time
from collections.abc import Callable, Sequence
from statistics import median


def medians(runs: Sequence[Callable[[], object]], repeat: int) -> list[float]:
    """Return each function's median time in milliseconds.

    The functions take turns, so that noise affects all of them equally. The first round is a warm-up and is not counted.
    """
    spent = [[] for _ in runs]
    for _ in range(repeat + 1):
        for run, times in zip(runs, spent, strict=True):
            begin = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - begin))
    return [median(times[1:]) for times in spent]

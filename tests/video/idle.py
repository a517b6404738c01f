"""The number of idle worker processes, for tests in other folders."""

from evoprune.video.sandbox import isolation


def idle_processes() -> int:
    return len(isolation._idle)


def idle_limit() -> int:
    """Return how many idle processes may stay, which `keep_idle` blocks raise."""
    return isolation._max_idle()

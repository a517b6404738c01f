"""Test work that runs in a separate process with limits."""

import time

import pytest

from evoprune.language.isolation import run_isolated


def asleep(request: str) -> str:
    """Use up wall-clock time but no CPU time, like a process on a busy machine."""
    time.sleep(30)
    return request


def test_time_on_the_clock_is_limited_too():
    start = time.monotonic()
    with pytest.raises(ValueError, match="does not finish within 1 s"):
        run_isolated(asleep, "", 1, "time")
    assert time.monotonic() - start < 25

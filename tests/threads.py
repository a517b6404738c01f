"""Helpers for tests that count threads, and for tests whose tensors are small."""

import threading
import time
from collections.abc import Collection

import pytest
import torch

LONGEST_S = 30.0  # maximum time to wait for threads to end, in seconds


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Compute in one thread in the importing test module or folder. The tensors are too small for a second thread to pay off."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_ended(before: Collection[threading.Thread]) -> None:
    """Check that all threads have ended, except those in `before`, which may have ended or not.

    A thread that has done its work is still listed for a moment, so this waits up to `LONGEST_S`.
    """
    until = time.monotonic() + LONGEST_S
    while left := set(threading.enumerate()) - set(before):
        assert time.monotonic() < until, left
        time.sleep(0.005)

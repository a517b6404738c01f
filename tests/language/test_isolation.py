"""Test work that runs in a separate process with limits."""

import os
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


def environment(request: str) -> dict[str, str]:
    return dict(os.environ)


def test_there_are_no_secrets(monkeypatch):
    for name in ("EVOPRUNE_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "https_proxy", "UNKNOWN"):
        monkeypatch.setenv(name, "very-secret")
    monkeypatch.setenv("LC_TIME", "C")
    found = run_isolated(environment, "", 5, "os")
    assert "very-secret" not in found.values() and found["LC_TIME"] == "C"

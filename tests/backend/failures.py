"""Failed kernels, for tests in other folders."""

from evoprune.backend import devices


def forget_failures(monkeypatch) -> None:
    """Let a test begin without failed kernels. Those that fail in the test are forgotten afterwards."""
    monkeypatch.setattr(devices, "_failed", set())

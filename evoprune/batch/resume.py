"""Going on with output that an earlier run left: it must have been made with the same settings."""

from typing import Any


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The entries in which two dicts differ, in words; empty where they are equal."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)

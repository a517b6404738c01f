"""The state of a stream that its public interface doesn't show, for tests in other folders."""

from collections.abc import Sequence

from evoprune.vision import Encoded


def latest_encoding(stream) -> Encoded:
    """Return the latest window's encoding."""
    return stream._latest.encoded


def windows_in_memory(stream) -> Sequence:
    return stream._memory.windows


def cache_of(stream):
    return stream._memory.cache

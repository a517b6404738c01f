"""The recorded graphs of language models, for tests in other folders."""

from weakref import WeakKeyDictionary

from evoprune.language import static


def forget_graphs(monkeypatch) -> None:
    """Let a test begin without recorded graphs. Those that it records are forgotten afterwards."""
    monkeypatch.setattr(static, "_caches", WeakKeyDictionary())

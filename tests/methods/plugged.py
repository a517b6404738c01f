"""Methods of other packages, for tests in other folders."""

from importlib.metadata import EntryPoint

from evoprune.methods import registry


def plug(monkeypatch, name: str, target: str) -> None:
    """Make one method of another package the only one that is installed."""
    monkeypatch.setattr(registry, "_plugins", lambda: {name: EntryPoint(name, target, registry.GROUPS[0])})

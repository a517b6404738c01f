"""The pruning methods, their base classes and their registry. Importing this imports neither torch nor the methods."""

from evoprune.methods.registry import DEFAULT, available, built_in, check, get, parse, plugin_code, plugins

__all__ = ["DEFAULT", "available", "built_in", "check", "get", "parse", "plugin_code", "plugins"]

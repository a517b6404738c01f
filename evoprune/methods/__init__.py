"""The pruning methods: one file a method, their base classes, and the registry that finds them by name.

Importing this package imports neither torch nor the methods.
"""

from evoprune.methods.registry import DEFAULT, available, built_in, check, get, parse, plugin_code, plugins

__all__ = ["DEFAULT", "available", "built_in", "check", "get", "parse", "plugin_code", "plugins"]

"""The command line as the user typed it, for messages about it."""

from collections.abc import Sequence
from typing import Any


class Typed:
    """The words of the running command, and where the values of its options come from.

    Attributes:
        command: The name of the command, or None if it isn't known.
        words: The words after the name of the command. Without a command, all words.
    """

    def __init__(self, command: str | None = None, words: Sequence[str] = (), context: Any = None):
        """`context` is click's context of the command, whose parameters may not have been parsed yet."""
        self.command = command
        self.words = list(words)
        self._context = context

    def wants(self, flag: str) -> bool:
        """Return True if a flag such as "json" is on, even if the rest of the line can't be parsed."""
        known = self._context.params if self._context else {}
        return bool(known[flag]) if flag in known else f"--{flag}" in self.words

    def source(self, option: str) -> str | None:
        """Return "COMMANDLINE", "ENVIRONMENT", "DEFAULT", or None if the command has no such option or it isn't parsed yet."""
        source = self._context and self._context.get_parameter_source(option)
        return source and source.name

    def options(self) -> dict[str, str]:
        """Return the flags of the options given on the command line, by name: as typed, or otherwise their last spelling."""
        words = {word.partition("=")[0] for word in self.words}
        given = [param for param in self._context.command.params if self.source(param.name) == "COMMANDLINE"]
        options = [param for param in given if param.param_type_name == "option"]
        flags = {param: (*param.opts, *param.secondary_opts) for param in options}
        return {param.name: next((flag for flag in flags[param] if flag in words), param.opts[-1]) for param in options}


_latest = Typed()


def typed() -> Typed:
    """Return the command line of the running command."""
    return _latest


def remember(line: Typed) -> None:
    global _latest
    _latest = line

"""No pruning: the language model reads every token, whatever the budget."""

from dataclasses import dataclass

from evoprune.methods.base import Method


@dataclass(frozen=True)
class Nothing(Method):
    """The base class's hooks as they are."""

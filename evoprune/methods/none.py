"""No pruning: the language model reads every token, whatever the budget is."""

from dataclasses import dataclass

from evoprune.methods.base import Method


@dataclass(frozen=True)
class Nothing(Method):
    source = "this project; the unpruned model"

"""Pruning methods from the literature, included for comparison, and their helpers. Like plug-ins, they load via entry points."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.contrib.operation_search import RecipeSearch

__all__ = [
    "RecipeSearch",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "operation_search": ["RecipeSearch"],
    },
)

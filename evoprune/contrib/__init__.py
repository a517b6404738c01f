"""Pruning methods from the literature for comparison, and their helpers. They are loaded through entry points, like plug-ins."""

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

"""Pruning methods for comparison, found through entry points like plug-ins, and helpers that only they use."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.contrib.operation_search import OperationTuning

__all__ = [
    "OperationTuning",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "operation_search": ["OperationTuning"],
    },
)

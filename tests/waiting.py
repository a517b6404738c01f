"""Counts how often a program waits for a device: copies from it, blocking copies to it, and shapes that depend on values."""

from collections.abc import Sequence
from traceback import extract_stack
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend.devices import is_host

# Operators whose output shape depends on values, or whose output the CPU reads.
SHAPED = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere", "bincount",
    "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
COPYING = {"_to_copy", "to", "copy_"}


def shape_depends_on_values(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return True if a torch operator reads values of its arguments before it returns."""
    name = func._schema.name.split("::")[1]
    masks = name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    repeats = name == "repeat_interleave" and isinstance(args[-1], torch.Tensor)
    unbounded = name == "histc" and len(args) < 3 and "min" not in kwargs  # it computes the bounds from the values
    return masks or repeats or unbounded or name in SHAPED


class Waiting(TorchDispatchMode):
    """Records the places at which a program waits.

    Attributes:
        places: for each wait, the operator and the line of this package that called it.
    """

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    @property
    def outside(self) -> list[str]:
        """List the places outside of selections."""
        return [place for place in self.places if not place.split()[1].startswith(("methods/", "contrib/"))]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.waits(func, args, kwargs or {}, result):
            lines = [frame for frame in extract_stack() if "evoprune/" in frame.filename and __file__ != frame.filename]
            where = "?"
            if lines:
                where = f"{lines[-1].filename.rpartition('evoprune/')[2]}:{lines[-1].lineno}"
            self.places.append(f"{func._schema.name.removeprefix('aten::')} {where}")
        return result

    def waits(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> bool:
        there = any(isinstance(x, torch.Tensor) and not is_host(x.device) for x in args)
        if there and shape_depends_on_values(func, args, kwargs):
            return True
        name = func._schema.name.split("::")[1]
        if name not in COPYING:
            return False
        to, source = args[:2] if name == "copy_" else (made, args[0])
        named = kwargs | {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        across = is_host(to.device) != is_host(source.device)
        return across and not (named.get("non_blocking") and is_host(source.device) and source.is_pinned())

"""Replaces methods of one model object by functions of this package, and puts them back."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from evoprune.errors import UsageError

Run = Callable[[Callable, dict], Any]  # takes the model's own method, and the arguments of the call by name


class Patches:
    """The replaced methods of one model.

    Args:
        model: the object whose attributes are set.
        runs: for each method's name, the function that runs instead of it.
    """

    def __init__(self, model, runs: dict[str, Run]):
        self._model, self._runs = model, runs
        self._installed: dict[str, _Patch] = {}
        self._replaced: dict[str, Any] = {}
        self.suspended = False

    def install(self) -> None:
        """Replaces the methods; does nothing if they are replaced already.

        Raises:
            UsageError: other `Patches` are installed in the model.
        """
        if self._installed:
            return
        own = vars(self._model)
        if any(isinstance(inspect.unwrap(own[name], stop=_is_patch), _Patch) for name in self._runs if name in own):
            raise UsageError("this model is pruned already", "remove that first, or leave its with-block")
        self._replaced = {name: own[name] for name in self._runs if name in own}
        self._installed = {name: _Patch(self, getattr(self._model, name), run) for name, run in self._runs.items()}
        for name, patch in self._installed.items():
            setattr(self._model, name, patch)

    def remove(self) -> None:
        """Restores the methods; does nothing if none is replaced.

        Raises:
            UsageError: other code has replaced a method since `install`. Then nothing is restored.
        """
        for name, patch in self._installed.items():
            if vars(self._model).get(name) is not patch:
                raise UsageError(f"something else has replaced the model's {name} since", "take that away first")
        for name in self._installed:
            delattr(self._model, name)
        for name, replaced in self._replaced.items():
            setattr(self._model, name, replaced)
        self._installed, self._replaced = {}, {}

    @contextmanager
    def suspend(self) -> Iterator[None]:
        """While the context lasts, the model's own methods run."""
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False


class _Patch:
    """A callable in place of one method of a model."""

    def __init__(self, patches: Patches, stock: Callable, run: Run):
        functools.update_wrapper(self, stock)
        self._patches, self._stock, self._run = patches, stock, run
        self._signature = inspect.signature(stock)

    def __call__(self, *args, **kwargs):
        if self._patches.suspended:
            return self._stock(*args, **kwargs)
        call = self._signature.bind(*args, **kwargs).arguments
        return self._run(self._stock, call | call.pop("kwargs", {}))

    def __reduce_ex__(self, _):
        raise UsageError("a model cannot be copied or pickled while it is pruned", "remove the pruning first")


def _is_patch(function: Callable) -> bool:
    return isinstance(function, _Patch)

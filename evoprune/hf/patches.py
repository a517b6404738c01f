"""Replaces methods of one model object by functions of this package, and puts them back.

The functions may call one another through the model: `generate` calls `forward` for every token. Such an inner call carries an
argument that says so. No flag on the model does, because other threads call the same model at the same time.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from evoprune.errors import UsageError

Run = Callable[[Callable, dict], Any]  # takes the model's own method, and the arguments of the call by name
End = Callable[[], None]
INNER = "evoprune_inside"  # the argument of inner calls; nothing is pruned in those again
LOCK = threading.Lock()  # one for all patches: two threads may begin to prune one model at the same time


def end_of(model, names: Iterable[str]) -> End | None:
    """What ends the pruning of a model, of which these methods are replaced; None if it is not pruned."""
    own = vars(model)
    found = (inspect.unwrap(own[name], stop=_is_active) for name in names if name in own)
    return next((patch.end for patch in found if _is_active(patch)), None)


class Patches:
    """The replaced methods of one model.

    `runs`: for each method's name, the function that runs instead of it. `end`: what `end_of` finds: calls `remove`, and frees what
    else the owner of these patches holds.
    """

    def __init__(self, model, runs: dict[str, Run], end: End):
        self._model, self._runs, self._end = model, runs, end
        self._installed: dict[str, _Patch] = {}
        self._replaced: dict[str, Any] = {}
        self._calls = 0

    def install(self) -> None:
        """Replaces the methods, if they are not yet. Raises UsageError: other `Patches` are installed in the model."""
        with LOCK:
            if not self._installed:
                if end_of(self._model, self._runs):
                    hint = "it prunes in one way at a time: evoprune.remove(model) ends the other; "
                    hint += "a service calls evoprune.apply(model, ...) once, at its start"
                    raise UsageError("this model is pruned already", hint)
                own = vars(self._model)
                self._replaced = {name: own[name] for name in self._runs if name in own}
                for name, run in self._runs.items():
                    self._installed[name] = _Patch(getattr(self._model, name), run, self._end)
                    setattr(self._model, name, self._installed[name])
            self._activate(True)

    def remove(self) -> None:
        """Restores the methods; does nothing if none is replaced.

        What other code has put on top of a replaced method since stays, and calls the model's own method from now on. Inner calls
        of calls that still run in other threads are served until those end.
        """
        with LOCK:
            self._activate(False)
            self._restore()

    @contextmanager
    def outer_call(self) -> Iterator[None]:
        """The time of a call that makes inner calls."""
        with LOCK:
            self._calls += 1
        try:
            yield
        finally:
            with LOCK:
                self._calls -= 1
                self._restore()

    @property
    def active(self) -> bool:
        """Whether calls that begin now run the functions instead of the model's own methods."""
        return any(patch.active for patch in self._installed.values())

    def _activate(self, active: bool) -> None:
        for patch in self._installed.values():
            patch.active = active

    def _restore(self) -> None:
        """Puts the methods back if they are to be, and nobody needs the replaced ones any more."""
        if self._calls or self.active:
            return
        for name, patch in self._installed.items():
            if vars(self._model).get(name) is patch:
                delattr(self._model, name)
                if name in self._replaced:
                    setattr(self._model, name, self._replaced[name])
        self._installed, self._replaced = {}, {}


class _Patch:
    """A callable in place of one method of a model. When it is not active, it is that method, except to inner calls."""

    def __init__(self, stock: Callable, run: Run, end: End):
        functools.update_wrapper(self, stock)
        self.active, self.end = True, end
        self._stock, self._run = stock, run
        self._own_signature = inspect.signature(stock)
        others = [each for name, each in self._own_signature.parameters.items() if name != INNER]
        at = next((i for i, each in enumerate(others) if each.kind is each.VAR_KEYWORD), len(others))
        # `generate` refuses arguments that the signature of `forward` does not have.
        others.insert(at, inspect.Parameter(INNER, inspect.Parameter.KEYWORD_ONLY, default=None))
        self.__signature__ = self._own_signature.replace(parameters=others)

    def __call__(self, *args, **kwargs):
        if not (self.active or INNER in kwargs):
            return self._stock(*args, **kwargs)
        if not args:  # as in every inner call, which torch.compile may trace
            return self._run(self._stock, kwargs)
        call = self._own_signature.bind(*args, **kwargs).arguments
        return self._run(self._stock, call | call.pop("kwargs", {}))

    def __reduce_ex__(self, _):
        if self.active:
            hint = "evoprune.remove(model) ends that"
            raise UsageError("a model cannot be copied or pickled while it is pruned", hint)
        return _itself, (self._stock,)


def _is_active(function: Callable) -> bool:
    return isinstance(function, _Patch) and function.active


def _itself(x: Any) -> Any:
    return x

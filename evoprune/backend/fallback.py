"""Whether kernels and graphs are used, and what happens where a kernel fails: plain PyTorch, and one warning."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps

import torch

from evoprune.errors import DeviceWarning, first_line, is_out_of_memory

_failed: set[str] = set()
_plainly: list[bool] = []


def plain() -> bool:
    """Whether nothing but plain PyTorch is wanted: EVOPRUNE_PLAIN is set, and not to 0, or this is inside of `plainly`."""
    return bool(_plainly) or os.environ.get("EVOPRUNE_PLAIN", "0") not in ("", "0")


def uses_kernels(device: torch.device) -> bool:
    """Whether kernels are used there: on CUDA, unless only plain PyTorch is wanted."""
    return device.type == "cuda" and not plain()


@contextmanager
def plainly() -> Iterator[None]:
    """A context in which no kernel and no graph is used."""
    _plainly.append(True)
    try:
        yield
    finally:
        _plainly.pop()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def failed(what: str) -> bool:
    return what in _failed


def give_up(what: str, said: str, problem: Exception) -> None:
    """From now on `what` runs without kernels, which is said. Raises `problem` again if it is about memory."""
    if is_out_of_memory(problem):
        raise problem
    _failed.add(what)
    warnings.warn(f"{said}, which takes longer: {first_line(problem)}", DeviceWarning, stacklevel=3)


def with_fallback(what: str, plain_form: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that runs kernels: `plain_form`, of the same arguments, replaces it where they are off or have failed.

    A failure is said once. Running out of memory is none.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            if plain() or failed(what) or not has_triton():
                return plain_form(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as problem:
                give_up(what, f"{what} runs without its kernel", problem)
                return plain_form(*args, **kwargs)

        return run

    return decorate

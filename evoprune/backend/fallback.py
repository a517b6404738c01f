"""Whether kernels are used, and what happens where one fails: plain PyTorch, and one line on stderr."""

import os
import sys
from collections.abc import Callable
from functools import lru_cache, wraps

import torch

PLAIN = "EVOPRUNE_PLAIN"  # variable of the environment that turns kernels and graphs off
_failed: set[str] = set()


def plain() -> bool:
    """Whether the user turned kernels and graphs off."""
    return os.environ.get(PLAIN, "") not in ("", "0")


@lru_cache(maxsize=1)
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def with_fallback(what: str, plain_form: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that runs kernels: `plain_form`, of the same arguments, replaces it where kernels are off or fail.

    A failure is said once on stderr; from then on the plain form runs. Running out of memory is not a failure of a kernel.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            if plain() or what in _failed or not has_triton():
                return plain_form(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:
                _failed.add(what)
                reason = f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
                print(f"warning: {what} runs without its kernel ({reason})", file=sys.stderr)
                return plain_form(*args, **kwargs)

        return run

    return decorate

"""Before and while a command imports torch: enough memory, memory that is kept, no garbage collections."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from evoprune.model.limits import check_libraries, keep_freed_memory


def prepare() -> None:
    """To be called before torch is imported. Raises OutOfMemory: there is not even memory for the libraries."""
    check_libraries()
    keep_freed_memory()


@contextmanager
def without_collections() -> Iterator[None]:
    """Imports inside are an eighth faster: Python does not search a hundred thousand new objects for garbage again and again.

    Nothing that is imported is ever garbage, so later collections leave it out too.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

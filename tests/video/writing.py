"""Runs an encoder in a process of its own, because an encoder may change the process that it runs in.

libsvtav1 puts a process of root into the real-time class. Whatever that process starts afterwards keeps all other
programs from the processor, so a test process that encoded AV1 could stop the machine.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TypeVar

Result = TypeVar("Result")

# Its children are forks of one server that has imported these, so that each starts in milliseconds.
CONTEXT = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
if CONTEXT.get_start_method() == "forkserver":
    CONTEXT.set_forkserver_preload(["tests.video.files"])


def apart(function: Callable[..., Result], *arguments, **how) -> Result:
    """What the function returns or raises. It and its arguments can be pickled."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(partial(function, *arguments, **how)).result()

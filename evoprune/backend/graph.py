"""Functions on streams of CUDA: as a graph, whose one launch runs all kernels again on the same memory, or beside the program."""

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress

import torch

from evoprune.backend.fallback import uses_kernels


def can_capture(device: torch.device) -> bool:
    return uses_kernels(device) and torch.version.cuda is not None


def run_and_capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Runs a function, then captures it. Returns what runs its kernels again; whatever values it read on the host stay.

    The function reads and writes tensors that outlive the graph, and copies nothing to the host. What it raises passes through.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        function()  # libraries are set up and kernels are loaded, which a capture refuses
        # Not `torch.cuda.graph`, which empties the allocator. Other threads may use the device meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def run_beside(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Begins a function on CUDA, in a thread and on a stream of its own. Returns what waits for its end; what it raises is lost."""
    if device.type != "cuda":
        return lambda: None

    def run() -> None:
        # What is wrong the program itself will say, when it does the same.
        with suppress(Exception), torch.cuda.stream(torch.cuda.Stream(device)):
            function()

    thread = threading.Thread(target=run, name="evoprune-beside", daemon=True)
    thread.start()
    atexit.register(thread.join)  # a compiler that runs while the interpreter ends crashes it
    return thread.join

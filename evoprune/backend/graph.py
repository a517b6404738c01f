"""A CUDA graph of a function: one launch runs all of its kernels again, on the same memory."""

from collections.abc import Callable

import torch

from evoprune.backend.fallback import plain


def can_capture(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.cuda is not None and not plain()


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

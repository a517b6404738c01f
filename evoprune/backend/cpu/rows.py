"""The product of a few rows with 8-bit weights: `rows.c` if it was compiled when evoprune was installed, otherwise PyTorch's."""

import ctypes
from functools import lru_cache
from importlib.util import find_spec

import torch

LIBRARY = "evoprune.backend.cpu._rows"  # the compiled rows.c, a C library without a Python interface
POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64
FUNCTIONS = {  # the types of their parameters, except for the last, the number of threads
    "evoprune_row_product": [POINTER] * 4 + [NUMBER] * 3,
    "evoprune_row_product4": [POINTER] * 5 + [NUMBER] * 4,
    "evoprune_unpack4": [POINTER] * 3 + [NUMBER] * 3,
}


def row_product(x: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply rows by 8-bit weights. PyTorch's product is vectorized only for bf16, so it rounds the rows to bf16.

    Args:
        x: `[R, K]`.
        weights: int8 `[N, K]`, in row-major order. N and K are multiples of 32.
        scale: The scale of each output feature, float32 `[N]`.

    Returns:
        float32 `[R, N]`. A row's result doesn't depend on the other rows.
    """
    if compiled := library():
        if x.dtype != torch.float32 or not x.is_contiguous():
            x = x.float().contiguous()
        outputs, length = weights.shape
        y = torch.empty(x.shape[0], outputs, dtype=torch.float32, device="cpu")
        pointers = x.data_ptr(), weights.data_ptr(), scale.data_ptr(), y.data_ptr()
        compiled.evoprune_row_product(*pointers, x.shape[0], length, outputs, torch.get_num_threads())
        return y
    ones = torch.ones(len(weights), dtype=torch.bfloat16, device="cpu")
    return torch._weight_int8pack_mm(x.bfloat16().contiguous(), weights, ones).float().mul_(scale)


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled `rows.c`, or None if it was not compiled or this CPU can't run it."""
    found = find_spec(LIBRARY)
    if found is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return load(found.origin)


def load(path: str) -> ctypes.CDLL | None:
    """Load a compiled `rows.c`, which uses torch's OpenMP threads. Returns None if it can't be loaded, or torch has no OpenMP."""
    try:
        compiled = ctypes.CDLL(path)
    except OSError:
        return None
    for name, types in FUNCTIONS.items():
        function = getattr(compiled, name)
        function.argtypes = [*types, ctypes.c_int]
        function.restype = None
    return compiled

"""The library compiled from the C files in this folder when evoprune was installed, if there was a C compiler."""

import ctypes
from ctypes import Structure, byref, c_int64, c_void_p
from functools import lru_cache
from importlib.util import find_spec

import torch

from evoprune.backend.cpu import four_bits

LIBRARY = "evoprune.backend.cpu._rows"  # a C library without a Python interface
LAYOUT = 5  # `evoprune_layout` in layer.c
FUNCTIONS = {  # the types of their parameters, except for the last, the number of threads
    "evoprune_linear": [c_void_p] * 4 + [c_int64],
    "evoprune_layer": [c_void_p] * 8 + [c_int64],
    "evoprune_delta_layer": [c_void_p] * 7 + [c_int64],
    "evoprune_delta_rule": [c_void_p] * 7 + [c_int64] * 5,
    "evoprune_unpack4": [c_void_p] * 3 + [c_int64] * 2,
}


@lru_cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library, or None if it was not compiled or this CPU can't run it."""
    found = find_spec(LIBRARY)
    if found is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return None
    return load(found.origin)


def load(path: str) -> ctypes.CDLL | None:
    """Load a compiled library, which uses torch's OpenMP threads.

    Returns None if it can't be loaded, torch has no OpenMP, or it was compiled from an older version of the source.
    """
    try:
        loaded = ctypes.CDLL(path)
        layout = ctypes.c_int.in_dll(loaded, "evoprune_layout").value
    except (OSError, ValueError):
        return None
    if layout != LAYOUT:
        return None
    for name, types in FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes = [*types, ctypes.c_int]
        function.restype = None
    return loaded


class Linear(Structure):
    """The addresses of a quantized linear layer's tensors, as in `layer.c`. The tensors must outlive this object."""

    _fields_ = (
        ("weights", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
        ("wide", c_void_p),
        ("large", c_void_p),
        ("larges", c_int64),
        ("length", c_int64),
        ("outputs", c_int64),
    )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to rows, `[R, in]`. Returns float32 `[R, out]`. A row's result doesn't depend on the other rows."""
        x = x.float().contiguous()
        y = torch.empty(len(x), self.outputs, dtype=torch.float32, device="cpu")
        room = working_memory(len(x), four_bits.room_bytes(self.length))
        pointers = (tensor.data_ptr() for tensor in (x, y, room))
        library().evoprune_linear(byref(self), *pointers, len(x), torch.get_num_threads())
        return y


def working_memory(rows: int, row_bytes: int) -> torch.Tensor:
    return torch.empty(rows * row_bytes, dtype=torch.int8, device="cpu")


def unpack(packed: torch.Tensor, scale: torch.Tensor, length: int) -> torch.Tensor:
    """Unpack 4-bit weights to 8 bits.

    Args:
        packed, scale: As returned by `four_bits.pack`.
        length: The number of weights in a row, a multiple of 32.

    Returns:
        int8 `[N, length]`. Multiplied by `scale`, these are the weights with a small error.
    """
    whole = torch.empty(len(packed), length, dtype=torch.int8, device="cpu")
    pointers = packed.data_ptr(), scale.data_ptr(), whole.data_ptr()
    library().evoprune_unpack4(*pointers, length, len(packed), torch.get_num_threads())
    return whole

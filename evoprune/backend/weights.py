"""How a device holds the weights of a model: in the pages of their files, widened, packed or joined."""

from collections.abc import Collection

import torch

from evoprune.backend.cpu.linear import Packing, pack
from evoprune.backend.devices import available_memory, is_host, uses_kernels
from evoprune.backend.layers import join, join_tower

RESERVED_BYTES = 2**29  # that packed weights leave for the work itself
WIDENED = ("compressed-tensors", "fp8")  # quantised weights that transformers widens when it loads them on a CPU
STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # dtypes, as safetensors name them


def are_mapped(device: torch.device, stored: Collection[str], dtype: torch.dtype, quantize: str) -> bool:
    """Return whether weights stay in the pages of their files until they are packed or quantised, as on a CPU.

    `stored`: their dtypes in the files, as safetensors name them. `dtype`, `quantize`: in which they are wanted.
    """
    return is_host(device) and (quantize != "none" or {*stored} == {STORED[dtype]})


def are_widened(device: torch.device, quantization: str | None) -> bool:
    """Return whether weights that are quantised by this method become plain ones when they are loaded."""
    return is_host(device) and quantization in WIDENED


def prepare(model, packs: bool = True) -> Packing:
    """Prepares the weights of a model for products, in place: packed on a CPU, if `packs`, joined where kernels run.

    The tower's are packed now, the language model's later, as the result says: the tower is a sixth of a 3B model,
    and packed it encodes about a tenth faster; the language model would make words wait. Where memory is short, none are.
    """
    packing = Packing()
    if uses_kernels(model.device):
        if model.native:
            join(model)
        join_tower(model.model.visual)
    if packs and is_host(model.device):
        weights = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
        available = available_memory("cpu")
        if available is None or available > weights + RESERVED_BYTES:
            pack(model.model.visual)
            pack(model, packing)
    return packing

"""How a device holds the weights of a model: memory-mapped, widened, packed or joined."""

from collections.abc import Collection

import torch

from evoprune.backend.cpu.linear import Packing, pack
from evoprune.backend.devices import Device, is_host, uses_kernels
from evoprune.backend.layers import join, join_tower

RESERVED_BYTES = 2**29  # bytes that packing must leave free for the computation
WIDENED = ("compressed-tensors", "fp8")  # quantization that transformers undoes when it loads weights on a CPU
STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # dtype names in safetensors


def are_mapped(device: torch.device, stored: Collection[str], dtype: torch.dtype, quantize: str) -> bool:
    """Return whether weights stay memory-mapped until they are packed or quantized, as on a CPU.

    Args:
        device: of the model.
        stored: dtypes of the weights in the files, as safetensors names them.
        dtype: requested dtype.
        quantize: requested kind of quantization, or "none".
    """
    return is_host(device) and (quantize != "none" or {*stored} == {STORED[dtype]})


def are_widened(device: torch.device, quantization: str | None) -> bool:
    """Return whether weights with this quantization are dequantized when they are loaded on a device."""
    return is_host(device) and quantization in WIDENED


def prepare(model, packs: bool = True) -> Packing:
    """Prepare the weights of a model for fast products, in place: packed on a CPU if `packs`, joined on devices with kernels.

    The tower is packed now: it is a sixth of a 3B model, and encodes about a tenth faster when packed. The language model is packed
    later, as the returned schedule decides, because packing it now would delay the first words. If memory is short, nothing is
    packed.
    """
    packing = Packing()
    if uses_kernels(model.device):
        if model.native:
            join(model)
        join_tower(model.model.visual)
    if packs and is_host(model.device):
        weights = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
        available = Device("cpu").available_memory()
        if available is None or available > weights + RESERVED_BYTES:
            pack(model.model.visual)
            pack(model, packing)
    return packing

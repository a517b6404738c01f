"""Prepare the weights of a model for a device, by packing or joining them."""

from evoprune.backend.cpu.linear import Packing
from evoprune.backend.devices import Device, is_host, uses_kernels
from evoprune.backend.layers import join, join_tower

RESERVED_BYTES = 2**29  # memory that packing must leave free for running the model


def prepare(model, packs: bool = True) -> Packing:
    """Rearrange a model's weights in place so that products with them are fast.

    On a CPU, the weights are packed. On devices that run kernels, they are joined. The tower is packed immediately, because it is
    only a sixth of a 3B model and encodes about a tenth faster when it is packed. Packing the language model immediately would
    delay the first words of the answer, so it is packed later. If the CPU is low on memory, nothing is packed.

    Args:
        model: The model whose weights are rearranged.
        packs: Whether to pack the weights if the model is on a CPU.

    Returns:
        The schedule for packing the language model.
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
            Packing.now(model.model.visual)
            packing.later(model)
    return packing

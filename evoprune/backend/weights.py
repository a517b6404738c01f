"""Prepares the weights of a model for fast matrix products: packs them on the CPU, and joins them on devices that run kernels."""

from evoprune.backend.cpu.linear import Packing
from evoprune.backend.devices import Device, is_host, uses_kernels
from evoprune.backend.layers import join, join_tower

RESERVED_BYTES = 2**29  # memory that packing must leave free for inference


def prepare(model, packs: bool = True) -> Packing:
    """Rearrange a model's weights in place for fast matrix products.

    On a CPU, weights are packed unless memory is low. On devices that run kernels, they are joined. The vision tower is packed
    immediately because it is only a sixth of a 3B model and encodes about a tenth faster when packed. The language model is packed
    later because immediate packing would delay the first words of the answer.

    Args:
        model: The model whose weights to rearrange.
        packs: Whether to pack the weights if the model is on a CPU.

    Returns:
        The packing schedule for the language model.
    """
    packing = Packing()
    if uses_kernels(model.device):
        if model.native and model.config.text_config.delta_net is None:
            join(model)
        join_tower(model.model.visual)
    if packs and is_host(model.device):
        weights = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
        available = Device("cpu").available_memory()
        if available is None or available > weights + RESERVED_BYTES:
            Packing.now(model.model.visual)
            packing.later(model)
    return packing

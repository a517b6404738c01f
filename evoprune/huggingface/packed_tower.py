"""Packed copies of the tower's linear layers, beside those of a Hugging Face model that stays as it is."""

import torch
from torch import nn

from evoprune.errors import UsageError
from evoprune.model.linear import PackedLinear, can_pack, packed_copy, packs

SAMPLES = 16  # of each weight, which are compared to notice that it was changed


class PackedTower:
    """The tower of a model with its linear layers packed (`model.linear`), for encoding on a CPU.

    The model keeps its own tower, in which nothing changes. Both share the other weights. The packed layers take as many bytes
    again as the layers that they copy.

    Args:
        visual: transformers' tower of Qwen2.5-VL or Qwen2-VL.

    Raises UsageError: packing does not work, or saves no time, where the weights are.
    """

    def __init__(self, visual: nn.Module):
        weight = visual.patch_embed.proj.weight
        if not can_pack(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise UsageError(
                f"pack=True does not work in {dtype} on {weight.device} here",
                "it is for CPUs, in float32 or, where the CPU multiplies it in hardware, bfloat16; leave it out",
            )
        self._visual = visual
        self._state: tuple = (None, None, None)  # read and written as one: several threads may encode
        self.current()

    def current(self) -> nn.Module:
        """The packed tower. If the model's layers have changed since they were packed, they are packed again.

        Changes are noticed by the layers' tensors, the number of torch's changes in place, and a sample of the values, which
        reveals changes through `.data`.
        """
        layers = {name: layer for name, layer in self._visual.named_modules() if packs(layer)}
        known = {name: (layer, layer.weight.data_ptr(), _version(layer.weight)) for name, layer in layers.items()}
        sample = [number for layer in layers.values() for number in _sample(layer.weight)]
        packed, packed_known, packed_sample = self._state
        if packed is None or (known, sample) != (packed_known, packed_sample):
            packed = packed_copy(self._visual)
            self._state = packed, known, sample
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers, beside the model's own."""
        return sum(layer.nbytes for layer in self._state[0].modules() if isinstance(layer, PackedLinear))


def _version(weight: torch.Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _sample(weight: torch.Tensor) -> list[float]:
    flat = weight.detach().flatten()
    return flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()

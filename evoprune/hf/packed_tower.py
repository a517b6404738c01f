"""Packed or quantised copies of the tower's linear layers, beside those of a Hugging Face model that stays as it is."""

from typing import Literal

from torch import nn

from evoprune.backend.layers import is_plain
from evoprune.cpu.linear import PackedLinear, can_pack, packed_copy, shared_copy
from evoprune.cpu.quantize import Int8Linear, check, quantize
from evoprune.errors import UsageError
from evoprune.session.loading.stored import calibrate_tower

INT8 = "int8"
SAMPLES = 16  # of each weight, which are compared to notice that it was changed


class PackedTower:
    """The tower of a model with its linear layers packed (`model.linear`) or in 8 bits (`model.integers`), to encode on a CPU.

    The model keeps its own tower, in which nothing changes. Both share the other weights.

    Raises UsageError: this does not work, or saves no time, where the weights are.
    """

    def __init__(self, visual: nn.Module, pack: Literal[True, "int8"] = True):
        weight = visual.patch_embed.proj.weight
        if pack is True and not can_pack(weight):
            dtype = str(weight.dtype).removeprefix("torch.")
            hint = "it is for CPUs, in float32 or, where the CPU multiplies it in hardware, bfloat16; leave it out"
            raise UsageError(f"pack=True does not work in {dtype} on {weight.device} here", hint)
        if pack == INT8:
            check(INT8, weight.device)
        self._visual, self._pack = visual, pack
        self._state: tuple = (None, None, None)  # read and written as one: several threads may encode
        self.current()

    def current(self) -> nn.Module:
        """The packed tower. If the model's layers have changed since they were packed, they are packed again.

        Changes are noticed by the layers' tensors, the number of torch's changes in place, and a sample of the values, which
        reveals changes through `.data`.
        """
        known, sample = {}, []
        for name, layer in self._visual.named_modules():
            if is_plain(layer):
                weight, flat = layer.weight, layer.weight.detach().flatten()
                known[name] = layer, weight.data_ptr(), 0 if weight.is_inference() else weight._version
                sample += flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()
        packed, packed_known, packed_sample = self._state
        if packed is None or (known, sample) != (packed_known, packed_sample):
            if self._pack == INT8:
                packed = shared_copy(self._visual, lambda layer: layer if type(layer) is nn.Linear else None)
                quantize(packed, INT8, calibrate_tower)
            else:
                packed = packed_copy(self._visual)
            self._state = packed, known, sample
        return packed

    @property
    def nbytes(self) -> int:
        """Bytes of the packed layers, beside the model's own."""
        return sum(layer.nbytes for layer in self._state[0].modules() if isinstance(layer, PackedLinear | Int8Linear))

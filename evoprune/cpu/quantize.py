"""A model whose linear layers are quantised. Memory and cheap products are what CPUs without bf16 lack.

int8 covers tower and language model. int4 covers the language model where it decodes; int8 does the rest. Which input channels are
large is found once, by `Unquantised`.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from evoprune.backend.devices import is_host
from evoprune.backend.layers import is_plain
from evoprune.cpu.integers import (
    GROUP,
    Bytes,
    Int4Linear,
    Int8Linear,
    Weights,
    exact,
    int4_weights,
    int8_weights,
    large_channels,
)
from evoprune.cpu.machine import cool
from evoprune.cpu.precision import check_quantize
from evoprune.errors import UsageError

Progress = Callable[[int, int], None]
SCRATCH_BYTES = 2**25  # larger blocks are given back to the system when they are freed


class Unquantised(nn.Module):
    """A linear layer whose first input says which of its channels are large.

    `become` is called with the layer and these channels. It puts a quantised layer in the place of this one, and returns the one
    that computes this call.
    """

    def __init__(self, layer: nn.Linear, become: Callable[[nn.Linear, torch.Tensor], nn.Module]):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self._layer, self._become = [layer], become  # in a list, so that it is no part of the tree

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        made = self._become(layer, large_channels(x))
        cool(layer.weight)  # a file's pages may count against a container's memory
        return made(x)


def check(kind: str, device: torch.device) -> None:
    """Raises UsageError: there is no such kind of quantisation, or not on this device, with this PyTorch or this CPU."""
    check_quantize(kind)
    if kind == "none":
        return
    if not is_host(device):
        raise UsageError(f"quantize {kind} works on the CPU, not on {device}", "leave quantize out")
    if kind not in kinds(device):
        raise UsageError(f"this PyTorch has no exact {kind} products for this CPU", "leave quantize out")


def kinds(device: torch.device) -> list[str]:
    """The kinds of quantisation that work on a device, with this PyTorch and this CPU; without "none"."""
    if not is_host(device) or not exact(127):
        return []
    return ["int8", "int4"] if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else ["int8"]


def places(model: nn.Module, kind: str) -> Iterator[tuple[str, str]]:
    """The linear layers that are quantised, by name, and what each becomes: "int8" or "int4"."""
    for path, layer in model.named_modules():
        if is_plain(layer):
            decodes = path.startswith(("model.language_model.", "lm_head")) and layer.in_features % GROUP == 0
            yield path, kind if decodes else "int8"


def saved_bytes(model: nn.Module, kind: str) -> int:
    """Bytes by which quantisation ("int8" or "int4") makes a model smaller, which may be on the meta device.

    An output layer that is the input embedding too stays as well.
    """
    saved, embedding = 0, model.model.language_model.embed_tokens.weight
    for path, becomes in places(model, kind):
        weight = model.get_submodule(path).weight
        rows, columns = weight.shape
        row = columns + 16
        if becomes == "int4":  # beside int8 for prompts; the output layer reads one row alone
            row = columns // 2 + columns // GROUP * 2 * weight.itemsize + (row if path != "lm_head" else 0)
        saved += (0 if weight is embedding else weight.nbytes) - rows * row
    return saved


def quantize(
    model: nn.Module,
    kind: str,
    run: Callable[[nn.Module], None],
    progress: Progress | None = None,
    store: Callable[[str, Weights], None] | None = None,
) -> None:
    """Quantises the linear layers of a model in place, each when its input is known.

    `run`: runs the model on some input, the same in every run; every linear layer is called. `progress`: called with the number of
    layers done and of all layers. `store`: called with each layer's name and what `restore` makes it of.

    Raises RuntimeError: a layer was not called.
    """
    made = _Quantised(model, kind, progress)
    # Memory that layer after layer allocates and frees between what stays would be left in holes: a third of the model.
    memory = torch.empty(SCRATCH_BYTES, dtype=torch.int8, device="cpu")

    def become(path: str, layer: nn.Linear, large: torch.Tensor) -> nn.Module:
        weights = int8_weights(layer, large, memory) if made.reads_rows(path) else {}
        weights |= int4_weights(layer) if made.every[path] == "int4" else {}
        if store:
            store(path, weights)
        return made.put(path, layer, weights)

    for path in made.every:
        made.replace(path, Unquantised(model.get_submodule(path), partial(become, path)))
    with torch.inference_mode():
        run(model)
    if missing := len(made.every) - made.done:
        raise RuntimeError(f"{missing} layers of the model were not called, so they are not quantised")


def restore(model: nn.Module, kind: str, read: Callable[[str], Weights], progress: Progress | None = None) -> None:
    """Puts quantised layers in their places, of the weights that `quantize` stored; `read` gives those of a layer."""
    made = _Quantised(model, kind, progress)
    for path in made.every:
        made.put(path, model.get_submodule(path), read(path))


class _Quantised:
    """A model whose linear layers are quantised one after another."""

    def __init__(self, model: nn.Module, kind: str, progress: Progress | None):
        self.every, self.done = dict(places(model, kind)), 0
        self._model, self._progress = model, progress
        self._to_bytes, self._known = Bytes(), {}

    def reads_rows(self, path: str) -> bool:
        """Whether a layer needs int8 weights: all, but an output layer in int4, which reads one row."""
        return self.every[path] == "int8" or path != "lm_head"

    def replace(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, layer)

    def put(self, path: str, layer: nn.Linear, weights: Weights) -> nn.Module:
        """Makes the quantised layer of `weights`, and puts it in the place of `layer`."""
        full = None
        if self.reads_rows(path):
            # Layers of one module with the same channels have the same input: `to_bytes` knows it by the same object.
            key = path.rpartition(".")[0], layer.in_features, tuple(weights["large"].tolist())
            large = self._known.setdefault(key, weights["large"])
            full = Int8Linear(weights | {"large": large}, layer.bias, self._to_bytes)
        made = full
        if self.every[path] == "int4":
            # The kernel wants the dtype in which the model computes. That of the file may be narrower.
            weights = weights | {"scales": weights["scales"].to(self._model.dtype)}
            made = Int4Linear(weights, (layer.out_features, layer.in_features), layer.bias, full)
        self.replace(path, made)
        self.done += 1
        if self._progress:
            self._progress(self.done, len(self.every))
        return made

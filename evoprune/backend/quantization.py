"""Quantize the linear layers of a model on a CPU, and decode with quantized layers.

The quantized layers themselves are in cpu/quantize.py and cpu/layer.py, which are imported only for models that have them.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from evoprune.backend.cpu.linear import FEW_ROWS, by_row, role
from evoprune.backend.devices import is_host
from evoprune.backend.layers import is_unhooked_linear
from evoprune.errors import UsageError

if TYPE_CHECKING:
    from evoprune.backend.cpu.experts import QuantizedExperts
    from evoprune.backend.cpu.layer import CompiledLayer
    from evoprune.backend.cpu.quantize import Int8Linear, Matrix, Weights

# Unquantized layers, as in published checkpoints: the decay and write gates of a Gated DeltaNet, which compute one number per head,
# and the gate of the shared expert, which computes a single number.
GATES = "in_proj_a", "in_proj_b", "shared_expert_gate"
SCRATCH_BYTES = 2**25  # the allocator returns larger blocks to the system when freed


class Quantization:
    """Quantizes the linear layers of a model on a CPU.

    Attributes:
        few_rows: With at most this many rows, quantized layers compute exactly the same as with each row alone.
        kind: "int8", "int4", or "none" to leave the layers unchanged.
    """

    few_rows = FEW_ROWS

    def __init__(self, kind: str):
        self.kind = kind

    @staticmethod
    @contextmanager
    def decoding() -> Iterator[None]:
        """Context manager that tells quantized layers that this thread is decoding an answer rather than prefilling a prompt.

        Some quantized layers use different weights for answers than for prompts. They can't choose the weights based on the number
        of rows, because an answer would then depend on how many of its tokens are processed together.
        """
        before = role.decodes
        role.decodes = True
        try:
            yield
        finally:
            role.decodes = before

    @staticmethod
    def compiled_layers(layers: Iterable[nn.Module], x: torch.Tensor, config) -> "list[CompiledLayer] | None":
        """Return the compiled forms of all decoder layers, or None if one has none, or this thread is not decoding.

        Args:
            layers: The layer modules.
            x: The input of the first layer.
            config: The language model config.
        """
        if not role.decodes or not is_host(x.device) or not _is_quantized(next(iter(layers))):
            return None
        from evoprune.backend.cpu.layer import CompiledLayer

        found = []
        for layer in layers:
            if (form := CompiledLayer.of(layer, config)) is None:
                return None
            found.append(form)
        return found

    @staticmethod
    def delta_rule(device: torch.device, values: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
        """Return the compiled function that reads columns one by one in a Gated DeltaNet, or None if there isn't one.

        Layers that are not quantized use it too. See cpu/deltas.py for the function.

        Args:
            device: The device of the tensors.
            values: The number of features of a value.
        """
        if not is_host(device) or values % 8:
            return None
        from evoprune.backend.cpu.compiled import library
        from evoprune.backend.cpu.deltas import delta_rule

        return None if library() is None else delta_rule

    @staticmethod
    def experts_output(
        experts: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the output of a layer's experts, which may be quantized. See `experts_output` in cpu/experts.py."""
        from evoprune.backend.cpu.experts import experts_output

        return experts_output(experts, x, chosen, weights)

    @staticmethod
    def by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Apply a function to rows, of which a few don't depend on one another. See `by_row` in cpu/linear.py."""
        return by_row(function, x)

    @staticmethod
    def computes_few_exactly(model: nn.Module) -> bool:
        """Return True if the compiled library computes the language model, so a few columns are computed as if each was alone."""
        layers = model.model.language_model.layers
        config = model.config.text_config
        if not hasattr(model.lm_head, "structure"):
            return False
        from evoprune.backend.cpu.layer import CompiledLayer

        return all(CompiledLayer.of(layer, config) for layer in layers)

    @staticmethod
    def kinds(device: torch.device) -> list[str]:
        """Return the quantization types, except "none", supported on a device by the installed PyTorch version and this CPU."""
        from evoprune.backend.cpu.quantize import ROW_STEP, RowMajorInt4Linear, has_exact_products

        if not is_host(device) or not has_exact_products(127):
            return []
        return ["int8", "int4"] if RowMajorInt4Linear.suits((ROW_STEP, ROW_STEP)) else ["int8"]

    def check(self, device: torch.device) -> None:
        """Raise UsageError if the installed PyTorch version or this CPU doesn't support this quantization type on a device."""
        if self.kind == "none":
            return
        if not is_host(device):
            raise UsageError(f"quantize {self.kind} works on the CPU, not on {device}", "leave quantize out")
        kinds = self.kinds(device)
        if self.kind in kinds:
            return
        from evoprune.backend.cpu.compiled import library

        if "int8" in kinds and library() is None:
            hint = "quantize to int8, or install a C compiler and then reinstall evoprune"
            raise UsageError("int4 requires evoprune's compiled library (Linux, x86-64)", hint)
        hint = "quantize to int8" if kinds else "leave quantize out"
        raise UsageError(f"this PyTorch has no fast and exact {self.kind} products for this CPU", hint)

    @property
    def levels(self) -> int:
        """Number of rounding levels on either side of zero, which depends on the CPU."""
        from evoprune.backend.cpu.quantize import levels

        return levels()

    def layers(self, model: nn.Module) -> "dict[str, type[Int8Linear | QuantizedExperts]]":
        """Return a mapping from the name of each module to quantize to the class that replaces it.

        The modules are linear layers, and the experts of layers with a mixture of experts.
        """
        from evoprune.backend.cpu.experts import QuantizedExperts, are_experts
        from evoprune.backend.cpu.quantize import form_of

        forms: dict[str, type[Int8Linear | QuantizedExperts]] = {}
        for path, layer in model.named_modules():
            if are_experts(layer):
                forms[path] = QuantizedExperts
            elif is_unhooked_linear(layer) and not path.endswith(GATES):
                forms[path] = form_of(self.kind, path, layer.weight.shape)
        return forms

    def saved_bytes(self, model: nn.Module) -> int:
        """Return the number of bytes saved by quantization. The model may be on the meta device.

        If the output layer shares its weights with the input embedding, the original weights also remain in memory.
        """
        from evoprune.backend.cpu.experts import QuantizedExperts
        from evoprune.backend.cpu.four_bits import packed_bytes
        from evoprune.backend.cpu.quantize import RowMajorInt4Linear, RowMajorInt8Linear

        saved = 0
        embedding = model.model.language_model.embed_tokens.weight
        for path, form in self.layers(model).items():
            for weight in model.get_submodule(path).parameters(recurse=False):
                if weight.ndim == 1:
                    continue
                *_, rows, columns = weight.shape
                packs = form is RowMajorInt4Linear
                more = 16  # bytes per row for scales, sums, and biases
                if form is QuantizedExperts:
                    more = 4
                    packs = self.kind == "int4" and RowMajorInt8Linear.suits((rows, columns))
                row = packed_bytes(columns) if packs else columns
                saved -= weight.numel() // columns * (row + more)
                if weight is not embedding:
                    saved += weight.nbytes
        return saved

    def packed_bytes(self, model: nn.Module) -> int:
        """Return the size of the layers whose stored weights are copied into another layout.

        The model may be on the meta device.
        """
        from evoprune.backend.cpu.quantize import Int8Linear

        packed = (path for path, form in self.layers(model).items() if form is Int8Linear)
        return sum(model.get_submodule(path).weight.numel() for path in packed)

    def weights(self, model: nn.Module) -> list[str]:
        """Return the names of all weights to quantize."""
        return [
            f"{path}.{name}"
            for path in self.layers(model)
            for name, weight in model.get_submodule(path).named_parameters(recurse=False)
            if weight.ndim > 1
        ]

    def apply(
        self,
        model: nn.Module,
        run: Callable[[nn.Module], None],
        progress: Callable[[int, int], None] | None = None,
        store: "Callable[[str, Weights], None] | None" = None,
        read: "Callable[[str], Matrix] | None" = None,
    ) -> None:
        """Quantize the linear layers of a model in place. Each layer is quantized as soon as its input is known.

        Args:
            model: The model to modify in place.
            run: Runs the model on a fixed input, which must be the same every time and must reach every linear layer.
            progress: Called with the number of finished layers and the total number of layers.
            store: Called with each layer's name and the tensors required to `restore` it.
            read: Returns the weights with a given name, for layers whose weights are on the meta device because all of them
                together would not fit into memory. The weights of experts must be a tensor.

        Raises:
            RuntimeError: If a layer was not called.
        """
        from evoprune.backend.cpu import quantize

        layers = quantize.Layers(model, self.layers(model), progress)
        # Without a shared buffer, each layer's temporary blocks would leave gaps between the permanent blocks, adding up to a third
        # of the model's size.
        memory = torch.empty(SCRATCH_BYTES, dtype=torch.int8, device="cpu")

        def quantize_layer(path: str, layer: nn.Linear, large: torch.Tensor) -> nn.Module:
            form = layers.forms[path]
            weight = layer.weight
            if weight.is_meta and read:
                weight = read(f"{path}.weight")
            if form is quantize.RowMajorInt4Linear:
                weights = quantize.row_major_int4_weights(weight, large)
            elif form is quantize.RowMajorInt8Linear:
                # Row-major weights are not copied into a packed layout, so they can't share the buffer.
                weights = quantize.int8_weights(weight, large)
            else:
                weights = quantize.int8_weights(weight, large, memory)
            if store:
                store(path, weights)
            return layers.put(path, layer, weights)

        def quantize_experts(path: str, experts: nn.Module) -> nn.Module:
            weights = {name: getattr(experts, name).detach() for name in quantize.MATRICES}
            if read:
                weights = {name: read(f"{path}.{name}") if each.is_meta else each for name, each in weights.items()}
            made = quantize.experts_weights(weights, self.kind)
            if store:
                store(path, made)
            return layers.put(path, experts, made)

        for path, form in layers.forms.items():
            layer = model.get_submodule(path)
            if form is quantize.QuantizedExperts:
                placeholder = quantize.UnquantizedExperts(partial(quantize_experts, path, layer))
            else:
                placeholder = quantize.Unquantized(layer, partial(quantize_layer, path))
            layers.replace(path, placeholder)
        with torch.inference_mode():
            run(model)
        if missing := len(layers.forms) - layers.done:
            raise RuntimeError(f"{missing} layers of the model were not called, so they are not quantized")

    def restore(
        self, model: nn.Module, read: "Callable[[str], Weights]", progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Replace a model's linear layers with quantized layers, using the weights stored by `apply`.

        Args:
            model: The model to modify in place.
            read: Returns the stored weights for a layer, given its name.
            progress: Called with the number of finished layers and the total number of layers.
        """
        from evoprune.backend.cpu.quantize import Layers

        layers = Layers(model, self.layers(model), progress)
        for path in layers.forms:
            layers.put(path, model.get_submodule(path), read(path))


def _is_quantized(layer: nn.Module) -> bool:
    """Return True if a decoder layer's linear layers have the structure that the compiled library reads."""
    if hasattr(layer.mlp, "experts"):
        return hasattr(layer.mlp.experts, "is_compiled")
    return hasattr(layer.mlp, "down_proj") and hasattr(layer.mlp.down_proj, "structure")

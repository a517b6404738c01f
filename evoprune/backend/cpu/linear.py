"""Linear layers fused with the operation that follows, with weights packed once on the CPU.

PyTorch's plain CPU matmul rearranges the whole weight matrix on every call, whereas a packed layer rearranges it only once. This
mainly speeds up single-row products, and therefore decoding (`python -m experiments.speed.kernels`). With many rows, the plain
product is just as fast.

Packing pays off only after dozens of products, so layers can delay it (see `Packing`). Short answers then don't need any packing,
and longer answers pack some layers with each token. This module uses the same operators as torch.compile. If the installed torch
version lacks them, layers are not packed.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend.devices import Device, is_host
from evoprune.backend.layers import is_unhooked_linear

# Number of input rows for which weights are packed. The packed layout is the same for any number above a few dozen.
ROWS = 512
# With at least this many rows, plain and packed weights are equally fast and produce the same results, because products are not
# split along the inner dimension. Products with small weights are still split, but small weights can be packed in almost no time.
MANY_ROWS = 256
SMALL_WEIGHT = 2**21
# With quantized weights, at most this many rows have exactly the same results as each row alone. A difference in the last bit could
# become a difference of a step in the next layer.
FEW_ROWS = 8
LARGE_WEIGHT = 2**28  # larger weights, such as the output layer, are split into parts and packed one by one
PARTS = 16
SPARE_BYTES = 2**28  # amount of memory, in bytes, that packing leaves free
START_PASSES = 32  # number of passes (one per token) before pending layers are packed
PASS_BYTES = 2**28  # approximate bytes of weights to pack in each later pass, so no token is delayed by a second


class _Role(threading.local):
    """What a thread computes: `decodes` is True while it decodes an answer. See `Quantization.decoding`."""

    decodes = False


role = _Role()


class Packing:
    """A schedule for deferred packing of linear layers: a few in each pass, and more while no question is being answered.

    Packing may be deferred only if a layer's plain and packed weights produce the same results; otherwise, an answer would depend
    on the questions before it. Whether the results match depends on the dtype, CPU, and torch version, so this is tested at run
    time. The first layer of each shape is packed immediately, and both its plain and packed weights are kept as a sample until all
    layers of this shape are packed.

    Attributes:
        model: A weak reference to the model with pending layers, or None.
        seconds: The total packing time of the layers in this schedule, in seconds.
        passes: The number of decoding passes through the language model so far (see `begin_pass`).
        room: The remaining weight bytes that can be packed in this pass.
    """

    def __init__(self):
        self.model: weakref.ref[nn.Module] | None = None
        self.seconds = 0.0
        self.passes = 0
        self.room = 0
        self._waiting: Counter[torch.Size] = Counter()  # number of pending layers, by weight shape
        self._samples: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}  # plain and packed weights, by shape
        self._same: dict[tuple, bool] = {}  # whether plain and packed products are equal, by shape, rows, and threads

    @staticmethod
    def supports(weight: torch.Tensor) -> bool:
        """Return True if `weight` can be packed and packing saves time.

        The weight must be on the CPU, in fp32 or in bf16 with hardware support, and torch must have the packing operators.
        """
        if not is_host(weight.device) or weight.dtype not in (torch.float32, torch.bfloat16):
            return False
        if type(weight.data) is not torch.Tensor:  # a tensor subclass, such as torchao's quantized tensors
            return False
        if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        operators = "_reorder_linear_weight", "_linear_pointwise"
        return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)

    @staticmethod
    def allows_autocast(dtype: torch.dtype) -> bool:
        """Return False if torch autocast is active and converts to a dtype other than `dtype`, that of the packed weights."""
        return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == dtype

    @staticmethod
    def now(model: nn.Module) -> None:
        """Immediately pack the linear layers of `model`, in place. Layers with hooks are left unchanged."""
        _replace_layers(model, None)

    def later(self, model: nn.Module) -> None:
        """Schedule the linear layers of `model` for packing. Small layers are packed immediately.

        Layers with hooks are left unchanged. The schedule is stored in the model (see `of`).
        """
        _replace_layers(model, self)
        model.packing = self
        self.model = weakref.ref(model)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return a model's packing schedule, or an empty schedule if it has none."""
        return getattr(model, "packing", None) or cls()

    @property
    def waiting(self) -> list["PackedLinear"]:
        """The layers still waiting to be packed."""
        model = self.model and self.model()
        if model is None:
            return []
        return [module for module in model.modules() if isinstance(module, PackedLinear) and module.waits]

    def finish(self) -> None:
        """Pack all pending layers now. Benchmarks call this to exclude packing from their measurements."""
        for layer in self.waiting:
            layer.pack()

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Context manager that packs pending layers in a background thread while the current thread is idle.

        On exit, the background thread finishes its current layer. The remaining layers stay pending.
        """
        layers = self.waiting
        ended = threading.Event()

        def work() -> None:
            for layer in layers:
                if ended.is_set():
                    return
                layer.pack()

        thread = threading.Thread(target=work, name="evoprune-packing", daemon=True)
        if layers:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if layers:
                thread.join()

    def begin_pass(self) -> None:
        """Record the start of a decoding pass, in which the language model computes the next token."""
        self.passes += 1
        self.room = 0
        if self.passes > START_PASSES:
            self.room = PASS_BYTES

    def add(self, weight: torch.Tensor) -> None:
        """Add a layer with the given weights to the pending layers."""
        self._waiting[weight.shape] += 1

    def can_wait(self, weight: torch.Tensor, rows: int) -> bool:
        """Return True if a layer may keep its plain weights for now, for inputs with either `rows` rows or one row."""
        return self.room <= 0 and self._equal(weight.shape, 1) and self._equal(weight.shape, rows)

    def remove(self, plain: torch.Tensor, packed: torch.Tensor) -> None:
        """Remove a layer from the pending layers. `plain` and `packed` are its weights before and after packing."""
        shape = plain.shape
        self.room -= plain.nbytes
        self._waiting[shape] -= 1
        if self._waiting[shape] <= 0:
            self._samples.pop(shape, None)
        elif plain is not packed:
            self._samples.setdefault(shape, (plain, packed))

    def _equal(self, shape: torch.Size, rows: int) -> bool:
        key = shape, rows, torch.get_num_threads()
        if key not in self._same:
            if (sample := self._samples.get(shape)) is None:
                return False
            self._same[key] = _equal_products(*sample, rows)
        return self._same[key]


def _equal_products(plain: torch.Tensor, packed: torch.Tensor, rows: int) -> bool:
    """Return True if plain and packed weights produce bit-identical results for a random input.

    If bf16 products are summed in a different order, only about one in ten thousand results differs (torch 2.15), which a single
    input can miss. Therefore, the rounding errors are compared too. They are computed in float32 by subtracting the results from
    the sums, so they reveal differences in the last bits.
    """
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, plain.shape[1], generator=random, dtype=torch.float32, device="cpu").to(plain.dtype)
    product = torch.ops.mkldnn._linear_pointwise
    first, second = (product(x, weight, None, "none", [], "") for weight in (plain, packed))
    remainders = (product.binary(x, -first, weight, None, "add") for weight in (plain, packed))
    return torch.equal(first, second) and torch.equal(*remainders)


class PackedLinear(nn.Module):
    """A CPU linear layer with weights stored in the packed matmul layout. The plain weights are freed.

    Args:
        layer: The layer to replace.
        packing: A packing schedule. With a schedule, all but small layers start with their plain weights. A layer packs its weights
            when it is called with few rows and the schedule no longer allows it to wait, unless memory is low. None packs the
            weights immediately.
    """

    def __init__(self, layer: nn.Linear, packing: Packing | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        self._packing = packing
        # The weights, and whether they are final. Both are stored in one attribute because several threads may run the model.
        if packing is not None and layer.weight.numel() > SMALL_WEIGHT:
            self._weights_and_final = layer.weight.detach(), False
            packing.add(layer.weight)
        else:
            self._weights_and_final = _packed(layer.weight), True

    @property
    def nbytes(self) -> int:
        """Memory used in addition to the layer's parameters, in bytes."""
        return self._weights_and_final[0].numel() * self._weights_and_final[0].element_size()

    @property
    def waits(self) -> bool:
        """Whether the layer still uses plain weights that will be packed later."""
        return not self._weights_and_final[1]

    def weights_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return the plain or packed weights to multiply with `x` (`[..., in]`), packing them first if necessary."""
        weights, final = self._weights_and_final
        rows = x.numel() // self.in_features
        if final or rows >= MANY_ROWS or self._packing.can_wait(weights, rows):
            return weights
        return self.pack()

    def pack(self) -> torch.Tensor:
        """Pack and return the weights, unless they are already final. If memory is low, the plain weights are kept."""
        plain, final = self._weights_and_final
        if final:
            return plain
        start = time.perf_counter()
        weights = plain
        available = Device("cpu").available_memory()
        if available is None or available > self.nbytes + SPARE_BYTES:
            weights = _packed(plain)
        self._weights_and_final = weights, True
        self._packing.remove(plain, weights)
        self._packing.seconds += time.perf_counter() - start
        return weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weights_for(x), self.bias, "none", [], "")


class PackedParts(nn.Module):
    """A large linear layer whose weights are packed in parts, so packing doesn't noticeably delay any token.

    All parts have the same shape, so one part serves as the sample for all others.
    """

    def __init__(self, layer: nn.Linear, packing: Packing):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        biases = [None] * PARTS
        if layer.bias is not None:
            biases = [_frozen(bias) for bias in layer.bias.chunk(PARTS)]
        self.parts = nn.ModuleList()
        for weight, bias in zip(layer.weight.chunk(PARTS), biases, strict=False):
            part = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            part.weight = _frozen(weight)
            part.bias = bias
            self.parts.append(PackedLinear(part, packing))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def _frozen(data: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(data.detach(), requires_grad=False)


def _packed(weight: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(False):  # an inference tensor couldn't be used outside of inference mode later
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def by_row(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Apply a function to a few rows one by one, so that they don't depend on one another, or to many rows at once.

    With several threads, the last bit of an element can depend on the number of elements.
    """
    return function(x) if len(x) > FEW_ROWS else torch.cat([function(row) for row in x.split(1)])


def linear(
    layer: nn.Module,
    x: torch.Tensor,
    *,
    silu: bool = False,
    times: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `layer(x)`, followed by at most one fused operation.

    Args:
        layer: A module that maps `[..., in]` to `[..., out]`.
        x: `[..., in]`.
        silu: Apply SiLU to the result.
        times: Multiply the result by this tensor, `[..., out]`.
        plus: Add this tensor to the result, `[..., out]`.
    """
    if isinstance(layer, PackedLinear):
        if silu:
            return torch.ops.mkldnn._linear_pointwise(x, layer.weights_for(x), layer.bias, "swish", [], "")
        fused = torch.ops.mkldnn._linear_pointwise.binary
        if plus is not None:
            return fused(x, plus, layer.weights_for(x), layer.bias, "add")
        if times is not None:
            return fused(x, times, layer.weights_for(x), layer.bias, "mul")
        return layer(x)
    y = layer(x)
    if silu:
        return by_row(F.silu, y)
    if times is not None:
        return y * times
    if plus is not None:
        return y + plus
    return y


def weights_bytes(model: nn.Module) -> int:
    """Return the total in-memory size of the model's weights in bytes, whether packed, quantized, or plain.

    Weights shared by several layers are counted once.
    """
    inside = sum(getattr(module, "nbytes", 0) for module in model.modules())
    return inside + sum(weight.nbytes for weight in model.parameters())


def _replace_layers(model: nn.Module, packing: Packing | None) -> None:
    """Replace the linear layers in `model` with packed layers, one at a time so that plain weights are freed early."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if is_unhooked_linear(child) and Packing.supports(child.weight):
                large = packing is not None and child.weight.numel() > LARGE_WEIGHT
                form = PackedParts if large else PackedLinear
                setattr(parent, name, form(child, packing))


def shared_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module tree that shares the original's tensors.

    Replacing layers in the copy doesn't affect the original.
    """
    clone = copy(module)
    clone._modules = {name: shared_copy(child) for name, child in module.named_children()}
    return clone

"""Linear layers fused with the operation that follows; on the CPU, their weights are packed once.

PyTorch's plain CPU product rearranges the whole weight matrix in every call. Packed layers rearrange it once. That saves most
for products with a single row, which decoding consists of (`python -m experiments.speed.kernels`). With many rows the plain product
is as fast. Packing a weight takes as long as dozens of products with it save, so layers can wait for it: short answers go without,
and longer ones pack some layers with each token (`Packing`). The operators are those that torch.compile uses; where this torch has
none, layers are not packed.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend.devices import available_memory, is_host
from evoprune.backend.layers import is_unhooked_linear

# The number of rows that packing assumes. From a few dozen rows up, the arrangement does not depend on it.
ROWS = 512
# From so many rows on, plain and packed weights give the same numbers equally fast: above it products are not split along the
# inner dimension. Products with small weights are split nevertheless, but packing these takes no time.
MANY_ROWS = 256
SMALL_WEIGHT = 2**21
LARGE_WEIGHT = 2**28  # weights from here on wait in parts: an output layer
PARTS = 16
SPARE = 2**28  # bytes that packing leaves free
START_PASSES = 32  # passes, each for one token, before layers that can wait are packed
PASS_BYTES = 2**28  # of weights that are packed in each pass from then on, about: no word waits a second


class Packing:
    """Say when layers that wait are packed: by the number of passes, and while nothing is asked. Also what it took.

    A layer waits only as long as plain weights give the same numbers as packed ones: else an answer would depend on what was asked
    before. Whether they do is tried, because it depends on the dtype, the CPU and torch: the first layer of each shape does not
    wait, and both its forms are kept as a sample until all layers of its shape are packed.

    Attributes:
        seconds: that layers which share this have packed their weights.
        passes: through the language model for a next token, so far (`begin_pass`).
        room: bytes of weights that are still to be packed in this pass.
    """

    def __init__(self):
        self.seconds = 0.0
        self.passes = 0
        self.room = 0
        self._waiting: Counter[torch.Size] = Counter()  # layers, by the shape of their weights
        self._samples: dict[torch.Size, tuple[torch.Tensor, torch.Tensor]] = {}  # plain and packed weights
        self._same: dict[tuple, bool] = {}  # whether products of both are equal, by shape, rows and threads

    def begin_pass(self) -> None:
        """Says that a pass through the language model begins, for a next token."""
        self.passes += 1
        self.room = 0
        if self.passes > START_PASSES:
            self.room = PASS_BYTES

    def add(self, weight: torch.Tensor) -> None:
        """Says that a layer with these weights waits."""
        self._waiting[weight.shape] += 1

    def can_wait(self, weight: torch.Tensor, rows: int) -> bool:
        """Return whether a layer with these plain weights may still compute so many rows, and any single row, with them."""
        return self.room <= 0 and self._equal(weight.shape, 1) and self._equal(weight.shape, rows)

    def remove(self, plain: torch.Tensor, packed: torch.Tensor) -> None:
        """Says that a layer does not wait any more, and what its weights were and are."""
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
    """Return True if the plain and the packed form of the same weights give the same numbers on a random input.

    Sums in bf16 that were added up in another order differ in one number of some ten thousand, which a single input may miss (torch
    2.15). So the results are also compared after they were subtracted from the sums, which happens in float32: what is left shows
    the last bits.
    """
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, plain.shape[1], generator=random, dtype=torch.float32, device="cpu").to(plain.dtype)
    product = torch.ops.mkldnn._linear_pointwise
    first, second = (product(x, weight, None, "none", [], "") for weight in (plain, packed))
    left = (product.binary(x, -first, weight, None, "add") for weight in (plain, packed))
    return torch.equal(first, second) and torch.equal(*left)


class PackedLinear(nn.Module):
    """Multiply on the CPU with the weights of a linear layer in the order that the product reads. The plain weights are not kept.

    `packing`: None packs at once. Else a layer that is not small packs when it is called with few rows and can wait no longer,
    unless memory is short then. Until then it computes with the plain weights.
    """

    def __init__(self, layer: nn.Linear, packing: Packing | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        self._packing = packing
        # The weights, and whether they stay as they are. One attribute, because several threads may run a model.
        if packing is not None and layer.weight.numel() > SMALL_WEIGHT:
            self._held = layer.weight.detach(), False
            packing.add(layer.weight)
        else:
            self._held = _packed(layer.weight), True

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside its parameters."""
        return self._held[0].numel() * self._held[0].element_size()

    @property
    def waits(self) -> bool:
        """Whether the weights are still plain, to be packed later."""
        return not self._held[1]

    def weights_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return the weights, plain or packed, for a product with `x`, `[..., in]`."""
        weights, final = self._held
        rows = x.numel() // self.in_features
        if final or rows >= MANY_ROWS or self._packing.can_wait(weights, rows):
            return weights
        return self.pack()

    def pack(self) -> torch.Tensor:
        """Packs the weights now if they wait, unless memory is short, and returns them."""
        plain, final = self._held
        if final:
            return plain
        start = time.perf_counter()
        weights = plain
        available = available_memory("cpu")
        if available is None or available > self.nbytes + SPARE:
            weights = _packed(plain)
        self._held = weights, True
        self._packing.remove(plain, weights)
        self._packing.seconds += time.perf_counter() - start
        return weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weights_for(x), self.bias, "none", [], "")


class PackedParts(nn.Module):
    """Hold a large linear layer, whose weights wait in parts, so that packing all of them makes no word wait.

    The parts have the same shape, so one of them is the sample for the others.
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
    with torch.inference_mode(False):  # or it could not be used outside of it later
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def linear(
    layer: nn.Module,
    x: torch.Tensor,
    *,
    silu: bool = False,
    times: torch.Tensor | None = None,
    plus: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `layer(x)`, followed by at most one of: SiLU, a product with `times`, a sum with `plus` (`[..., out]`).

    `layer`: any module that maps `[..., in]` to `[..., out]`.
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
        return F.silu(y)
    if times is not None:
        return y * times
    if plus is not None:
        return y + plus
    return y


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights as the model holds them (packed, quantised). Shared weights count once."""
    inside = sum(getattr(module, "nbytes", 0) for module in model.modules())
    return inside + sum(weight.nbytes for weight in model.parameters())


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether packing works and saves time: on the CPU, in a dtype that it multiplies in hardware, with this torch."""
    if not is_host(weight.device) or weight.dtype not in (torch.float32, torch.bfloat16):
        return False
    if type(weight.data) is not torch.Tensor:  # of a library that holds it in fewer bits, as torchao does
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    operators = "_reorder_linear_weight", "_linear_pointwise"
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def pack(model: nn.Module, packing: Packing | None = None) -> None:
    """Replaces the linear layers inside `model` by packed ones, one at a time. The plain weights are freed.

    `packing`: None packs now; else all but small layers wait, and this says how long.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and can_pack(child.weight):
                large = packing is not None and child.weight.numel() > LARGE_WEIGHT
                form = PackedParts if large else PackedLinear
                setattr(parent, name, form(child, packing))
    if packing is not None:
        model.packing = packing


def waiting_layers(model: nn.Module) -> list[PackedLinear]:
    """Return the layers that wait to be packed."""
    return [module for module in model.modules() if isinstance(module, PackedLinear) and module.waits]


def pack_waiting(model: nn.Module) -> None:
    """Packs the layers that wait, all of them now: for measurements that are to compare nothing else."""
    for layer in waiting_layers(model):
        layer.pack()


@contextmanager
def packing_meanwhile(model: nn.Module) -> Iterator[None]:
    """Provide a context in which another thread packs the layers that wait, while this thread waits for someone.

    It ends after the layer that is being packed then; the others go on waiting.
    """
    layers = waiting_layers(model)
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


def begin_pass(model: nn.Module) -> None:
    """Says that a pass through a language model begins, for a next token: layers that wait are packed by the number of these."""
    packing = getattr(model, "packing", None)
    if packing is not None:
        packing.begin_pass()


def packed_copy(module: nn.Module) -> nn.Module:
    """Return a copy of `module` in which linear layers are packed; it shares everything else, and nothing changes in `module`."""
    return shared_copy(module, lambda layer: PackedLinear(layer) if packs(layer) else None)


def shared_copy(module: nn.Module, replace: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """Return a copy of a tree of modules on the same weights. `replace`: what stands for a module in it; None for a copy."""
    if (replacement := replace(module)) is not None:
        return replacement
    clone = copy(module)
    clone._modules = {name: child and shared_copy(child, replace) for name, child in module.named_children()}
    return clone


def packs(module: nn.Module) -> bool:
    """Return whether `packed_copy` packs this module."""
    return is_unhooked_linear(module) and can_pack(module.weight)

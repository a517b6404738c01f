"""CPU linear layers with 8-bit and 4-bit weights, which save memory and speed up products on CPUs without bf16.

int8 weights have one scale per output feature, and inputs have one scale per row. Rows are rounded independently, so a row's result
doesn't depend on the other rows in the batch. Products use integers and are exact. If a few input channels are much larger than the
others, rounding all channels with a common scale would lose precision in the smaller ones. Therefore, large channels are computed
in float32 (LLM.int8(), arXiv 2208.07339, section 3). `Unquantized` detects them once.

With the compiled library, the language model uses another product when it decodes, which quantizes only the weights
(`RowMajorInt8Linear`). A prompt takes longer to read, and each token of the answer takes less time.

int4 weights are used only in the language model; the vision tower uses int8. They are unpacked to 8 bits for each prompt
(`RowMajorInt4Linear`). This requires the compiled library, because PyTorch's products would be slower than those of int8.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import nn

from evoprune.backend.cpu import compiled, four_bits
from evoprune.backend.cpu.experts import MATRICES, QuantizedExperts
from evoprune.backend.cpu.linear import FEW_ROWS, Packing, role

PIECE_WEIGHTS = 2**20  # approximate number of weights to quantize at a time, so they fit in a cache
PIECE_FEATURES = 4096  # number of output features to compute at a time with row-major weights
MANY_ROWS = 512  # without VNNI, packing row-major weights for a single product of at least this many rows saves time
ROW_STEP = 32  # both dimensions of row-major weights are multiples of this, as the compiled library requires
STEP_ROWS = 64  # row counts are multiples of this, because kernels process rows in steps that divide it
LARGE = 4.0  # a channel is considered large if it exceeds the median channel by this factor
MAX_LARGE = 1 / 32  # maximum fraction of channels treated as large
LANGUAGE = "model.language_model.", "lm_head", "mtp."  # name prefixes of the language model's layers
Weights = dict[str, torch.Tensor]  # the tensors of a quantized layer on the CPU, by name


class Bytes:
    """Quantizes rows to 8 bits. Layers with the same input share an instance, which caches its most recent result."""

    def __init__(self):
        self._last: tuple = (None, None, None)

    def __call__(self, x: torch.Tensor, large: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize the rows of `x` to 8 bits.

        Args:
            x: `[..., K]`.
            large: int64, the large channels, which are zeroed before rounding.

        Returns:
            The rows as uint8 `[R, K]`, where `levels() + 1` represents zero; the step size of each row, float32 `[R, 1]`; and the
            large channels, float32 `[R, m]`.
        """
        known, known_large, rounded = self._last  # read once, because another thread may be running the same model
        if x is known and large is known_large:
            return rounded
        rows = x.reshape(-1, x.shape[-1]).float()
        rest = rows
        room = None  # if a copy is made, it is reused for the result
        if len(large):
            rest = rows.index_fill(1, large, 0.0)
            room = rest
        step = _largest_per_row(rest)[:, None].clamp_(min=1e-30) / levels()
        middle = torch.full((), levels() + 1.5, dtype=torch.float32, device="cpu")  # adding 0.5 makes truncation round
        whole = torch.addcmul(middle, rest, 1 / step, out=room).to(torch.uint8)
        rounded = whole, step, rows[:, large]
        self._last = x, large, rounded
        return rounded


class Matrix(Protocol):
    """A weight matrix, `[out, in]`: a tensor, or an object that reads its rows when it is split."""

    @property
    def shape(self) -> Sequence[int]: ...

    def split(self, rows: int, /) -> Iterable[torch.Tensor]: ...


def int8_weights(weight: Matrix, large: torch.Tensor | None = None, memory: torch.Tensor | None = None) -> Weights:
    """Quantize a linear layer's weights on the CPU, and return the tensors required by `Int8Linear`.

    Args:
        weight: The weights to quantize.
        large: int64, the input channels to compute in float32.
        memory: int8, a buffer that stores `whole` if it is large enough. The next call with the same buffer overwrites it.

    Returns:
        `whole`, int8 `[out, in]`; the `scale` and `sum` of each row of `whole`, float32 `[out]`; `large`; and `wide`, float32 `[m,
        out]`, the weights of the large channels.
    """
    if large is None:
        large = torch.zeros(0, dtype=torch.int64, device="cpu")
    count = math.prod(weight.shape)
    if memory is None or len(memory) < count:
        memory = torch.empty(count, dtype=torch.int8, device="cpu")
    whole = memory[:count].view(*weight.shape)
    scales = []
    sums = []
    wide = []
    for rows, place in zip(_pieces(weight), _pieces(whole), strict=True):
        rows = rows.to(torch.float32, copy=True)
        wide.append(rows[:, large])
        rows[:, large] = 0.0
        scales.append(_largest_per_row(rows).clamp_(min=1e-12) / 127)
        rows.div_(scales[-1][:, None]).round_()
        sums.append(rows.sum(1))  # exact: whole numbers below 2^24
        place.copy_(rows)
    scale = torch.cat(scales)
    return {"whole": whole, "scale": scale, "sum": torch.cat(sums), "large": large, "wide": _transposed(wide)}


class Int8Linear(nn.Module):
    """A linear layer that multiplies 8-bit integers.

    Args:
        weights: The result of `int8_weights`.
        shape: The number of output features and the number of input features.
        bias: `[out]`, or None.
        to_bytes: Quantizes the input. Layers with the same input share an instance, so that the input is quantized once.
    """

    def __init__(
        self, weights: Weights, shape: Sequence[int], bias: torch.Tensor | None = None, to_bytes: Bytes | None = None
    ):
        super().__init__()
        self.out_features, self.in_features = shape
        self.to_bytes = to_bytes or Bytes()
        self.bias = None if bias is None else bias.detach().float()
        self.large = weights["large"]
        self.wide = weights["wide"]
        self.scale = weights["scale"]
        self._arrange(weights)

    @property
    def nbytes(self) -> int:
        """Memory used in addition to the layer's parameters and submodules, in bytes."""
        return self.packed.numel() + 12 * self.out_features + self.wide.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole, step, wide = self.to_bytes(x, self.large)
        y = self._product(whole)
        if self.bias is None:
            y.mul_(step)
        else:
            torch.addcmul(self.bias, y, step, out=y)
        _add_large(y, wide, self.wide)
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _arrange(self, weights: Weights) -> None:
        """Keep the weights in the layout that `_product` requires."""
        self.packed = torch.ops.onednn.qlinear_prepack(weights["whole"], None)
        self.zero = torch.zeros(self.out_features, dtype=torch.int32, device="cpu")
        # Bytes are offset by `levels() + 1`. This term subtracts the offset's contribution to the product.
        self.offset = (weights["sum"].double() * self.scale.double() * -(levels() + 1)).float()

    def _product(self, whole: torch.Tensor) -> torch.Tensor:
        """Multiply quantized rows by the weights without applying the rows' step sizes. Returns float32 `[R, out]`."""
        return _product(whole, self.packed, self.scale, self.zero, self.offset)


class RowMajorInt8Linear(Int8Linear):
    """An `Int8Linear` for the language model, which uses the compiled library.

    The weights stay as they are stored. During decoding, the layer uses the library's product, which is faster for a single row
    than oneDNN's, and doesn't quantize the inputs. During prefill, the layer computes the same as `Int8Linear`: the products of
    integers are exact, so neither the number of rows nor the way they are computed matters.
    """

    @staticmethod
    def suits(shape: Sequence[int]) -> bool:
        """Return True if this class supports the given weight shape on this CPU."""
        if compiled.library() is None or any(size % ROW_STEP for size in shape):
            return False
        return _has_row_major_products()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not role.decodes:
            return super().forward(x)
        if x.dim() != 2:
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)
        return self.structure()(x).to(x.dtype)

    def structure(self) -> compiled.Linear:
        """Return the layer for the compiled library."""
        tensors = self.packed, self._row_scale, self.bias, self.wide, self.large
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return compiled.Linear(*addresses, len(self.large), self.in_features, self.out_features)

    def _arrange(self, weights: Weights) -> None:
        self.packed = weights["whole"]

    def _product(self, whole: torch.Tensor) -> torch.Tensor:
        return _row_major_product(self._weights, whole, self.scale)

    @property
    def _row_scale(self) -> torch.Tensor | None:
        """The scale of each row of `packed`, or None if `packed` contains the scales."""
        return self.scale

    def _weights(self, first: int, last: int) -> torch.Tensor:
        """Return the 8-bit weights of some output features, int8 `[last - first, in]`."""
        return self.packed[first:last]


class RowMajorInt4Linear(RowMajorInt8Linear):
    """A `RowMajorInt8Linear` that keeps its weights in 4 bits, and unpacks them to 8 bits for each prompt."""

    def _arrange(self, weights: Weights) -> None:
        self.packed = weights["packed"]

    @property
    def _row_scale(self) -> None:
        return None

    def _weights(self, first: int, last: int) -> torch.Tensor:
        return compiled.unpack(self.packed[first:last], self.scale[first:last], self.in_features)


def _add_large(y: torch.Tensor, large: torch.Tensor, wide: torch.Tensor) -> None:
    """Add the product of the large channels, `[R, m]`, and their weights, `[m, out]`, to `y`, `[R, out]`.

    A few rows are multiplied one by one, so that they don't depend on one another.
    """
    if len(wide):
        step = 1 if len(y) <= FEW_ROWS else len(y)
        for some, rows in zip(y.split(step), large.split(step), strict=True):
            some.addmm_(rows, wide)


def _row_major_product(
    weights: Callable[[int, int], torch.Tensor], rows: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Multiply the rows that `Bytes` returns, `[R, K]`, by row-major weights. Returns float32 `[R, out]`.

    With VNNI, oneDNN takes the weights as they are. Without VNNI, it takes the weights as its input, and the rows, which are fewer,
    as its weights. If there are many rows, the weights are packed, and the packed form is discarded after the product.

    Args:
        weights: Returns the weights of the output features in a range, int8 `[last - first, K]`.
        scale: The scale of each output feature, float32 `[out]`.
    """
    features = len(scale)
    if levels() < 127 and len(rows) >= MANY_ROWS:
        zeros = torch.zeros(features, dtype=torch.int32, device="cpu")
        packed = torch.ops.onednn.qlinear_prepack(weights(0, features), None)
        return _product(rows, packed, scale, zeros, None, levels() + 1)
    y = torch.empty(len(rows), features, dtype=torch.float32, device="cpu")
    rows = (rows - (levels() + 1)).view(torch.int8)
    multiply = _swapped_product(rows) if levels() < 127 else lambda whole: torch._int_mm(rows, whole.T)
    for first in range(0, features, PIECE_FEATURES):
        last = min(first + PIECE_FEATURES, features)
        torch.mul(multiply(weights(first, last)), scale[first:last], out=y[:, first:last])
    return y


def _swapped_product(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that multiplies `rows`, int8 `[R, K]`, by weights, int8 `[features, K]`."""
    count = len(rows)
    if count == 1:  # oneDNN's product with a single column is not exact on CPUs with AVX512 but without VNNI
        rows = rows.expand(2, -1).contiguous()
    packed = torch.ops.onednn.qlinear_prepack(rows, None)
    ones = torch.ones(len(rows), dtype=torch.float32, device="cpu")
    zeros = torch.zeros(len(rows), dtype=torch.int32, device="cpu")
    return lambda whole: _product(whole, packed, ones, zeros, None)[:, :count].T


@lru_cache
def _has_row_major_products() -> bool:
    """Return True if torch has fast products of row-major weights for this CPU, and they are exact."""
    if levels() == 127 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False  # with VNNI, but without AVX512, `_int_mm` is a plain loop
    random = torch.Generator().manual_seed(0)
    ones = torch.ones(64, dtype=torch.float32, device="cpu")
    largest = torch.full((64, 64), 127, dtype=torch.int8, device="cpu")
    mixed = torch.randint(-127, 128, (64, 64), generator=random, dtype=torch.int8, device="cpu")
    for weights in (largest, -largest, mixed):
        for count in (1, 33, MANY_ROWS):
            rows = torch.randint(1, 2 * levels() + 2, (count, 64), generator=random, dtype=torch.uint8, device="cpu")
            rows[0] = 2 * levels() + 1
            try:
                y = _row_major_product(lambda first, last, weights=weights: weights[first:last], rows, ones)
            except RuntimeError:  # this version of PyTorch takes no signed inputs
                return False
            if not torch.equal(y.double(), (rows.double() - (levels() + 1)) @ weights.double().T):
                return False
    return True


def _product(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, offset, x_zero: int = 0
) -> torch.Tensor:
    output_args = 1.0, 0, torch.float32, "none", [], ""
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, x_zero, packed, scale, zero, offset, *output_args)


def row_major_int4_weights(weight: Matrix, large: torch.Tensor) -> Weights:
    """Quantize a layer's weights for `RowMajorInt4Linear`.

    Returns:
        `packed` and `scale`, as returned by `four_bits.pack`; `large`; and `wide`, float32 `[m, out]`, the weights of the large
        channels, which are zero in `packed`.
    """
    wide = []
    pieces = []
    for rows in _pieces(weight):
        rows = rows.float()
        wide.append(rows[:, large])
        pieces.append(four_bits.pack(rows.index_fill(1, large, 0.0)))
    packed, scale = (torch.cat(each) for each in zip(*pieces, strict=True))
    return {"packed": packed, "scale": scale, "large": large, "wide": _transposed(wide)}


def experts_weights(matrices: Mapping[str, torch.Tensor], kind: str) -> Weights:
    """Quantize the weights of a layer's experts on the CPU, and return the tensors required by `QuantizedExperts`.

    Args:
        matrices: The matrices, `[experts, out, in]`, by name.
        kind: "int8" or "int4". Weights whose sizes the compiled library doesn't support always get 8 bits.

    Returns:
        For each matrix NAME, the weights as `NAME`, int8 `[experts, out, in]` or uint8 `[experts, out, bytes]`, and the scales of
        their rows as `NAME_scale`, float32 `[experts, out]`.
    """
    suited = all(RowMajorInt8Linear.suits(matrix.shape[1:]) for matrix in matrices.values())
    made = {}
    for name, matrix in matrices.items():
        for number, weight in enumerate(matrix):
            if kind == "int4" and suited:
                found = row_major_int4_weights(weight, torch.zeros(0, dtype=torch.int64, device="cpu"))
                whole = found["packed"]
            else:
                found = int8_weights(weight)
                whole = found["whole"]
            if (
                not number
            ):  # the result is allocated once, because joining the experts later would need twice the memory
                made[name] = whole.new_empty(len(matrix), *whole.shape)
                made[f"{name}_scale"] = found["scale"].new_empty(len(matrix), len(whole))
            made[name][number], made[f"{name}_scale"][number] = whole, found["scale"]
    return made


def _transposed(columns: list[torch.Tensor]) -> torch.Tensor:
    """Return the weights of some input channels, float32 `[m, out]`, given pieces of them as `[rows, m]`."""
    # With a single channel, `contiguous()` would keep the strides of the transpose, and the product would run a different kernel.
    return torch.cat(columns).T.clone(memory_format=torch.contiguous_format)


def _largest_per_row(rows: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value in each row, without copying the rows."""
    return torch.maximum(rows.amax(1), -rows.amin(1))


def _pieces(weight: Matrix) -> Iterable[torch.Tensor]:
    return weight.split(max(1, PIECE_WEIGHTS // weight.shape[1] // STEP_ROWS) * STEP_ROWS)


def large_channels(x: torch.Tensor) -> torch.Tensor:
    """Return the channels of `x` (`[..., K]`) that exceed `LARGE` times the median channel, int64, ascending.

    At most a fraction of `MAX_LARGE` of all channels is returned. If more channels exceed the threshold, only the largest are
    returned.
    """
    size = x.reshape(-1, x.shape[-1]).float().abs().amax(0)
    max_count = int(len(size) * MAX_LARGE)
    largest = size.topk(max_count).indices if max_count else size[:0].long()
    return largest[size[largest] > LARGE * size.median()].sort().values


@lru_cache
def levels() -> int:
    """Return the number of rounding levels on either side of zero: 127, or 63 on CPUs without VNNI.

    CPUs without these dot-product instructions add two products in 16 bits. The sum of two products of 127 and 127 fits in 16 bits,
    but the sum of two products of 255 and 127 overflows.
    """
    return 127 if has_exact_products(255) else 63


@lru_cache
def has_exact_products(largest: int) -> bool:
    """Return True if this CPU computes matrix products exactly for inputs up to `largest` and weights of 127."""
    scale = torch.ones(64, dtype=torch.float32, device="cpu")
    if not Packing.supports(scale) or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    zero = torch.zeros(64, dtype=torch.int32, device="cpu")
    bytes_ = torch.full((2, 64), largest, dtype=torch.uint8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8, device="cpu"), None)
    return bool((_product(bytes_, packed, scale, zero, None) == 64 * largest * 127).all())


class Unquantized(nn.Module):
    """A placeholder for a linear layer until its first input reveals the large channels.

    On the first call, the placeholder passes the layer and the large channels to `quantize`, which replaces the placeholder with a
    quantized layer and returns it. The quantized layer then handles the current call.
    """

    def __init__(self, layer: nn.Linear, quantize: Callable[[nn.Linear, torch.Tensor], nn.Module]):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        # Wrapping the layer in a list keeps it from becoming a submodule.
        self._layer = [layer]
        self._quantize = quantize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        return self._quantize(layer, large_channels(x))(x)


class UnquantizedExperts(nn.Module):
    """A placeholder for a layer's experts, which are quantized when they are called for the first time."""

    def __init__(self, quantize: Callable[[], nn.Module]):
        super().__init__()
        self._quantize = quantize

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self._quantize()(*args)


def form_of(kind: str, path: str, shape: Sequence[int]) -> type[Int8Linear]:
    """Return the class for a linear layer, given the model's quantization type, the layer's name, and the shape of its weights."""
    if path.startswith(LANGUAGE) and RowMajorInt8Linear.suits(shape):
        return RowMajorInt4Linear if kind == "int4" else RowMajorInt8Linear
    return Int8Linear


class Layers:
    """Replaces the linear layers of a model with quantized layers, one by one. `forms` comes from `Quantization.layers`."""

    def __init__(
        self,
        model: nn.Module,
        forms: dict[str, type[Int8Linear | QuantizedExperts]],
        progress: Callable[[int, int], None] | None,
    ):
        self.forms = forms
        self.done = 0
        self._model = model
        self._progress = progress
        self._to_bytes = Bytes()
        self._large_channels = {}  # tensors of large channels, by module, number of input features, and channels

    def replace(self, path: str, layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self._model.get_submodule(parent), name, layer)

    def put(self, path: str, layer: nn.Module, weights: Weights) -> nn.Module:
        """Create a quantized layer from `weights`, replace `layer` with it in the model, and return it."""
        form = self.forms[path]
        if form is QuantizedExperts:
            return self._done(path, form(weights, {name: getattr(layer, name).shape for name in MATRICES}))
        shape = layer.out_features, layer.in_features
        # Layers in a module with the same large channels also have the same input. `to_bytes` compares both by identity.
        key = path.rpartition(".")[0], layer.in_features, tuple(weights["large"].tolist())
        weights = weights | {"large": self._large_channels.setdefault(key, weights["large"])}
        return self._done(path, form(weights, shape, layer.bias, self._to_bytes))

    def _done(self, path: str, quantized: nn.Module) -> nn.Module:
        self.replace(path, quantized)
        self.done += 1
        if self._progress:
            self._progress(self.done, len(self.forms))
        return quantized

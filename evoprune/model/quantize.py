"""8-bit and 4-bit linear layers for the CPU. Memory and cheap products are what CPUs without bf16 lack.

int8, tower and language model: one scale for each output feature of the weights, one for each row of the input. A row is rounded
by itself, so that results do not depend on which rows are computed together. Products run in integers and are exact. The few input
channels that are much larger than the others would take their precision: these are computed in float32 (LLM.int8(), arXiv
2208.07339, section 3). Which they are is found once, by `Unquantised`.
int4: a scale and a zero for every 32 weights of the language model, by PyTorch's own kernel, where it decodes; int8 for the rest.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial

import torch
from torch import nn

from evoprune.errors import UsageError
from evoprune.model.linear import can_pack
from evoprune.model.machine import cool
from evoprune.model.precision import check_quantize

GROUP = 32  # int4 weights that share a scale
PIECE = 2**20  # weights quantised at a time, about: they fit into a cache
STEP = 64  # rows, by which pieces are cut: kernels arrange rows in steps that divide it
LARGE = 4.0  # channels are large above so many times the median of all
MOST_LARGE = 1 / 32  # share of the channels that may be


class Bytes:
    """Rounds rows to bytes. Layers with the same input share one, and its last result."""

    def __init__(self):
        self._last: tuple = (None, None, None)

    def __call__(self, x: torch.Tensor, large: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rounds the rows of `x`, `[..., K]`, in which the channels `large` (int64) count as 0.

        Returns uint8 `[R, K]`, with `levels() + 1` for zero; the step of each row, float32 `[R, 1]`; and the large
        channels, float32 `[R, m]`.
        """
        known, known_large, made = self._last  # read once: another thread may run the same model
        if x is known and large is known_large:
            return made
        rows = x.reshape(-1, x.shape[-1]).float()
        rest = rows.index_fill(1, large, 0.0) if len(large) else rows
        step = _largest(rest)[:, None].clamp_(min=1e-30) / levels()
        whole = torch.mul(rest, 1 / step).add_(levels() + 1.5).to(torch.uint8)  # truncation after adding 0.5 rounds
        made = whole, step, rows[:, large]
        self._last = x, large, made
        return made


class Int8Linear(nn.Module):
    """`x @ W.T + bias` in bytes.

    Args:
        layer: what to quantise, on the CPU.
        large: int64, the input channels that are computed in float32; None for none.
        to_bytes: shared with the layers that read the same input.
    """

    def __init__(self, layer: nn.Linear, large: torch.Tensor | None = None, to_bytes: Bytes | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.large = torch.zeros(0, dtype=torch.int64, device="cpu") if large is None else large
        self.to_bytes = to_bytes or Bytes()
        self.bias = None if layer.bias is None else layer.bias.float()
        # `[m, out]`: the weights of the large channels.
        self.wide = layer.weight[:, self.large].float().T.contiguous() if len(self.large) else None
        scales, sums = [], []
        whole = torch.empty(self.out_features, self.in_features, dtype=torch.int8, device="cpu")
        for rows, place in zip(_pieces(layer.weight), _pieces(whole), strict=True):
            rows = rows.to(torch.float32, copy=True)
            rows[:, self.large] = 0.0
            scales.append(_largest(rows).clamp_(min=1e-12) / 127)
            rows.div_(scales[-1][:, None]).round_()
            sums.append(rows.sum(1))  # exact: whole numbers below 2^24
            place.copy_(rows)
        self.scale = torch.cat(scales)
        self.packed = torch.ops.onednn.qlinear_prepack(whole, None)
        self.zero = torch.zeros(self.out_features, dtype=torch.int32, device="cpu")
        # Bytes are offset by `levels() + 1`. This takes its contribution to the product off again.
        self.offset = (torch.cat(sums).double() * self.scale.double() * -(levels() + 1)).float()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside parameters and other modules."""
        wide = 0 if self.wide is None else self.wide.nbytes
        return self.packed.numel() + 12 * self.out_features + wide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole, step, wide = self.to_bytes(x, self.large)
        y = torch.ops.onednn.qlinear_pointwise(
            whole, 1.0, 0, self.packed, self.scale, self.zero, self.offset, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(step) if self.bias is None else torch.addcmul(self.bias, y, step)
        if self.wide is not None:
            y.addmm_(wide, self.wide)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


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


def _largest(rows: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of each row, without a copy of them."""
    return torch.maximum(rows.amax(1), -rows.amin(1))


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.split(max(1, PIECE // weight.shape[1] // STEP) * STEP)


def large_channels(x: torch.Tensor) -> torch.Tensor:
    """int64, ascending: the channels of `x` (`[..., K]`) that are more than `LARGE` times the median; the largest `MOST_LARGE`."""
    size = x.reshape(-1, x.shape[-1]).float().abs().amax(0)
    most = int(len(size) * MOST_LARGE)
    found = size.topk(most).indices if most else size[:0].long()
    return found[size[found] > LARGE * size.median()].sort().values


@lru_cache
def levels() -> int:
    """Steps on either side of zero to which a row is rounded: 127, or 63 where the CPU adds pairs of products in 16 bits.

    That is so without dot-product instructions (VNNI): two products of 127 and 127 still fit, two of 255 and 127 do not.
    """
    return 127 if _exact(255) else 63


@lru_cache
def _exact(largest: int) -> bool:
    """Whether products of bytes up to `largest` with 127 exist and are exact on this CPU."""
    scale = torch.ones(64, dtype=torch.float32, device="cpu")
    if not can_pack(scale) or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    zero = torch.zeros(64, dtype=torch.int32, device="cpu")
    bytes_ = torch.full((2, 64), largest, dtype=torch.uint8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8, device="cpu"), None)
    found = torch.ops.onednn.qlinear_pointwise(
        bytes_, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((found == 64 * largest * 127).all())


class Int4Linear(nn.Module):
    """`x @ W.T + bias` with int4 weights; arguments as `Int8Linear`."""

    def __init__(self, layer: nn.Linear, full: nn.Module | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.full, self.bias = full, layer.bias
        packed, scales = zip(*(self._pack(rows) for rows in _pieces(layer.weight)), strict=True)
        self.packed, self.scales = torch.cat(packed), torch.cat(scales, 1)

    @staticmethod
    def _pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows of a weight in the kernel's arrangement, and their scales and zeros `[groups, rows, 2]`."""
        # The kernel works in steps of 16 rows. Rows that are added here are cut off from the output.
        rows = nn.functional.pad(weight.float(), (0, 0, 0, -len(weight) % 16))
        groups = rows.view(len(rows), -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        # Rounded to the dtype in which the kernel reads them, before weights are expressed in them.
        scale = ((high - low) / 15).clamp_(min=1e-8).to(weight.dtype).float()
        middle = (low + 8 * scale).to(weight.dtype).float()  # the weight that the kernel's zero, 8, represents
        whole = ((groups - middle) / scale).add_(8).round_().clamp_(0, 15).to(torch.int32).flatten(1)
        scales = torch.cat([scale, middle], -1).transpose(0, 1).contiguous().to(weight.dtype)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1), scales

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside parameters and other modules."""
        return self.packed.nbytes + self.scales.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.full is not None and len(rows) > 1:
            return self.full(x)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.packed, GROUP, self.scales)
        y = y[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def check(kind: str, device: torch.device) -> None:
    """Check that a kind of quantisation works here.

    Raises UsageError: no such kind, or not on this device, with this PyTorch or this CPU.
    """
    check_quantize(kind)
    if kind == "none":
        return
    if device.type != "cpu":
        raise UsageError(f"quantize {kind} works on the CPU, not on {device}", "leave quantize out")
    if kind not in kinds(device):
        raise UsageError(f"this PyTorch has no exact {kind} products for this CPU", "leave quantize out")


def kinds(device: torch.device) -> list[str]:
    """The kinds of quantisation that work on a device, with this PyTorch and this CPU; without "none"."""
    if device.type != "cpu" or not _exact(127):
        return []
    return ["int8", "int4"] if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu") else ["int8"]


def places(model: nn.Module, kind: str) -> Iterator[tuple[str, str]]:
    """The linear layers that are quantised, by name, and what each becomes: "int8" or "int4"."""
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear:
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
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Quantises the linear layers of a model in place, each when its input is known.

    Args:
        model: with `model.visual`, `model.language_model` and `lm_head`.
        kind: "int8" or "int4".
        run: runs the model on some input, the same in every run; every linear layer is called.
        progress: called with the number of layers done and of all layers.

    Raises RuntimeError: a layer was not called.
    """
    every, to_bytes, known, done = dict(places(model, kind)), Bytes(), {}, []

    def become(path: str, layer: nn.Linear, large: torch.Tensor) -> nn.Module:
        parent, _, name = path.rpartition(".")
        # Layers of one module with the same channels have the same input: `to_bytes` knows it by the same object.
        large = known.setdefault((parent, layer.in_features, tuple(large.tolist())), large)
        made = Int8Linear(layer, large, to_bytes) if every[path] == "int8" or path != "lm_head" else None
        if every[path] == "int4":
            made = Int4Linear(layer, made)
        setattr(model.get_submodule(parent), name, made)
        done.append(path)
        if progress:
            progress(len(done), len(every))
        return made

    for path in every:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Unquantised(model.get_submodule(path), partial(become, path)))
    with torch.inference_mode():
        run(model)
    if len(done) < len(every):
        raise RuntimeError(f"{len(every) - len(done)} layers of the model were not called, so they are not quantised")

"""Weight-only quantisation of the language model. Decoding on a CPU reads every weight for every token, so it gets faster.

int8: one scale for each output feature. The product runs in integers, on the CPU's dot-product instructions. Only the weights
lose precision: activations become 16-bit integers, split into two bytes, which are two rows of the same product.
int4: a scale and a zero for every 32 weights, by PyTorch's own kernel.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import nn

from evoprune.errors import UsageError
from evoprune.model.linear import can_pack
from evoprune.model.precision import check_quantize

GROUP = 32  # int4 weights that share a scale
ROWS = 1024  # rows of a weight quantised at a time: they fit into a cache, and kernels arrange rows in steps that divide it


class Bytes:
    """Converts activations to 16-bit integers in two bytes. Layers with the same input share one, and its last result."""

    def __init__(self):
        self._last: tuple = (None, None)

    def __call__(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Converts rows `[R, K]`.

        Returns uint8 `[2R, K]`, all low bytes and then all high bytes, with 32,768 for zero; and the step of each row, float32
        `[R, 1]`.
        """
        known, made = self._last  # read once: another thread may run the same model
        if rows is known:
            return made
        step = torch.linalg.vector_norm(rows, float("inf"), 1, True, dtype=torch.float32).clamp_(min=1e-30) / 32767
        whole = (rows / step).add_(32768.5).to(torch.int32)  # truncation after adding 0.5 rounds; 1 to 65,535
        both = whole.view(torch.uint8).view(*rows.shape, 4)[..., :2].permute(2, 0, 1).reshape(-1, rows.shape[1])
        self._last = rows, (both, step)
        return both, step


class QuantizedLinear(nn.Module):
    """`x @ W.T + bias` with quantised weights.

    Args:
        layer: what to quantise, on the CPU.
        full: the same layer unquantised, used for prompts, that is for more than one row; None to use the quantised weights
            for them too.
    """

    def __init__(self, layer: nn.Linear, full: nn.Module | None = None):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.full = full

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if self.full is not None and len(rows) > 1:
            return self.full(x)
        return self.product(rows).reshape(*x.shape[:-1], -1)

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """Of rows `[R, in]`, with the quantised weights: `[R, out]`."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """Layers that read the same input share `to_bytes`."""

    def __init__(self, layer: nn.Linear, full: nn.Module | None = None, to_bytes: Bytes | None = None):
        super().__init__(layer, full)
        self.to_bytes = to_bytes or Bytes()
        self.bias = None if layer.bias is None else layer.bias.float()
        scales, wholes, sums = [], [], []
        for rows in layer.weight.split(ROWS):
            rows = rows.float()
            scales.append(rows.abs().amax(1).clamp_(min=1e-12) / 127)
            rows = (rows / scales[-1][:, None]).round_()
            sums.append(rows.sum(1))  # exact: whole numbers below 2^24
            wholes.append(rows.to(torch.int8))
        self.scale = torch.cat(scales)
        self.packed = torch.ops.onednn.qlinear_prepack(torch.cat(wholes), None)
        self.zero = torch.zeros(self.out_features, dtype=torch.int32, device="cpu")
        # Activations are offset by 32,768. This takes its contribution to low + 256 * high off again, the same amount from both.
        self.offset = (torch.cat(sums).double() * self.scale.double() * (-32768 / 257)).float()

    @property
    def nbytes(self) -> int:
        """Bytes that it holds beside parameters and other modules."""
        return self.packed.numel() + 12 * self.out_features

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        # In pieces: both bytes of many rows take much memory.
        pieces = [self._piece(piece) for piece in (rows.split(ROWS) if len(rows) > ROWS else [rows])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _piece(self, rows: torch.Tensor) -> torch.Tensor:
        both, step = self.to_bytes(rows)
        low, high = torch.ops.onednn.qlinear_pointwise(
            both, 1.0, 0, self.packed, self.scale, self.zero, self.offset, 1.0, 0, torch.float32, "none", [], ""
        ).view(2, len(rows), -1)
        y = low.add_(high, alpha=256).mul_(step)
        if self.bias is not None:
            y += self.bias
        return y.to(rows.dtype)


class Int4Linear(QuantizedLinear):
    def __init__(self, layer: nn.Linear, full: nn.Module | None = None):
        super().__init__(layer, full)
        self.bias = layer.bias
        packed, scales = zip(*(self._pack(rows) for rows in layer.weight.split(ROWS)), strict=True)
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

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.packed, GROUP, self.scales)
        y = y[:, : self.out_features]
        return y if self.bias is None else y + self.bias


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
    if device.type != "cpu":
        return []
    here = {"int8": _int8_is_exact(), "int4": hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")}
    return [kind for kind, works in here.items() if works]


@lru_cache
def _int8_is_exact() -> bool:
    """Whether products of bytes exist and are exact: CPUs without dot-product instructions (VNNI) clip sums of pairs to 16 bits."""
    scale = torch.ones(64, dtype=torch.float32, device="cpu")
    if not can_pack(scale) or not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    zero = torch.zeros(64, dtype=torch.int32, device="cpu")
    bytes_ = torch.full((2, 64), 255, dtype=torch.uint8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(torch.full((64, 64), 127, dtype=torch.int8, device="cpu"), None)
    found = torch.ops.onednn.qlinear_pointwise(
        bytes_, 1.0, 0, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((found == 64 * 255 * 127).all())


def _places(model: nn.Module) -> list[str]:
    """The layers that are quantised, by name."""
    return [
        path
        for path, layer in model.named_modules()
        if path.startswith(("model.language_model.", "lm_head")) and type(layer) is nn.Linear
        if layer.in_features % GROUP == 0
    ]


def saved_bytes(model: nn.Module, kind: str) -> int:
    """Bytes by which quantisation makes a model smaller. An output layer that is the input embedding too stays as well.

    Args:
        model: unquantised, perhaps on the meta device.
        kind: "int8" or "int4".
    """
    saved, embedding = 0, model.model.language_model.embed_tokens.weight
    for path in _places(model):
        weight = model.get_submodule(path).weight
        rows, columns = weight.shape
        row = columns + 16 if kind == "int8" else columns // 2 + columns // GROUP * 2 * weight.itemsize
        saved += (0 if weight is embedding else weight.nbytes) - rows * row
    return saved


def quantize(
    model: nn.Module, kind: str, full: nn.Module | None = None, progress: Callable[[int, int], None] | None = None
) -> None:
    """Quantises the linear layers of a language model and its output layer in place, a few at a time.

    Args:
        model: with `model.language_model` and `lm_head`.
        kind: "int8" or "int4".
        full: the same model unquantised, if its layers are kept for prompts: faster there, but takes more memory.
        progress: called with the number of layers done and of all layers.
    """
    to_bytes, places = Bytes(), _places(model)

    def make(path: str) -> None:
        layer = model.get_submodule(path)
        # The output layer is only called with one row.
        kept = None if full is None or path == "lm_head" else full.get_submodule(path)
        made = Int8Linear(layer, kept, to_bytes) if kind == "int8" else Int4Linear(layer, kept)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # much of the work runs on one thread
        for done, _ in enumerate(pool.map(make, places), 1):
            if progress:
                progress(done, len(places))

"""Validation of the selections that methods from other packages return.

The validation synchronizes the GPU, so it is skipped for this project's own methods.
"""

from collections.abc import Iterator

import torch

from evoprune.errors import PluginError
from evoprune.methods.types import Selection, arange_on

HOST = torch.device("cpu")  # `kept` may be on the CPU even if the rows are on a different device


def check_selection(name: str, selection: Selection, enough: bool, keep: int, units: int, device: torch.device) -> None:
    """Validate a selection returned by a method.

    Args:
        name: The method name for the error message.
        enough: Whether the number of selected units is valid.
        keep: The requested number of units.
        units: The number of units in the video.

    Raises:
        PluginError: If the selection is invalid.
    """
    if wrong := next(_faults(selection, enough, keep, units, device), None):
        raise PluginError(
            f"{name} returned {wrong}", "report it to the authors of that package, or choose another method"
        )


def _faults(selection: Selection, enough: bool, keep: int, units: int, device: torch.device) -> Iterator[str]:
    """Yield descriptions of the errors in a selection.

    Only the first error is reliable, because each check assumes that all previous checks have passed.
    """
    if not isinstance(selection, Selection):
        yield f"an object of class {type(selection).__name__} instead of a Selection"
    kept = selection.kept
    yield from _unlike("kept", kept, torch.int64, None, device)
    if not enough:
        yield f"{len(kept):,} units instead of {keep:,}"
    if not (kept[1:] > kept[:-1]).all():
        yield "units that are not in ascending order"
    if len(kept) and (kept[0] < 0 or kept[-1] >= units):
        yield f"units from {int(kept[0]):,} to {int(kept[-1]):,} of a video with units 0 to {units - 1:,}"
    count = len(kept)
    if (token := selection.unit_to_token) is not None:
        yield from _unlike("unit_to_token", token, torch.int64, units, device)
        own = arange_on(count, kept.device)
        if token.min() < -1 or token.max() >= count or not (token[kept].to(own) == own).all():
            yield "a unit_to_token whose entries are not indices of kept units (for a kept unit, its own) or -1"
    if selection.weight is not None:
        yield from _unlike("weight", selection.weight, torch.float32, units, device)
        if not (
            selection.weight.isfinite().all() and (selection.weight >= 0).all() and (selection.weight[kept] > 0).all()
        ):
            yield "a weight that is not finite, is below 0, or is 0 for a kept unit"
    if selection.means is not None:
        yield from _wrong_means(selection.means, count, units, device)
    if selection.size is not None:
        yield from _unlike("size", selection.size, torch.float32, count, device)
        if not (selection.size.isfinite().all() and (selection.size > 0).all()):
            yield "a size that is not a finite number above 0"


def _wrong_means(means: tuple[torch.Tensor, ...], count: int, units: int, device: torch.device) -> Iterator[str]:
    if not isinstance(means, tuple) or len(means) != 3:
        yield "means that are not three tensors"
    token, unit, weight = means
    for name, value, dtype in (
        ("tokens", token, torch.int64),
        ("units", unit, torch.int64),
        ("weights", weight, torch.float32),
    ):
        yield from _unlike(f"means, {name}", value, dtype, len(token), device)
    outside = (token < 0) | (token >= count) | (unit < 0) | (unit >= units)
    total = torch.zeros(count, dtype=torch.float32, device=token.device)
    if outside.any() or not (weight >= 0).all() or not (total.index_add_(0, token, weight) > 0).all():
        yield "means of units that do not exist, or with weights that are not numbers above 0"


def _unlike(
    name: str, value: torch.Tensor, dtype: torch.dtype, length: int | None, device: torch.device
) -> Iterator[str]:
    """Yield error descriptions if `value` is not a one-dimensional tensor with the given dtype, device, and length.

    If `length` is None, any length is accepted.
    """
    if not isinstance(value, torch.Tensor):
        yield f"an object of class {type(value).__name__} as {name} instead of a tensor"
    shape = "[K]" if length is None else f"[{length}]"
    wanted = str(dtype).removeprefix("torch.")
    if value.dtype != dtype or value.ndim != 1 or length not in (None, len(value)):
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        yield f"{name} as {given} instead of {wanted} {shape}"
    if value.device not in ((device, HOST) if name == "kept" else (device,)):
        yield f"{name} on {value.device}, but the tokens are on {device}"

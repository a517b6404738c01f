"""Runs a selector, and checks what one of another package returns. The checks synchronise; built-in selectors need none."""

from collections.abc import Iterator

import torch

from evoprune.backend.devices import exact_shapes
from evoprune.errors import PLUGINS, PluginError
from evoprune.methods.base import Selector
from evoprune.methods.budget import AUTO_LEAST, keep_count
from evoprune.methods.indices import ascending
from evoprune.methods.ranking import scaled, snap
from evoprune.methods.types import Selection, Tokens
from evoprune.model.numerics import without_autocast


def select(selector: Selector, tokens: Tokens, keep: int) -> Selection:
    """What `selector` selects. Raises PluginError: one of another package returned what its base class does not allow."""
    name, units = PLUGINS.get(type(selector)), len(tokens.owner)
    with without_autocast():
        # Rows are shared with other methods of an evaluation, and a stranger's code may write into what it gets.
        found = selector.select(tokens.copied() if name else tokens, keep)
    if name:
        count = getattr(getattr(found, "kept", None), "shape", (0,))[0]
        enough = bool(count) and (selector.suffices(count, keep, units) or not selector.exact)
        check_selection(name, found, enough, keep, units, tokens.rows.device)
    return found


def check_selection(name: str, found: Selection, enough: bool, keep: int, units: int, device: torch.device) -> None:
    """Raises PluginError: what the method `name` selected is wrong.

    `enough`: whether the number of units is one that the method may return where `keep` of `units` were asked for.
    """
    if wrong := next(_faults(found, enough, keep, units, device), None):
        raise PluginError(f"{name} returned {wrong}", "report it to that package's authors, or choose another method")


def _faults(found: Selection, enough: bool, keep: int, units: int, device: torch.device) -> Iterator[str]:
    """What is wrong with a selection, the first thing first: later ones are not meaningful."""
    if not isinstance(found, Selection):
        yield f"an object of class {type(found).__name__} where a Selection was asked for"
    kept = found.kept
    yield from _unlike("kept", kept, torch.int64, None, device)
    if not enough:
        yield f"{len(kept):,} units where {keep:,} were asked for"
    if not (kept[1:] > kept[:-1]).all():
        yield "units that are not in ascending order"
    if len(kept) and (kept[0] < 0 or kept[-1] >= units):
        yield f"units from {int(kept[0]):,} to {int(kept[-1]):,} of a video with units 0 to {units - 1:,}"
    count = len(kept)
    if found.owner is not None:
        yield from _unlike("owner", found.owner, torch.int64, units, device)
        own = ascending(count, kept.device)
        if found.owner.min() < -1 or found.owner.max() >= count or not (found.owner[kept].to(own) == own).all():
            yield "an owner that is not the index of a kept unit, of each kept unit its own, or -1"
    if found.weight is not None:
        yield from _unlike("weight", found.weight, torch.float32, units, device)
        if not (found.weight.isfinite().all() and (found.weight >= 0).all() and (found.weight[kept] > 0).all()):
            yield "a weight that is not a number, below 0, or 0 for a kept unit"
    if found.means is not None:
        yield from _wrong_means(found.means, count, units, device)
    if found.size is not None:
        yield from _unlike("size", found.size, torch.float32, count, device)
        if not (found.size.isfinite().all() and (found.size > 0).all()):
            yield "a size that is not a number above 0"


def _wrong_means(means: tuple[torch.Tensor, ...], count: int, units: int, device: torch.device) -> Iterator[str]:
    if not isinstance(means, tuple) or len(means) != 3:
        yield "means that are not three tensors"
    (token, unit, weight), dtypes = means, (torch.int64, torch.int64, torch.float32)
    for name, value, dtype in zip(("tokens", "units", "weights"), means, dtypes, strict=True):
        yield from _unlike(f"means, {name}", value, dtype, len(token), device)
    outside = (token < 0) | (token >= count) | (unit < 0) | (unit >= units)
    total = torch.zeros(count, dtype=torch.float32, device=token.device)
    if outside.any() or not (weight >= 0).all() or not (total.index_add_(0, token, weight) > 0).all():
        yield "means of units that do not exist, or with weights that are not numbers above 0"


def _unlike(
    name: str, value: torch.Tensor, dtype: torch.dtype, length: int | None, device: torch.device
) -> Iterator[str]:
    """How a tensor of a selection differs from what it must be: one dimension, `length` (None for any), dtype and device."""
    if not isinstance(value, torch.Tensor):
        yield f"an object of class {type(value).__name__} as {name} where a tensor was asked for"
    shape, wanted = "[K]" if length is None else f"[{length}]", str(dtype).removeprefix("torch.")
    if value.dtype != dtype or value.ndim != 1 or length not in (None, len(value)):
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        yield f"{name} as {given} where {wanted} {shape} was asked for"
    if value.device != device and not (name == "kept" and exact_shapes(value.device)):
        yield f"{name} on {value.device} where the tokens are on {device}"


def tokens_before_inflection(selector: Selector, tokens: Tokens, keep: int) -> int:
    """How many tokens `selector` keeps by the curve of its scores (arXiv 2409.01162): at most `keep`."""
    least = min(keep, keep_count(AUTO_LEAST, len(tokens.owner)))
    return min(keep, max(least, inflection(selector.scores(tokens))))


def inflection(scores: torch.Tensor) -> int:
    """How many of `scores` (float `[N]`) lie before the inflection point of the sorted curve; N if it has none."""
    curve = scaled(scores.float().sort(descending=True).values)
    line = 1 - ascending(len(curve), curve.device) / max(1, len(curve) - 1)
    depth = snap(line - curve)
    return int(depth.argmax()) if depth.max() > 0 and curve[0] > 0 else len(curve)

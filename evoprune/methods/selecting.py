"""Functions that run a selector, and choose the number of tokens from its scores."""

import torch

from evoprune.backend import snap
from evoprune.errors import call
from evoprune.methods.base import Selector
from evoprune.methods.budget import AUTO_LEAST, Budget
from evoprune.methods.types import Selection, Tokens, arange_on
from evoprune.model import without_autocast


def select(selector: Selector, tokens: Tokens, keep: int, inflection: bool = False) -> Selection:
    """Run `selector` and return its selection.

    Args:
        keep: The number of tokens to select.
        inflection: Whether to derive the number of tokens from the curve of the selector's scores, with `keep` as the maximum.

    Raises:
        PluginError: If a selector from another package fails or returns an invalid selection.
    """
    name = selector.package
    units = len(tokens.unit_to_row)
    if inflection:
        keep = tokens_before_inflection(selector, tokens, keep)
    with without_autocast():
        # Selectors from other packages may modify their arguments in place, but in an evaluation, other methods use the same rows.
        if name:
            tokens = tokens.copied()
        selection = call(name, selector.select, tokens, keep)
    if name:
        from evoprune.methods.checking import check_selection

        count = getattr(getattr(selection, "kept", None), "shape", (0,))[0]
        enough = bool(count) and (selector.suffices(count, keep, units) or not selector.exact)
        check_selection(name, selection, enough, keep, units, tokens.rows.device)
    return selection


def tokens_before_inflection(selector: Selector, tokens: Tokens, keep: int) -> int:
    """Derive the number of tokens to keep, up to `keep`, from the curve of the selector's scores (arXiv 2409.01162)."""
    min_keep = min(keep, Budget.count(AUTO_LEAST, len(tokens.unit_to_row)))
    return min(keep, max(min_keep, inflection_point(call(selector.package, selector.scores, tokens))))


def inflection_point(scores: torch.Tensor) -> int:
    """Return the number of scores before the inflection point of the sorted curve, or N if there is no such point.

    `scores` is float `[N]`. At the inflection point, the curve, scaled to the unit square, is farthest below the diagonal.
    """
    curve = scores.float().sort(descending=True).values
    height = curve[0] - curve[-1]
    curve = (curve - curve[-1]) / torch.where(height > 0, height, torch.ones_like(height))
    line = 1 - arange_on(len(curve), curve.device) / max(1, len(curve) - 1)
    depth = snap(line - curve)
    if depth.max() <= 0 or curve[0] <= 0:
        return len(curve)
    return int(depth.argmax())

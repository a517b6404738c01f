"""References in time, as the tower needs them: what one chunk of a video leaves for the next."""

from dataclasses import dataclass, replace

import torch

from evoprune.pruning.reference import References, scan
from evoprune.vision import devices
from evoprune.vision.layout import Geometry, TokenLayout, geometry, referring_layout
from evoprune.vision.preprocess import patch_means


@dataclass
class Past:
    """What the grids of earlier chunks leave for the next one, so much a place and layer, however long the video is.

    Attributes:
        references: what changes are measured against.
        row: int64 `[P]`, which of all rows stands for the reference of each place.
        seen: of each layer, keys and values of that row as they were there, `[P, 2, 4, heads, d]`.
    """

    references: References | None = None
    row: torch.Tensor | None = None
    seen: list[torch.Tensor] | None = None


def referring(
    geo: Geometry, chunk: torch.Tensor, done: int, block: int, threshold: float, past: Past
) -> tuple[TokenLayout, torch.Tensor]:
    """A layout in which what has not changed has its reference's row as owner, and what to refer to from now on.

    All of it is found on the CPU, so that counts are known before the tower runs.

    Args:
        chunk: patches of the grids from number `done` on.

    Returns:
        The layout; and int64 `[P]`, the unit of this chunk that is the reference of each place after it, -1 where it stays the one
        it was.
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        here = geometry(geo.height, geo.width, geo.side, "cpu")
        reuse, past.references = scan(patch_means(chunk.cpu(), geo.units), past.references, threshold)
        layout = referring_layout(here, reuse.grid - done, block)
        grid = past.references.grid - done
        last = torch.where(grid < 0, -1, grid * geo.units + torch.arange(geo.units))
    home, owner, last = (devices.uploaded(x, device) for x in (layout.home, layout.owner, last))
    return replace(layout, geometry=geo, home=home, owner=owner), last

"""Which grids of a video go through the tower together, known from their pixels.

A chunk is filled with whole blocks of grids until it has enough rows, for the tower's products want many, and its memory few.
Where units may refer to earlier grids, a block of a still picture has few rows. So blocks are looked at ahead of the tower, one
after another, and of each unit that needs no row only the number of its reference is kept.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from evoprune.model.sizes import PATCHES
from evoprune.pruning.reference import scan
from evoprune.vision import devices
from evoprune.vision.layout import Geometry, TokenLayout, full_layout, geometry, referring_layout, window_order
from evoprune.vision.preprocess import patch_means
from evoprune.vision.stopwatch import Stopwatch


@dataclass(frozen=True)
class Chunk:
    """Whole blocks of grids.

    Attributes:
        first: number of the first grid in the video. `grids`: how many.
        patches: `[R, 4, 1176]`, of the units that are rows, in window order.
        source: int64 `[grids, H*W]` on the CPU, the number of the grid whose row stands for each unit, its own if it has one; None
            without references, where every unit is a row.
    """

    first: int
    grids: int
    patches: torch.Tensor
    source: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.patches)

    def layout(self, geo: Geometry, block: int) -> tuple[TokenLayout, torch.Tensor | None]:
        """Where its rows are and whom they stand for, on torch's default device; found on the CPU where units refer to others.

        Returns:
            The layout; and int64 `[P]`, the unit of this chunk that is the reference of each place after it, -1 where it stays the
            one it was. None without references.
        """
        if self.source is None:
            return full_layout(geo, self.grids, block), None
        device = torch.get_default_device()
        with torch.device("cpu"):
            here = geometry(geo.height, geo.width, geo.side, "cpu")
            layout = referring_layout(here, self.source - self.first, block)
            grid = self.source[-1] - self.first
            last = torch.where(grid < 0, -1, grid * geo.units + torch.arange(geo.units))
        home, owner, last = (devices.uploaded(x, device) for x in (layout.home, layout.owner, last))
        return replace(layout, geometry=geo, home=home, owner=owner), last


def in_grids(patches: Iterable[torch.Tensor], rows_per_grid: int, grids: int) -> Iterator[torch.Tensor]:
    """Re-cuts a stream of patch rows into pieces of `grids` whole grids; the last may be shorter."""
    held, size = [], rows_per_grid * grids
    for piece in patches:
        if not len(piece):
            continue
        held.append(piece)
        while (have := sum(map(len, held))) >= size:
            joined = torch.cat(held) if len(held) > 1 else held[0]
            yield joined[:size]
            held = [joined[size:]] if have > size else []  # never an empty piece
    if held:
        yield torch.cat(held)


def in_chunks(
    patches: Iterable[torch.Tensor],
    geo: Geometry,
    grids: int,
    *,
    block: int,
    rows: int,
    threshold: float,
    dtype: torch.dtype,
    watch: Stopwatch,
    refresh: int = 0,
    even: list[torch.Tensor] | None = None,
) -> Iterator[Chunk]:
    """Cuts a video into chunks of `rows` rows or more, but so many by less than a block; the last may have fewer.

    A chunk also ends once it stands for `devices.SPARSE` times as many units. So what is held, of patches as of numbers, does not
    grow with the video; and nothing is looked at that is not needed to fill the chunk.

    Args:
        patches: pieces of `[n, 1176]` that add up to so many grids.
        block: grids of a block.
        threshold, refresh: of the method's references; no threshold, no references.
        dtype: of the patches that are kept.
        watch: measures what finding references takes.
        even: gets whether the grids are of one even colour each, until they are not; None if nobody asks.

    Raises:
        ValueError: `patches` do not add up to the grids.
    """
    step = block if threshold else -(-rows // (geo.units * block)) * block
    done, references, held = 0, None, []
    for piece in in_grids(patches, geo.units * PATCHES, step):
        count, rest = divmod(len(piece), geo.units * PATCHES)
        if rest or done + count > grids:
            raise ValueError(f"patches do not add up to {grids} grids of {geo.units} units")
        if even is not None and (not even or devices.static_shapes(piece.device) or even[-1]):
            even.append(_is_even(piece.view(count, -1, piece.shape[1])))
        source = None
        if threshold:
            with watch:
                reuse, references = scan(patch_means(piece.cpu(), geo.units), references, threshold, refresh)
                source = reuse.grid
        held.append(Chunk(done, count, _rows_of(piece, geo, done, count, source).to(dtype), source))
        done += count
        units = (done - held[0].first) * geo.units
        if sum(part.rows for part in held) >= rows or units >= devices.SPARSE * rows:
            yield _joined(held)
            held = []
    if done != grids:
        raise ValueError(f"patches end after {done} of {grids} grids")
    if held:
        yield _joined(held)


def _rows_of(patches: torch.Tensor, geo: Geometry, first: int, grids: int, source: torch.Tensor | None) -> torch.Tensor:
    """`[R, 4, 1176]`: the units of some grids that are rows, in window order."""
    with torch.device("cpu"):
        alive = None if source is None else source == torch.arange(first, first + grids)[:, None]
        home = window_order(geometry(geo.height, geo.width, geo.side, "cpu"), grids, alive)
    return patches.view(-1, PATCHES, patches.shape[1])[devices.uploaded(home, patches.device)]


def _joined(parts: list[Chunk]) -> Chunk:
    """Several as one; there are several only with references."""
    if len(parts) == 1:
        return parts[0]
    patches, source = torch.cat([part.patches for part in parts]), torch.cat([part.source for part in parts])
    return Chunk(parts[0].first, sum(part.grids for part in parts), patches, source)


def _is_even(grids: torch.Tensor) -> torch.Tensor:
    """Whether all patches of each grid `[T, patches, 1176]` are the same but for less than a level of 255; bool, no dimension."""
    return (grids.amax(1) - grids.amin(1)).max() < 1 / 255

"""Divides a video into chunks: whole frame pairs that go through the tower together.

A chunk has enough rows for efficient matrix products, and few enough to bound the memory. With reuse, a frame pair of a still
picture has few rows. So frame pairs are scanned one after another before the tower runs, and a unit that needs no row keeps
only the number of its reference.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import torch

from evoprune.backend import devices
from evoprune.methods.types import ascending
from evoprune.model.config import PATCHES
from evoprune.vision.layout import Geometry, TokenLayout, full_layout, referring_layout, window_order
from evoprune.vision.preprocess import CLIP, Normalisation, normalised, patch_means
from evoprune.vision.reuse import ReferenceBlocks, scan

# A chunk may represent this many times more units than it has rows. Attention reads a key for each row that represents its units.
SPARSE = 8


@dataclass(frozen=True)
class Chunk:
    """Neighbouring whole frame pairs."""

    first: int  # number of the first frame pair in the video
    pairs: int  # how many there are
    patches: torch.Tensor  # `[R, 4, values]`, of the units that are rows, in window order
    counts: tuple[int, ...]  # rows of each frame pair
    unit: torch.Tensor  # int64 `[R]`, the unit of each row, counted from the first of these frame pairs
    # int64 `[pairs, H*W]`, the number of the frame pair whose row represents each unit: its own if the unit is a row. None without
    # reuse, where every unit is a row.
    source: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.patches)

    def layout(self, geo: Geometry) -> TokenLayout:
        """The layout of the chunk's rows."""
        if self.source is None:
            return full_layout(geo, self.pairs)
        return referring_layout(geo, self.source - self.first, self.counts, self.unit)

    def latest(self, geo: Geometry) -> torch.Tensor:
        """int64 `[P]`, with reuse: the unit of this chunk that becomes the reference of each place, -1 where none does."""
        pair = self.source[-1] - self.first
        return torch.where(pair < 0, -1, pair * geo.units + ascending(geo.units, pair.device))


def in_pairs(patches: Iterable[torch.Tensor], rows_per_pair: int, pairs: int) -> Iterator[torch.Tensor]:
    """Cuts a stream of patches (pieces `[n, values]`) into pieces of `pairs` whole frame pairs; the last may be shorter."""
    held, size = [], rows_per_pair * pairs
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
    pairs: int,
    *,
    rows: int,
    threshold: float,
    dtype: torch.dtype,
    timer: devices.Timer,
    normal: Normalisation = CLIP,
    even: list[torch.Tensor] | None = None,
    references: list[ReferenceBlocks] | None = None,
) -> Iterator[Chunk]:
    """Cuts a video into chunks of `rows` rows, rounded up to whole frame pairs; the last may have fewer.

    Where reading waits, reuse compares as many frame pairs at a time as have `rows` units, and a chunk has all rows of these.
    A chunk also ends once it represents `SPARSE` * `rows` units, so its memory does not grow with the video.

    Args:
        patches: pieces `[n, values]` of `pairs` frame pairs, on the device of `geo`: pixels (uint8), or normalised by `normal`.
        threshold: of reuse, in levels of 255; 0 for no reuse. `timer` measures the search for references.
        even: a list to which each piece adds whether each of its frame pairs has one colour, until one has not; or None.
        references: of the segment before, if there is one; in the end those of this video. A unit that a row of the segment
            before represents has a negative `Chunk.source`.

    Raises ValueError: the number of patches does not fit `pairs` frame pairs.
    """
    pair, done, held, references = geo.units * PATCHES, 0, [], [] if references is None else references
    stream = iter(patches)
    ahead = list(islice(stream, 1))
    # The scan costs a CPU nothing more frame pair by frame pair. It waits for an accelerator once for each piece.
    here = bool(ahead) and devices.exact_shapes(ahead[0].device)
    at_once = 1 if threshold and here else -(-rows // geo.units)
    for piece in in_pairs(chain(iter(ahead), stream), pair, at_once):
        ahead.clear()  # frees its memory
        count, rest = divmod(len(piece), pair)
        if rest or done + count > pairs:
            raise ValueError(f"patches do not add up to {pairs} frame pairs of {geo.units} units")
        if even is not None and (not even or not here or even[-1]):
            of_pair = piece.view(count, -1, piece.shape[1])  # one colour: all patches are equal within one level of 255
            even.append((of_pair.amax(1) - of_pair.amin(1)).max() < 1 / 255)
        source, alive, counts = None, None, (geo.units,) * count
        if threshold:
            with timer:
                means = patch_means(piece, geo.units, *normal)
                source, seen = scan(means, references[0] if references else None, threshold)
                alive = source == done + ascending(count, source.device)[:, None]
                counts = tuple(alive.sum(1).tolist())
                references[:] = [seen]
        unit = window_order(geo, count, alive, sum(counts))
        rows_here = piece.view(-1, PATCHES, piece.shape[1])[unit]
        if rows_here.dtype == torch.uint8:
            rows_here = normalised(rows_here, *normal)
        held.append(Chunk(done, count, rows_here.to(dtype), counts, unit, source))
        done += count
        units = (done - held[0].first) * geo.units
        if sum(chunk.rows for chunk in held) >= rows or units >= SPARSE * rows:
            yield _joined(held)
            held = []
    if done != pairs:
        raise ValueError(f"patches end after {done} of {pairs} frame pairs")
    if held:
        yield _joined(held)


def _joined(chunks: list[Chunk]) -> Chunk:
    """Neighbouring chunks as one; there are several only with reuse."""
    first = chunks[0].first
    if len(chunks) == 1:
        return chunks[0]
    patches, source = torch.cat([chunk.patches for chunk in chunks]), torch.cat([chunk.source for chunk in chunks])
    counts = sum((chunk.counts for chunk in chunks), ())
    unit = torch.cat([chunk.unit + (chunk.first - first) * chunk.source.shape[1] for chunk in chunks])
    return Chunk(first, len(counts), patches, counts, unit, source)


@dataclass(frozen=True)
class Earlier:
    """What a segment of a longer video leaves to the next one, for each of P places: of the row that represents its last unit."""

    references: ReferenceBlocks  # its pixels
    keys_values: dict[int, torch.Tensor]  # by layer: `[P, 2, 4, heads, d]`
    features: torch.Tensor  # `[P, D]`, after the patch merger
    deepstack: torch.Tensor  # `[P, n, D]`


class CarriedKeys:
    """The latest encoded row of each of P places: its index among all rows, and its keys and values in each layer.

    At first the rows are those of the segment before (`earlier`), which have no index: -1.
    """

    def __init__(self, earlier: Earlier | None = None):
        self._number: torch.Tensor | None = None  # int64 [P]
        self._latest: torch.Tensor | None = None
        self.keys_values: dict[int, torch.Tensor] = {}  # by layer: [P, 2, 4, heads, d]
        if earlier is not None:
            places, self.keys_values = len(earlier.features), dict(earlier.keys_values)
            self._number = torch.full((places,), -1, dtype=torch.int64, device=earlier.features.device)

    def begin(self, latest: torch.Tensor | None) -> None:
        """Starts a chunk; `latest`: from `Chunk.latest`, None if no later chunk follows."""
        self._latest = latest

    def seen_by(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, layout: TokenLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[R or R + P, 4, heads, d]`: a chunk's in `layer`, and the references'; keeps those of later chunks."""
        earlier = self.keys_values.pop(layer, None)
        if earlier is None and self._latest is None:
            return k, v
        both = torch.stack([k, v], 1)
        if earlier is not None:
            both = torch.cat([both, earlier])
        if self._latest is not None:
            stays = len(k) + ascending(layout.geometry.units, k.device) if earlier is not None else 0
            self.keys_values[layer] = both[torch.where(self._latest < 0, stays, layout.owner[self._latest])]
        return both.unbind(1) if earlier is not None and layout.reach == "clip" else (k, v)

    def owners(self, owner: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """`owner` of the chunk's layout as indices among all rows, of which the chunk's have `number` (int64 `[R]`)."""
        if self._number is not None:
            number = torch.cat([number, self._number])
        owner = number[owner]
        if self._latest is not None:
            latest = owner[self._latest]
            self._number = latest if self._number is None else torch.where(self._latest < 0, self._number, latest)
        return owner

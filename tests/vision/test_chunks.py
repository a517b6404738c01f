"""Which grids go through the tower together."""

import pytest
import torch
from evoprune.vision.stopwatch import Stopwatch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning.reference import scan
from evoprune.vision import devices
from evoprune.vision.chunks import in_chunks, in_grids
from evoprune.vision.layout import geometry, referring_layout
from evoprune.vision.preprocess import patch_means
from tests.vision.clips import changes, clip
from tests.vision.tower import PATCH_WIDTH, random_patches


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_in_grids_recuts_without_loss(lengths, rows_per_grid, grids):
    stream = torch.arange(sum(lengths))
    pieces = list(in_grids(stream.split(lengths), rows_per_grid, grids))
    assert torch.equal(torch.cat([stream[:0], *pieces]), stream)
    assert all(len(piece) == rows_per_grid * grids for piece in pieces[:-1])
    assert all(len(piece) <= rows_per_grid * grids for piece in pieces)


def chunks_of(pieces, grid, block, rows, threshold, dtype=torch.float32):
    geo, watch = geometry(*grid[1:]), Stopwatch(torch.device("cpu"))
    return in_chunks(pieces, geo, grid[0], block=block, rows=rows, threshold=threshold, dtype=dtype, watch=watch)


def filled(rows: list[int], units: list[int], enough: int) -> list[list[int]]:
    """Numbers of the blocks of each chunk, from the rows and units of each: no more once there is enough of one or the other."""
    made = [[]]
    for b in range(len(rows)):
        made[-1].append(b)
        if sum(rows[i] for i in made[-1]) >= enough or sum(units[i] for i in made[-1]) >= devices.SPARSE * enough:
            made.append([])
    return made if made[-1] else made[:-1]


@settings(deadline=None, max_examples=100)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    block=st.integers(1, 4),
    rows=st.integers(1, 120),
    references=st.booleans(),
)
def test_a_chunk_is_as_many_blocks_as_it_takes(grid, share, seed, block, rows, references):
    count, height, width = grid
    patches, geo = clip(grid, changes(grid, share, seed), seed), geometry(height, width)
    made = list(chunks_of(patches.tensor_split(3), grid, block, rows, 5.0 if references else 0.0))
    source = torch.arange(count)[:, None].expand(-1, geo.units)
    if references:
        source = scan(patch_means(patches, geo.units), threshold=5.0)[0].grid
    layout = referring_layout(geo, source, block)
    units = [geo.units * min(block, count - first) for first in range(0, count, block)]
    expected = filled(list(layout.per_block), units, rows)
    assert [(c.first, c.grids) for c in made] == [
        (b[0] * block, sum(units[i] for i in b) // geo.units) for b in expected
    ]
    # Together they have the rows of the whole video, in its order, and nothing of any other unit.
    assert torch.equal(torch.cat([c.patches for c in made]), patches.view(-1, 4, PATCH_WIDTH)[layout.home])
    assert all(c.patches.untyped_storage().nbytes() == c.patches.nbytes for c in made)
    layouts = [c.layout(geo, block) for c in made]
    assert torch.equal(
        torch.cat([own.home + c.first * geo.units for c, (own, _) in zip(made, layouts, strict=True)]), layout.home
    )
    for c, (own, last) in zip(made, layouts, strict=True):
        assert own.rows == c.rows and own.grids == c.grids and own.block == block
        if not references:
            assert c.source is None and last is None
            continue
        assert torch.equal(c.source, source[c.first : c.first + c.grids])
        newest = (c.source[-1] - c.first).tolist()
        assert last.tolist() == [g * geo.units + place if g >= 0 else -1 for place, g in enumerate(newest)]


@pytest.mark.parametrize(("share", "grids"), [(0.0, {16}), (0.3, set(range(4, 16, 2))), (1.0, {2})])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_nothing_is_looked_at_that_is_not_needed(share, grids, threshold):
    """A tower that waits longer than it must stands still while frames are read."""
    grid, read, sizes = (40, 3, 5), [], []
    patches = clip(grid, changes(grid, share)).split(4 * 15)
    for chunk in chunks_of((read.append(1) or piece for piece in patches), grid, 2, 30, threshold):
        assert len(read) == chunk.first + chunk.grids
        sizes.append(chunk.grids)
    # A still clip is a few chunks, because units are bounded too; noise is a block at a time.
    assert sum(sizes) == 40 and len(sizes) > 2 and {*sizes[:-1]} <= (grids if threshold else {2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_patches_are_held_in_the_dtype_of_the_weights(dtype):
    grid = (3, 2, 2)
    for threshold in (0.0, 5.0):
        for chunk in chunks_of([random_patches(grid)], grid, 1, 4, threshold, dtype):
            assert chunk.patches.dtype == dtype

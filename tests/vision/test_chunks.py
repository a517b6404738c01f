"""Which frame pairs go through the tower together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.backend.devices import Timer
from evoprune.vision.layout import geometry
from evoprune.vision.preprocess import SPARSE, Patches, in_chunks, in_pairs, patch_means, scan
from tests.vision.clips import changes, clip
from tests.vision.tower import PATCH_WIDTH, random_patches, referring


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 4), st.integers(1, 3))
def test_pieces_are_cut_anew_without_loss(lengths, rows_per_pair, pairs):
    stream = torch.arange(sum(lengths))
    pieces = list(in_pairs(stream.split(lengths), rows_per_pair, pairs))
    assert torch.equal(torch.cat([stream[:0], *pieces]), stream)
    assert all(len(piece) == rows_per_pair * pairs for piece in pieces[:-1])
    assert all(len(piece) <= rows_per_pair * pairs for piece in pieces)


def chunks_of(pieces, grid, rows, threshold, dtype=torch.float32):
    geo, timer = geometry(*grid[1:]), Timer(torch.device("cpu"))
    return in_chunks(pieces, geo, grid[0], rows=rows, threshold=threshold, dtype=dtype, timer=timer)


def filled(rows: list[int], units: int, enough: int) -> list[list[int]]:
    """The frame pairs of each chunk, from the rows of each: no more once there are enough rows or units."""
    made = [[]]
    for pair in range(len(rows)):
        made[-1].append(pair)
        if sum(rows[i] for i in made[-1]) >= enough or units * len(made[-1]) >= SPARSE * enough:
            made.append([])
    return made if made[-1] else made[:-1]


@settings(deadline=None, max_examples=80)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    rows=st.integers(1, 120),
    reuse=st.booleans(),
)
def test_a_chunk_is_as_many_frame_pairs_as_it_takes(grid, share, seed, rows, reuse):
    count, height, width = grid
    patches, geo = clip(grid, changes(grid, share, seed), seed), geometry(height, width)
    made = list(chunks_of(patches.tensor_split(3), grid, rows, 5.0 if reuse else 0.0))
    source = torch.arange(count)[:, None].expand(-1, geo.units)
    if reuse:
        source, _ = scan(patch_means(Patches(patches), geo.units), threshold=5.0)
    layout = referring(geo, source)
    expected = filled(list(layout.per_pair), geo.units, rows)
    assert [(chunk.first, chunk.pairs) for chunk in made] == [(pairs[0], len(pairs)) for pairs in expected]
    # Together they have the rows of the whole video, in its order, and nothing of any other unit.
    assert torch.equal(torch.cat([c.patches for c in made]), patches.view(-1, 4, PATCH_WIDTH)[layout.unit])
    assert all(c.patches.untyped_storage().nbytes() == c.patches.nbytes for c in made)
    layouts = [(c.layout(geo), c.latest(geo) if c.source is not None else None) for c in made]
    units = [own.unit + c.first * geo.units for c, (own, _) in zip(made, layouts, strict=True)]
    assert torch.equal(torch.cat(units), layout.unit)
    for c, (own, latest) in zip(made, layouts, strict=True):
        assert own.rows == c.rows and own.pairs == c.pairs
        if not reuse:
            assert c.source is None and latest is None
            continue
        assert torch.equal(c.source, source[c.first : c.first + c.pairs])
        pairs = (c.source[-1] - c.first).tolist()
        assert latest.tolist() == [pair * geo.units + place if pair >= 0 else -1 for place, pair in enumerate(pairs)]


@pytest.mark.parametrize(("share", "pairs"), [(0.0, {16}), (0.3, set(range(3, 16))), (1.0, {2})])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_a_chunk_is_made_as_soon_as_its_last_frame_pair_is_read(share, pairs, threshold):
    """Otherwise the tower would stand still while frames are read."""
    grid, read, sizes = (40, 3, 5), [], []
    patches = clip(grid, changes(grid, share)).split(4 * 15)
    for chunk in chunks_of((read.append(1) or piece for piece in patches), grid, 30, threshold):
        assert len(read) == chunk.first + chunk.pairs
        sizes.append(chunk.pairs)
    # A still clip is a few chunks, because units are bounded too; noise is two frame pairs at a time.
    assert sum(sizes) == 40 and len(sizes) > 2 and {*sizes[:-1]} <= (pairs if threshold else {2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_patches_are_held_in_the_dtype_of_the_weights(threshold, dtype):
    grid = (3, 2, 2)
    assert all(chunk.patches.dtype == dtype for chunk in chunks_of([random_patches(grid)], grid, 4, threshold, dtype))

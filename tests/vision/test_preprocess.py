"""Frames to patches: the resize, and Hugging Face's order and values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from evoprune.backend.devices import Timer
from evoprune.video.plan import smart_resize
from evoprune.vision.layout import geometry
from evoprune.vision.preprocess import (
    CLIP,
    SPARSE,
    in_chunks,
    in_pairs,
    patch_means,
    patchify,
    resize,
    scan,
)
from tests.vision.clips import changes, clip
from tests.vision.tower import PATCH_WIDTH, random_patches, referring

GREY_LEVEL = 1 / 255 / min(CLIP[1])


def outcome(function, *args, **kwargs):
    """What it returns, or that it raised ValueError."""
    try:
        return tuple(function(*args, **kwargs))
    except ValueError:
        return "ValueError"


def noise(height: int, width: int, frames: int = 1, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=random)


def ramp(height: int, width: int) -> torch.Tensor:
    """One frame of three smooth gradients."""
    y, x = torch.linspace(0, 255, height)[:, None], torch.linspace(0, 255, width)[None]
    planes = [y.expand(height, width), x.expand(height, width), (x + y) / 2]
    return torch.stack(planes, -1)[None].round().to(torch.uint8)


def hf_patches(frame: torch.Tensor, smallest: int, largest: int) -> tuple[torch.Tensor, list[int]]:
    processor = hf.Qwen2VLImageProcessorPil(min_pixels=smallest, max_pixels=largest)
    made = processor(images=frame.numpy(), return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"][0].tolist()


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.integers(1, 400) | st.integers(1, 2_000_000),
    st.integers(0, 2_000_000),
    st.sampled_from([28, 32, 14]),
)
def test_smart_resize_is_hugging_faces(height, width, smallest, room, factor):
    limits = {"min_pixels": smallest, "max_pixels": smallest + room, "factor": factor}
    assert outcome(smart_resize, height, width, **limits) == outcome(hf.smart_resize, height, width, **limits)


@pytest.mark.parametrize(
    "size", [(1, 200), (1, 201), (200, 1), (201, 1), (14, 14), (42, 70), (13, 13), (28, 28), (720, 1280), (2160, 3840)]
)
@pytest.mark.parametrize("limits", [(3136, 12845056), (100352, 602112), (784, 784)])
def test_smart_resize_at_its_edges(size, limits):
    assert outcome(smart_resize, *size, *limits) == outcome(
        hf.smart_resize, *size, min_pixels=limits[0], max_pixels=limits[1]
    )


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-28, 28)])
def test_smart_resize_refuses_empty_frames(size):
    with pytest.raises(ValueError, match="must be positive"):
        smart_resize(*size, 3136, 100_000)


@pytest.mark.parametrize("size", [(28, 28), (56, 84), (140, 112)])
def test_patches_of_a_still_image_are_hugging_faces(size):
    frame = noise(*size)
    theirs, grid = hf_patches(frame, 784, 10**6)
    assert grid == [1, size[0] // 14, size[1] // 14]
    torch.testing.assert_close(patchify(frame.repeat(2, 1, 1, 1)), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("frame", "limits"),
    [
        (noise(100, 150), (784, 10**6)),  # a little larger and smaller
        (noise(240, 320, seed=1), (784, 25 * 784)),  # down by far
        (noise(30, 41, seed=2), (40 * 784, 10**6)),  # up by far
        (ramp(90, 333), (784, 20 * 784)),
    ],
)
def test_resized_patches_are_hugging_faces_within_one_grey_level(frame, limits):
    height, width = smart_resize(*frame.shape[1:3], *limits)
    ours = patchify(resize(frame, height, width).repeat(2, 1, 1, 1))
    theirs, grid = hf_patches(frame, *limits)
    assert grid == [1, height // 14, width // 14]
    far = (ours - theirs).abs()
    assert far.max() <= GREY_LEVEL + 1e-5
    assert (far > 1e-3).float().mean() < 0.05  # and most pixels are the same


def test_resize_leaves_frames_of_the_right_size_alone():
    frames = noise(56, 84, frames=2)
    assert resize(frames, 56, 84) is frames


def test_resize_treats_every_frame_by_itself():
    frames = noise(60, 90, frames=3)
    together = resize(frames, 84, 56)
    assert together.dtype == torch.uint8 and together.shape == (3, 84, 56, 3)
    assert torch.equal(together, torch.cat([resize(frame[None], 84, 56) for frame in frames]))


def patches_by_hand(frames, normal, patch, temporal, merge):
    """Frame pair, unit row, unit column, row and column in the unit; then channel, frame, row, column."""
    (f, h, w, channels), (mean, std) = frames.shape, normal
    unit = patch * merge
    pixels = frames.numpy().astype(np.float64) / 255
    rows = []
    for pair in range(f // temporal):
        for top in range(0, h, unit):
            for left in range(0, w, unit):
                for py in range(merge):
                    for px in range(merge):
                        y0, x0 = top + py * patch, left + px * patch
                        rows.append(
                            [
                                (pixels[pair * temporal + t, y0 + y, x0 + x, c] - mean[c]) / std[c]
                                for c in range(channels)
                                for t in range(temporal)
                                for y in range(patch)
                                for x in range(patch)
                            ]
                        )
    return torch.tensor(np.array(rows), dtype=torch.float32)


@pytest.mark.parametrize(
    ("shape", "cut"),
    [
        ((4, 28, 56), {}),
        ((6, 8, 12), {"patch": 2, "merge": 2}),
        ((3, 6, 12), {"patch": 2, "temporal": 1, "merge": 3}),
        ((4, 4, 8), {"patch": 4, "temporal": 4, "merge": 1, "normal": ((0.1, 0.5, 0.9), (1.0, 0.5, 2.0))}),
    ],
)
def test_patches_of_a_video_against_loops(shape, cut):
    frames = noise(shape[1], shape[2], frames=shape[0])
    whole = {"normal": CLIP, "patch": 14, "temporal": 2, "merge": 2} | cut
    torch.testing.assert_close(patchify(frames, **cut), patches_by_hand(frames, **whole), atol=1e-5, rtol=1e-5)


def test_patchify_does_not_change_its_input():
    frames = noise(28, 28, frames=2)
    before = frames.clone()
    patchify(frames)
    assert torch.equal(frames, before)


# Which frame pairs go through the tower together.


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
    return in_chunks(pieces, geo, grid[0], normal=CLIP, rows=rows, threshold=threshold, dtype=dtype, timer=timer)


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
        source, _ = scan(patch_means(patches, geo.units), threshold=5.0)
    layout = referring(geo, source)
    expected = filled(list(layout.per_pair), geo.units, rows)
    assert [(chunk.first, chunk.layout.pairs) for chunk in made] == [(pairs[0], len(pairs)) for pairs in expected]
    # Together they have the rows of the whole video, in its order, and nothing of any other unit.
    assert torch.equal(torch.cat([c.patches for c in made]), patches.view(-1, 4, PATCH_WIDTH)[layout.unit])
    assert all(c.patches.untyped_storage().nbytes() == c.patches.nbytes for c in made)
    layouts = [(c.layout, c.latest() if c.source is not None else None) for c in made]
    units = [own.unit + c.first * geo.units for c, (own, _) in zip(made, layouts, strict=True)]
    assert torch.equal(torch.cat(units), layout.unit)
    for c, (own, latest) in zip(made, layouts, strict=True):
        assert own.rows == len(c.patches)
        if not reuse:
            assert c.source is None and latest is None
            continue
        assert torch.equal(c.source, source[c.first : c.first + own.pairs])
        pairs = (c.source[-1] - c.first).tolist()
        assert latest.tolist() == [pair * geo.units + place if pair >= 0 else -1 for place, pair in enumerate(pairs)]


@pytest.mark.parametrize(("share", "pairs"), [(0.0, {16}), (0.3, set(range(3, 16))), (1.0, {2})])
@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_a_chunk_is_made_as_soon_as_its_last_frame_pair_is_read(share, pairs, threshold):
    """Otherwise the tower would stand still while frames are read."""
    grid, read, sizes = (40, 3, 5), [], []
    patches = clip(grid, changes(grid, share)).split(4 * 15)
    for chunk in chunks_of((read.append(1) or piece for piece in patches), grid, 30, threshold):
        assert len(read) == chunk.first + chunk.layout.pairs
        sizes.append(chunk.layout.pairs)
    # A still clip is a few chunks, because units are bounded too; noise is two frame pairs at a time.
    assert sum(sizes) == 40 and len(sizes) > 2 and {*sizes[:-1]} <= (pairs if threshold else {2})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_patches_are_held_in_the_dtype_of_the_weights(threshold, dtype):
    grid = (3, 2, 2)
    assert all(chunk.patches.dtype == dtype for chunk in chunks_of([random_patches(grid)], grid, 4, threshold, dtype))

"""Frames to patches: resizing, and Hugging Face's order and values."""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as hf

from evoprune import methods
from evoprune.backend.operators import BLOCKS
from evoprune.methods import EncoderPlan, Tokens, TowerShape
from evoprune.video import InputLimits
from evoprune.vision import encoder
from evoprune.vision.encoder import EncoderRun, encode_rows
from evoprune.vision.layout import geometry
from evoprune.vision.patches import CLIP, normalised, patch_means, scan
from evoprune.vision.preprocess import pixel_patches, resize
from tests.methods.tokens import AFTER, encoded
from tests.threads import one_thread  # noqa: F401
from tests.vision.clips import changes, clip
from tests.vision.tower import PATCH_WIDTH, referring, tiny_tower

GREY_LEVEL = 1 / 255 / min(CLIP[1])


def outcome(function, *args, **kwargs):
    """Return the function's result as a tuple, or "ValueError" if it raises that."""
    try:
        return tuple(function(*args, **kwargs))
    except ValueError:
        return "ValueError"


def noise(height: int, width: int, frames: int = 1, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=random)


def ramp(height: int, width: int) -> torch.Tensor:
    """Return one frame of three smooth gradients."""
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
def test_resized_is_hugging_faces_smart_resize(height, width, smallest, room, factor):
    limits = {"min_pixels": smallest, "max_pixels": smallest + room}
    ours = outcome(InputLimits(**limits, patch_size=factor // 2).resized, height, width)
    assert ours == outcome(hf.smart_resize, height, width, factor=factor, **limits)


@pytest.mark.parametrize(
    "size", [(1, 200), (1, 201), (200, 1), (201, 1), (14, 14), (42, 70), (13, 13), (28, 28), (720, 1280), (2160, 3840)]
)
@pytest.mark.parametrize("limits", [(3136, 12845056), (100352, 602112), (784, 784)])
def test_resized_at_its_edges(size, limits):
    theirs = outcome(hf.smart_resize, *size, min_pixels=limits[0], max_pixels=limits[1])
    ours = InputLimits(*limits)
    assert outcome(ours.resized, *size) == theirs
    for empty in ((0, size[1]), (size[0], 0), (-28, 28)):
        with pytest.raises(ValueError, match="must be positive"):
            ours.resized(*empty)


@pytest.mark.parametrize(
    ("frame", "limits"),
    [
        (noise(100, 150), (784, 10**6)),  # slightly larger and smaller
        (noise(240, 320, seed=1), (784, 25 * 784)),  # strongly downscaled
        (noise(30, 41, seed=2), (40 * 784, 10**6)),  # strongly upscaled
        (ramp(90, 333), (784, 20 * 784)),
    ],
)
def test_resized_patches_are_hugging_faces_within_one_grey_level(frame, limits):
    height, width = InputLimits(*limits).resized(*frame.shape[1:3])
    ours = normalised(pixel_patches(resize(frame, height, width).repeat(2, 1, 1, 1)))
    theirs, grid = hf_patches(frame, *limits)
    assert grid == [1, height // 14, width // 14]
    far = (ours - theirs).abs()
    assert far.max() <= GREY_LEVEL + 1e-5
    assert (far > 1e-3).float().mean() < 0.05  # and most pixels are equal


def test_resize_treats_every_frame_by_itself_and_those_of_the_right_size_not_at_all():
    frames = noise(60, 90, frames=3)
    together = resize(frames, 84, 56)
    assert together.dtype == torch.uint8 and together.shape == (3, 84, 56, 3) and resize(frames, 60, 90) is frames
    assert torch.equal(together, torch.cat([resize(frame[None], 84, 56) for frame in frames]))


def patches_by_hand(frames, normal, patch, temporal, merge):
    """Return patches by frame pair, unit row and column, row and column in the unit; values by channel, frame, row, column."""
    (f, h, w, channels), (mean, std) = frames.shape, normal
    unit = patch * merge
    pixels = (frames.double() / 255 - torch.tensor(mean)) / torch.tensor(std)
    places = product(range(0, f, temporal), range(0, h, unit), range(0, w, unit), *[range(0, unit, patch)] * 2)
    cells = [*product(range(channels), range(temporal), range(patch), range(patch))]
    rows = [[pixels[a + t, b + d + y, c + e + x, k] for k, t, y, x in cells] for a, b, c, d, e in places]
    return torch.tensor(rows, dtype=torch.float32)


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
    normal = cut.pop("normal", CLIP)
    whole = {"normal": normal, "patch": 14, "temporal": 2, "merge": 2} | cut
    made = normalised(pixel_patches(frames, **cut), normal)
    torch.testing.assert_close(made, patches_by_hand(frames, **whole), atol=1e-5, rtol=1e-5)


# Which units become rows, piece by piece.


def embedded(pieces, grid, units, threshold, note=lambda patches: None):
    """Run the encoder's embedding step with patches as values. `note` is called with every piece's patches."""
    tower = tiny_tower()
    plan = EncoderPlan(grid, prod(grid), TowerShape.of_tower(tower).depth, threshold)
    run = EncoderRun(tower, plan, piece_units=units)

    def embed(visual, patches, geo, unit):
        note(patches)
        return patches

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(encoder, "embed", embed)
        return run, run.embed(pieces)


@settings(deadline=None, max_examples=80)
@given(
    grid=st.tuples(st.integers(1, 12), st.integers(1, 3), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    units=st.integers(1, 120),
    reuse=st.booleans(),
)
def test_pieces_together_have_the_rows_of_the_video(grid, share, seed, units, reuse):
    count, height, width = grid
    patches, geo, noted = clip(grid, changes(grid, share, seed), seed), geometry(height, width), []
    run, made = embedded(patches.tensor_split(3), grid, units, 5.0 if reuse else 0.0, noted.append)
    source = torch.arange(count)[:, None].expand(-1, geo.units)
    if reuse:
        source, _ = scan(patch_means(patches, geo.units), threshold=5.0)
    rows = referring(geo, source)
    assert len(noted) == -(-count // -(-units // geo.units))
    # In the encoder's order, and without data of other units.
    assert torch.equal(made.values, patches.view(-1, 4, PATCH_WIDTH)[rows.unit])
    assert all(piece.untyped_storage().nbytes() == piece.nbytes for piece in noted)
    assert torch.equal(made.unit, rows.unit) and torch.equal(made.unit_to_row, rows.unit_to_row)
    assert torch.equal(run.source, source) and run.counts == rows.per_pair


@pytest.mark.parametrize("threshold", [0.0, 5.0])
def test_a_piece_is_embedded_as_soon_as_its_last_frame_pair_is_read(threshold):
    grid, read, seen = (40, 3, 5), [], []
    patches = clip(grid, changes(grid, 0.3)).split(4 * 15)
    embedded((read.append(1) or part for part in patches), grid, 30, threshold, lambda _: seen.append(len(read)))
    assert seen == list(range(2, 41, 2))


def test_patches_are_as_many_as_the_frame_pairs_have():
    grid = (4, 3, 5)
    patches = clip(grid, changes(grid, 0.3))
    for pieces in ([patches[:-1]], [patches[: -4 * 15]], [patches, patches[:4]], []):
        with pytest.raises(ValueError, match="number of patches does not match 4 frame pairs of 15 units"):
            embedded(pieces, grid, 30, 0.0)


# `reuse+NAME`: a selector after reuse in time.


GRID = (5, 4, 5)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", AFTER)
def test_the_selector_sees_every_unit_with_what_its_row_has(name):
    selector, method = methods.get(name), methods.MethodChain.parse(f"reuse+{name}")
    question = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    patches = clip(GRID, changes(GRID, 0.4))
    plan = method.plan(TowerShape.of_tower(tiny_tower()), GRID, 9)
    tokens = encode_rows(tiny_tower(), [patches], plan).selector_input
    assert len(tokens.rows) == changes(GRID, 0.4).sum() < 100
    assert set(tokens.given) == selector.needs
    given = {what: value[tokens.unit_to_row] for what, value in tokens.given.items()} | {"question": question}
    every = Tokens(tokens.rows[tokens.unit_to_row], torch.arange(100), GRID, given=given)
    for keep in (9, 40):
        made, expected = encoded(method, patches, GRID, keep, question=question), selector.select(every, keep)
        assert torch.equal(made.kept, expected.kept)
        torch.testing.assert_close(made.features, expected.features(every.rows))


# Which units count as unchanged.

HEIGHT, WIDTH, UNITS = 56, 84, 6


def block_means(frames: torch.Tensor) -> torch.Tensor:
    """Return the mean of every 7x7 block of frames `[2 T, H, W, 3]`: `[T, units, 96]`, in a unit by frame, row, column, channel."""
    _, height, width, _ = frames.shape
    blocks = frames.float().reshape(-1, 2, height // 28, 4, 7, width // 28, 4, 7, 3).mean((4, 7))
    return blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(len(blocks), -1, 96)


def scanned(frames, threshold=8.0) -> torch.Tensor:
    """Return `source` of uint8 frames `[2 T, 56, 84, 3]`."""
    return scan(block_means(frames), None, threshold=threshold)[0]


def encoded_units(source: torch.Tensor) -> list[int]:
    """Return the number of encoded units in each frame pair."""
    return (source == torch.arange(len(source))[:, None]).sum(1).tolist()


def picture(seed=0, pairs=1):
    """Return a textured image repeated in every frame: uint8 `[2 * pairs, 56, 84, 3]`."""
    frame = np.random.default_rng(seed).integers(40, 180, (1, HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    return torch.from_numpy(frame.repeat(4, 1).repeat(4, 2).repeat(2 * pairs, 0).copy())


def brighter(frame, steps):
    """Return copies of a frame whose brightness grows by one percent per step."""
    return torch.stack([(frame * (1 + 0.01 * step)).to(torch.uint8) for step in range(steps)])


def test_the_means_of_patches_are_those_of_the_frames():
    frames = torch.randint(0, 256, (4, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = patch_means(normalised(pixel_patches(frames)), UNITS)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, block_means(frames), atol=1e-3, rtol=0)
    # Unit 4 is the second of the second row; its block (1, 2) in the second frame of pair 1.
    block = frames[3, 28 + 7 : 28 + 14, 28 + 14 : 28 + 21].float().mean((0, 1))
    torch.testing.assert_close(made.view(2, UNITS, 2, 4, 4, 3)[1, 4, 1, 1, 2], block, atol=1e-3, rtol=0)


def test_a_small_thing_is_noticed_where_and_when_it_comes_and_goes():
    frames = picture(pairs=6)
    frames[5:8, 30:34, 40:42] = 255  # 4 x 2 pixels in unit 4, from the second frame of pair 2 to the end of pair 3
    source = scanned(frames)
    assert source[:, 4].tolist() == [0, 0, 2, 3, 4, 4]
    assert not source[:, :4].any() and not source[:, 5].any()


def test_slow_change_adds_up_against_the_reference():
    """Each frame pair differs too little from the previous one, but not from the last encoded one."""
    frames = picture(pairs=12)
    for i in range(24):
        frames[i, :28, :28] = 100 + 2 * (i // 2)
    # 2 levels per pair in each of three channels
    assert scanned(frames)[:, 0].tolist() == [i // 3 * 3 for i in range(12)]


def test_brightness_may_drift_but_not_far():
    counts = encoded_units(scanned(brighter(picture()[0], 40)))
    assert sum(counts[1:9]) == 0  # up to 1.18
    assert sum(counts[9:]) > 0


def test_a_thing_is_noticed_while_brightness_drifts():
    frames = brighter(picture()[0], 16)
    frames[8:, 30:34, 40:42] = 255
    assert encoded_units(scanned(frames)) == [UNITS, 0, 0, 0, 1, 0, 0, 0]


def test_after_a_cut_the_drift_starts_anew():
    """The new scene is slightly brighter, which is not drift, and then drifts up to the limit."""
    frames = torch.cat([picture(0, 3), brighter(picture(1)[0], 16)])
    assert encoded_units(scanned(frames)) == [UNITS, 0, 0, UNITS, *[0] * 7]


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_frames(level):
    still = torch.full((6, HEIGHT, WIDTH, 3), level, dtype=torch.uint8)
    assert encoded_units(scanned(torch.cat([still, picture()]))) == [UNITS, 0, 0, UNITS]
    assert encoded_units(scanned(torch.cat([picture(), still]))) == [UNITS, UNITS, 0, 0]


def noisy(seed, pairs):
    """Return frame pairs that randomly keep, nudge or replace units: float32 `[pairs, 6, 96]`."""
    random = torch.Generator().manual_seed(seed)
    means, out = torch.rand(UNITS, BLOCKS * 3, generator=random) * 200, []
    for _ in range(pairs):
        kind = torch.randint(0, 4, (UNITS, 1), generator=random)
        other = torch.rand(means.shape, generator=random) * 200
        nudge = torch.randn(means.shape, generator=random) * 2
        means = torch.where(kind == 0, other, torch.where(kind == 1, means + nudge, means)).clamp(0, 255)
        out.append(means * (1 + 0.05 * torch.randn(1, generator=random)))
    return torch.stack(out)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 999), st.lists(st.integers(1, 4), min_size=1, max_size=6), st.sampled_from([0.0, 4.0, 8.0, 30.0]))
def test_a_unit_has_the_row_of_the_pair_last_encoded_however_the_video_is_cut(seed, cuts, threshold):
    means = noisy(seed, sum(cuts) + 1)
    whole, last = scan(means, None, threshold=threshold)
    number = torch.arange(len(means))[:, None]
    assert (whole[0] == 0).all()
    assert torch.equal(whole, torch.where(whole == number, number, 0).cummax(0).values)
    pieces, references = [], None
    for piece in means.split([1, *cuts]):
        before = references and references.means.clone()
        source, following = scan(piece, references, threshold=threshold)
        assert before is None or torch.equal(references.means, before)  # a scan leaves its references unchanged
        pieces, references = [*pieces, source], following
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(references.means, last.means) and torch.equal(references.pair, last.pair)
    assert references.seen == last.seen == len(means)

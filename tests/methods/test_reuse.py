"""`reuse+NAME`: a selector behind reuse in time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.backend.operators import BLOCKS
from evoprune.methods.types import Tokens
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import patch_means, patchify, scan
from evoprune.vision.tower import tower_shape
from tests.methods.tokens import AFTER, encoded
from tests.threads import one_thread  # noqa: F401
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

GRID = (5, 4, 5)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", AFTER)
def test_the_selector_sees_every_unit_with_what_its_row_has(name):
    selector, method = methods.get(name), methods.parse(f"reuse+{name}")
    question = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    patches = clip(GRID, changes(GRID, 0.4))
    plan = method.plan(tower_shape(tiny_tower()), GRID, 9)
    tokens = encode_rows(tiny_tower(), [patches], plan).tokens
    assert len(tokens.rows) == changes(GRID, 0.4).sum() < 100
    assert set(tokens.given) == selector.needs
    given = {what: value[tokens.owner] for what, value in tokens.given.items()} | {"question": question}
    every = Tokens(tokens.rows[tokens.owner], torch.arange(100), GRID, given=given)
    for keep in (9, 40):
        made, expected = encoded(method, patches, GRID, keep, question=question), selector.select(every, keep)
        assert torch.equal(made.kept, expected.kept)
        torch.testing.assert_close(made.features, expected.features(every.rows))


def test_it_says_of_itself_what_its_selector_says():
    for name in AFTER:
        selector, method = methods.get(name), methods.parse(f"reuse+{name}")
        assert (method.exact, method.reads_question) == (selector.exact, selector.reads_question)
        assert method.tokens == selector


def test_at_the_full_budget_nothing_is_reused():
    made = encoded(methods.parse("reuse+divprune"), clip(GRID, changes(GRID, 0.0)), GRID, 100)
    assert [rows for _, rows in made.layers] == [100] * 4


# What counts as unchanged.

HEIGHT, WIDTH, UNITS = 56, 84, 6


def block_means(frames: torch.Tensor) -> torch.Tensor:
    """`[T, units, 96]`: the mean of every 7x7 block of frames `[2 T, H, W, 3]`; in a unit by frame, row, column, channel."""
    _, height, width, _ = frames.shape
    blocks = frames.float().reshape(-1, 2, height // 28, 4, 7, width // 28, 4, 7, 3).mean((4, 7))
    return blocks.permute(0, 2, 4, 1, 3, 5, 6).reshape(len(blocks), -1, 96)


def scanned(frames, threshold=8.0) -> torch.Tensor:
    """`source` of uint8 frames `[2 T, 56, 84, 3]`."""
    return scan(block_means(frames), None, threshold=threshold)[0]


def encoded_units(source: torch.Tensor) -> list[int]:
    """How many units of each frame pair are encoded."""
    return (source == torch.arange(len(source))[:, None]).sum(1).tolist()


def picture(seed=0, pairs=1):
    """A textured picture, the same in every frame: uint8 `[2 * pairs, 56, 84, 3]`."""
    frame = np.random.default_rng(seed).integers(40, 180, (1, HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    return torch.from_numpy(frame.repeat(4, 1).repeat(4, 2).repeat(2 * pairs, 0).copy())


def brighter(frame, steps):
    """A frame that becomes one percent brighter from step to step."""
    return torch.stack([(frame * (1 + 0.01 * step)).to(torch.uint8) for step in range(steps)])


def test_the_means_of_patches_are_those_of_the_frames():
    frames = torch.randint(0, 256, (4, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = patch_means(patchify(frames), UNITS)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, block_means(frames), atol=1e-3, rtol=0)
    # Unit 4 is the second of the second row; its block (1, 2) in the second frame of pair 1.
    block = frames[3, 28 + 7 : 28 + 14, 28 + 14 : 28 + 21].float().mean((0, 1))
    torch.testing.assert_close(made.view(2, UNITS, 2, 4, 4, 3)[1, 4, 1, 1, 2], block, atol=1e-3, rtol=0)


def test_a_still_picture_is_encoded_once():
    source = scanned(picture(pairs=5))
    assert source.dtype == torch.int64 and source.shape == (5, UNITS) and not source.any()


def test_a_small_thing_is_noticed_where_and_when_it_comes_and_goes():
    frames = picture(pairs=6)
    frames[5:8, 30:34, 40:42] = 255  # 4 x 2 pixels in unit 4, from the second frame of pair 2 to the end of pair 3
    source = scanned(frames)
    assert source[:, 4].tolist() == [0, 0, 2, 3, 4, 4]
    assert not source[:, :4].any() and not source[:, 5].any()


def test_slow_change_adds_up_against_the_reference():
    """Each frame pair is too little different from the one before, but not from the one that was encoded."""
    frames = picture(pairs=12)
    for i in range(24):
        frames[i, :28, :28] = 100 + 2 * (i // 2)
    assert scanned(frames)[:, 0].tolist() == [
        i // 3 * 3 for i in range(12)
    ]  # 2 levels a pair in each of three channels


def test_brightness_may_drift_but_not_far():
    counts = encoded_units(scanned(brighter(picture()[0], 40)))
    assert sum(counts[1:9]) == 0  # up to 1.18
    assert sum(counts[9:]) > 0


def test_a_thing_is_noticed_while_brightness_drifts():
    frames = brighter(picture()[0], 16)
    frames[8:, 30:34, 40:42] = 255
    assert encoded_units(scanned(frames)) == [UNITS, 0, 0, 0, 1, 0, 0, 0]


def test_after_a_cut_the_drift_starts_anew():
    """The new scene is a little brighter, which is no drift, and then drifts as far as it may."""
    frames = torch.cat([picture(0, 3), brighter(picture(1)[0], 16)])
    assert encoded_units(scanned(frames)) == [UNITS, 0, 0, UNITS, *[0] * 7]


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_frames(level):
    still = torch.full((6, HEIGHT, WIDTH, 3), level, dtype=torch.uint8)
    assert encoded_units(scanned(torch.cat([still, picture()]))) == [UNITS, 0, 0, UNITS]
    assert encoded_units(scanned(torch.cat([picture(), still]))) == [UNITS, UNITS, 0, 0]


def test_at_threshold_zero_every_unit_is_encoded():
    assert encoded_units(scanned(picture(pairs=3), threshold=0.0)) == [UNITS] * 3


def noisy(seed, pairs):
    """Frame pairs that keep, nudge or replace units of those before, at random: float32 `[pairs, 6, 96]`."""
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
        assert before is None or torch.equal(references.means, before)  # a scan leaves its references as they are
        pieces, references = [*pieces, source], following
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(references.means, last.means) and torch.equal(references.pair, last.pair)
    assert references.seen == last.seen == len(means)

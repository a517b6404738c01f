import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning.reference import BLOCKS, Reuse, block_means, joined, scan, turns
from tests.threads import one_thread  # noqa: F401

HEIGHT, WIDTH, UNITS = 56, 84, 6


def scanned(frames, **options) -> Reuse:
    return scan(block_means(torch.as_tensor(frames)), **options)[0]


def picture(seed=0, grids=1):
    """A textured picture, the same in every frame: uint8 `[2 * grids, 56, 84, 3]`."""
    frame = np.random.default_rng(seed).integers(40, 180, (1, HEIGHT // 4, WIDTH // 4, 3), dtype=np.uint8)
    return torch.from_numpy(frame.repeat(4, 1).repeat(4, 2).repeat(2 * grids, 0).copy())


# --- block means ---------------------------------------------------------------------------------------------------------


def test_block_means_by_hand():
    frames = torch.randint(0, 256, (4, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = block_means(frames).view(2, UNITS, 2, 4, 4, 3)
    assert made.dtype == torch.float32
    for grid in range(2):
        for unit in range(UNITS):
            y, x = 28 * (unit // 3), 28 * (unit % 3)
            for frame in range(2):
                for by in range(4):
                    for bx in range(4):
                        top, left = y + 7 * by, x + 7 * bx
                        block = frames[2 * grid + frame, top : top + 7, left : left + 7].double()
                        assert torch.allclose(made[grid, unit, frame, by, bx].double(), block.mean((0, 1)), atol=1e-4)


def test_block_means_do_not_depend_on_their_company():
    frames = torch.randint(0, 256, (12, HEIGHT, WIDTH, 3), dtype=torch.uint8)
    assert torch.equal(block_means(frames), torch.cat([block_means(f) for f in frames.split(2)]))


# --- scan ----------------------------------------------------------------------------------------------------------------


def test_a_still_picture_is_encoded_once():
    reuse = scanned(picture(grids=5))
    assert reuse.counts == [UNITS, 0, 0, 0, 0]
    assert not reuse.grid.any()


def test_a_small_thing_is_seen_where_and_when_it_comes_and_goes():
    frames = picture(grids=6)
    frames[5:8, 30:34, 40:42] = 255  # 2 x 4 pixels in unit 4, from the second frame of grid 2 to the end of grid 3
    reuse = scanned(frames)
    assert reuse.counts == [UNITS, 0, 1, 1, 1, 0]
    assert reuse.grid[:, 4].tolist() == [0, 0, 2, 3, 4, 4]
    assert not reuse.grid[:, :4].any()


def test_slow_change_adds_up_against_the_reference():
    """Each grid is too little different from the one before, but not from the one that was encoded."""
    frames = picture(grids=12)
    for i in range(24):
        frames[i, :28, :28] = 100 + 2 * (i // 2)
    reuse = scanned(frames, threshold=8.0)  # 2 levels a grid in each of three channels
    assert reuse.encoded[:, 0].tolist() == [i % 3 == 0 for i in range(12)]
    assert reuse.grid[:, 0].tolist() == [i // 3 * 3 for i in range(12)]


def test_brightness_may_drift_but_not_far():
    frames = torch.stack([(picture()[0] * (1 + 0.01 * i)).to(torch.uint8) for i in range(40)])
    reuse = scanned(frames)
    assert sum(reuse.counts[1:9]) == 0  # up to 1.18
    assert sum(reuse.counts[9:]) > 0


def test_a_thing_is_seen_while_brightness_drifts():
    frames = torch.stack([(picture()[0] * (1 + 0.01 * i)).to(torch.uint8) for i in range(16)])
    frames[8:, 30:34, 40:42] = 255
    assert scanned(frames).counts == [UNITS, 0, 0, 0, 1, 0, 0, 0]


def test_after_a_cut_the_drift_starts_anew():
    """The new scene is a little brighter, which is no drift, and then drifts as far as is allowed."""
    after = torch.stack([(picture(1)[0] * (1 + 0.01 * i)).to(torch.uint8) for i in range(16)])
    reuse = scanned(torch.cat([picture(0, 3), after]))
    assert reuse.counts == [UNITS, 0, 0, UNITS, *[0] * 7]


@pytest.mark.parametrize("level", [0, 255])
def test_black_and_white_frames(level):
    still = torch.full((6, HEIGHT, WIDTH, 3), level, dtype=torch.uint8)
    assert scanned(still).counts == [UNITS, 0, 0]
    assert scanned(torch.cat([still, picture()])).counts == [UNITS, 0, 0, UNITS]
    assert scanned(torch.cat([picture(), still])).counts == [UNITS, UNITS, 0, 0]


def noisy(seed, grids):
    """Grids that keep, nudge or replace units of those before, at random: float32 `[grids, 6, 96]`."""
    random = torch.Generator().manual_seed(seed)
    means, out = torch.rand(UNITS, BLOCKS * 3, generator=random) * 200, []
    for _ in range(grids):
        kind = torch.randint(0, 4, (UNITS, 1), generator=random)
        other = torch.rand(means.shape, generator=random) * 200
        nudge = torch.randn(means.shape, generator=random) * 2
        means = torch.where(kind == 0, other, torch.where(kind == 1, means + nudge, means)).clamp(0, 255)
        out.append(means * (1 + 0.05 * torch.randn(1, generator=random)))
    return torch.stack(out)


@settings(deadline=None)
@given(
    st.integers(0, 999),
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.sampled_from([0.0, 4.0, 8.0, 30.0]),
    st.sampled_from([0, 1, 3]),
)
def test_pieces_do_not_matter(seed, cuts, threshold, refresh):
    means = noisy(seed, sum(cuts) + 1)
    whole, last = scan(means, threshold=threshold, refresh=refresh)
    pieces, references = [], None
    for piece in means.split([1, *cuts]):
        reuse, references = scan(piece, references, threshold, refresh)
        pieces.append(reuse)
    assert torch.equal(joined(pieces).encoded, whole.encoded)
    assert torch.equal(joined(pieces).grid, whole.grid)
    assert torch.equal(references.means, last.means) and references.seen == last.seen == len(means)


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 8), st.sampled_from([0.0, 4.0, 8.0, 30.0]), st.sampled_from([0, 1, 3]))
def test_owners_are_the_grids_last_encoded(seed, grids, threshold, refresh):
    reuse, _ = scan(noisy(seed, grids), threshold=threshold, refresh=refresh)
    assert reuse.encoded[0].all()
    for unit in range(UNITS):
        last = 0
        for g in range(grids):
            last = g if reuse.encoded[g, unit] else last
            assert reuse.grid[g, unit] == last
    home = reuse.encoded.flatten().nonzero()[:, 0]  # of each row
    assert torch.equal(home[reuse.owner()].view(grids, UNITS), reuse.grid * UNITS + torch.arange(UNITS))
    assert sum(reuse.counts) == len(home)


def test_where_something_happens_some_of_the_rest_is_encoded_anew():
    frames = picture(grids=9)
    frames[6:, 30:34, 40:42] = (
        torch.arange(12)[:, None, None, None] // 2 % 2 * 255
    )  # unit 4, from grid 3 on, in every grid
    plain, reuse = scanned(frames), scanned(frames, refresh=3)
    assert plain.counts == [UNITS, 0, 0, 1, 1, 1, 1, 1, 1]
    turn = turns(UNITS, 3)
    for g in range(3, 9):
        assert torch.equal(reuse.encoded[g], (turn == g % 3) | (torch.arange(UNITS) == 4))
    assert reuse.counts[1:3] == [0, 0] and (reuse.grid[8] > 5).all()  # nobody's row is older than three grids


@pytest.mark.parametrize("refresh", [0, 1, 8])
def test_a_still_picture_needs_no_refreshing(refresh):
    assert scanned(picture(grids=12), refresh=refresh).counts == [UNITS, *[0] * 11]


@pytest.mark.parametrize(("units", "refresh"), [(96, 8), (96, 1), (6, 8), (8160, 16), (1, 4), (1000, 3)])
def test_turns_are_shared_out_evenly(units, refresh):
    turn = turns(units, refresh)
    share = torch.bincount(turn, minlength=refresh)
    assert len(share) == refresh and share.sum() == units
    assert share.max() - share.min() <= 3
    for stretch in turn.split(4 * refresh)[: units // (4 * refresh)]:  # near each other, too
        assert len(stretch.unique()) == refresh


def test_threshold_zero_means_no_references():
    reuse = scanned(picture(grids=3), threshold=0.0)
    assert reuse.encoded.all()
    assert torch.equal(reuse.owner(), torch.arange(3 * UNITS))


def test_a_scan_does_not_touch_its_references():
    means = noisy(3, 4)
    _, first = scan(means[:2])
    before = first.means.clone()
    scan(means[2:], first)
    assert torch.equal(first.means, before) and first.seen == 2


def test_nothing_to_scan():
    means = noisy(3, 2)
    _, references = scan(means)
    reuse, same = scan(means[:0], references)
    assert reuse.counts == [] and torch.equal(same.means, references.means)
    with pytest.raises(ValueError):
        scan(means[:0])

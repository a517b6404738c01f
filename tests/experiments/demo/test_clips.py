from dataclasses import replace

import numpy as np
import pytest

from evoprune.video.info import DEMO_TAG
from evoprune.video.plan import even_times
from experiments.demo.clips import (
    COLOURS,
    DIGITS,
    FRAMES,
    LENGTHS,
    MOTIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Clip,
    Thing,
    make_clip,
    setting,
)
from experiments.demo.drawing import render, thing_mask, write_video

SETTINGS = [{}, {"height": 112, "width": 168}, {"height": 112, "width": 112, "seconds": 3.0, "grids": 3}]


def clips(count, split="validation", **how):
    return [make_clip(split, seed, **how) for seed in range(count)]


def sampled(clip: Clip, grids: int) -> list[float]:
    return even_times(0.0, clip.seconds, 2 * grids)


def painted(clip: Clip, thing: Thing, t: float) -> np.ndarray:
    """bool `[height, width]`: the pixels that this thing alone changes at time t."""
    with_it, without = (render(replace(clip, things=things), [t])[0].astype(int) for things in ((thing,), ()))
    return (with_it != without).any(-1)


# --- what a clip is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SETTINGS)
def test_a_clip_is_a_function_of_split_and_seed(how):
    assert clips(10, **how) == clips(10, **how)
    one = make_clip("train", 3, **how)
    assert np.array_equal(render(one, [0.2, 1.0]), render(make_clip("train", 3, **how), [0.2, 1.0]))


def test_splits_never_share_a_clip():
    made = {(split, seed): make_clip(split, seed) for split in SPLITS for seed in range(60)}
    assert len({clip.seed for clip in made.values()}) == len(made)
    assert len({clip.things for clip in made.values() if clip.things}) == sum(bool(c.things) for c in made.values())
    backgrounds = {render(replace(make_clip(split, 5), things=(), noise=0.0), [0.0]).tobytes() for split in SPLITS}
    assert len(backgrounds) == len(SPLITS)


@pytest.mark.parametrize("how", SETTINGS)
def test_things_stay_on_the_frame_and_clear_of_each_other(how):
    for clip in clips(60, **how):
        boxes = [thing.box(clip.seconds) for thing in clip.things]
        for at, (x0, y0, x1, y1) in enumerate(boxes):
            assert x0 >= 0 and y0 >= 0 and x1 <= clip.width and y1 <= clip.height
            for a0, b0, a1, b1 in boxes[:at]:
                assert a1 < x0 or x1 < a0 or b1 < y0 or y1 < b0


def test_things_are_what_they_say():
    seen = set()
    for clip in clips(150):
        names = [thing.name for thing in clip.shapes]
        assert len(set(names)) == len(names) and sum(thing.is_digit for thing in clip.things) <= 1
        assert len(names) <= (4 if clip.height * clip.width < 30_000 else 6)
        for thing in clip.things:
            seen |= {thing.kind, thing.colour, thing.motion, thing.size, thing.event(clip.seconds)}
            assert max(abs(a - b) for a, b in zip(thing.rgb, COLOURS[thing.colour], strict=True)) <= 12
            if thing.is_digit:
                assert thing.motion == "still" and thing.radius == DIGITS[thing.size]
            else:
                assert SIZES[thing.size][0] <= thing.radius <= SIZES[thing.size][1]
            (x0, y0), (x1, y1) = thing.centre(0), thing.centre(clip.seconds)
            way = {(0, 0): "still", (-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}
            assert way[int(np.sign(x1 - x0)), int(np.sign(y1 - y0))] == thing.motion
            if thing.motion != "still":
                assert abs(x1 - x0) + abs(y1 - y0) > 20  # far enough to be seen
    assert seen >= {*SHAPES, *COLOURS, *MOTIONS, *SIZES, *"0123456789", "stays", "appears", "vanishes", "flashes"}


def test_sizes_and_lengths_are_drawn_as_often_as_said():
    drawn = [setting("heldout", seed) for seed in range(4000)]
    for choices, seen in (
        (FRAMES, [(h // 28, w // 28) for h, w, _ in drawn]),
        (LENGTHS, [grids for _, _, grids in drawn]),
    ):
        assert sum(odds for _, odds in choices) == pytest.approx(1)
        for value, odds in choices:
            assert seen.count(value) / len(seen) == pytest.approx(odds, abs=0.03)
    clip = make_clip("heldout", 3)
    assert (clip.height, clip.width, clip.seconds) == setting("heldout", 3)


def test_portrait_clips_are_upright_and_always_pan():
    for clip in clips(30, "portrait"):
        assert (clip.height, clip.width) == (12 * 28, 8 * 28) and any(clip.pan)
    panning = np.mean([any(clip.pan) for clip in clips(400, "heldout")])
    assert 0.28 < panning < 0.42


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grids", [3, 4, 6, 12])
def test_flashes_last_two_or_three_sampled_frames(grids):
    lengths = [
        sum(thing.visible(t) for t in sampled(clip, grids))
        for clip in clips(400, seconds=float(grids), grids=grids)
        for thing in clip.things
        if thing.event(clip.seconds) == "flashes"
    ]
    assert len(lengths) > 100
    assert set(lengths) == {2, 3}


@pytest.mark.parametrize("grids", [3, 4, 6, 12])
@pytest.mark.parametrize(
    ("event", "first", "last"),
    [("stays", True, True), ("appears", False, True), ("vanishes", True, False), ("flashes", False, False)],
)
def test_events_can_be_seen_in_the_sampled_frames(grids, event, first, last):
    wrong, seen = [], 0
    for clip in clips(200, seconds=float(grids), grids=grids):
        times = sampled(clip, grids)
        for thing in clip.things:
            if thing.event(clip.seconds) == event:
                seen += 1
                assert any(thing.visible(t) for t in times)
                if (thing.visible(times[0]), thing.visible(times[-1])) != (first, last):
                    wrong.append((clip.seed, thing.name, thing.start, thing.end))
    assert seen > 20
    assert not wrong, f"{len(wrong)} of {seen}, such as {wrong[0]}"


@pytest.mark.parametrize("grids", [1, 2])
def test_nothing_comes_or_goes_in_the_shortest_clips(grids):
    for clip in clips(60, seconds=float(grids), grids=grids):
        assert all(thing.event(clip.seconds) == "stays" for thing in clip.things)


@pytest.mark.parametrize(
    ("start", "end", "event"), [(0, 9, "stays"), (1, 9, "appears"), (0, 3, "vanishes"), (1, 3, "flashes")]
)
def test_event_follows_from_start_and_end(start, end, event):
    thing = Thing("circle", "red", (225, 40, 40), "small", 6, 20.0, 20.0, "still", 0.0, float(start), float(end))
    assert thing.event(6.0) == event
    seen = [t / 2 for t in range(12) if thing.visible(t / 2)]
    assert seen == [t / 2 for t in range(12) if start <= t / 2 < end]


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", SETTINGS)
def test_things_are_drawn_where_centre_says_and_only_while_visible(how):
    checked = 0
    for clip in clips(12, **how):
        for thing in clip.things:
            for t in (0.1, 0.5 * clip.seconds, 0.95 * clip.seconds):
                changed = painted(clip, thing, t)
                if not thing.visible(t):
                    assert not changed.any()
                    continue
                checked += 1
                rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
                x, y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
                assert thing.centre(t) == pytest.approx((x, y), abs=1.6)
                reach = max(columns[-1] - columns[0], rows[-1] - rows[0]) + 1
                assert 2 * thing.radius - 4 <= reach <= 2 * thing.radius
    assert checked > 30


def test_things_are_drawn_in_their_colour():
    for kind in (*SHAPES, "8"):
        thing = Thing(kind, "cyan", (50, 215, 225), "large", 7 if kind == "8" else 12, 50.0, 60.0, "right", 5.0)
        clip = Clip((0, 1), 112, 168, 6.0, (thing,), noise=0.0)
        frame = render(clip, [2.0])[0]
        mask = thing_mask("8", 7) if thing.is_digit else thing_mask(kind, 12)
        h, w = mask.shape
        area = frame[60 - h // 2 :, 60 - w // 2 :][:h, :w]  # it has moved ten pixels
        assert (area[mask == 1] == thing.rgb).all()
        assert (area[mask == 0] != thing.rgb).any(-1).all()


def test_background_stands_still_and_noise_does_not():
    clip = replace(make_clip("train", 1), things=(), pan=(0.0, 0.0), clutter=200.0)
    first, second = render(clip, [0.0, 1.0]).astype(int)
    assert not np.array_equal(first, second)
    assert abs(first - second).mean() < 3 * clip.noise and abs(first - second).max() < 13 * clip.noise
    quiet = render(replace(clip, noise=0.0), [0.0, 1.0])
    assert np.array_equal(quiet[0], quiet[1])


@pytest.mark.parametrize("pan", [(8.0, 0.0), (-8.0, 0.0), (0.0, 5.0), (4.0, -6.0)])
def test_the_camera_moves_over_the_background_and_things_do_not(pan):
    thing = Thing("square", "red", (225, 40, 40), "large", 10, 60.0, 60.0, "still", 0.0)
    first, second = render(Clip((0, 1), 112, 168, 6.0, (thing,), 0.0, pan, clutter=300.0), [0.5, 2.5]).astype(int)
    assert (first[55:65, 55:65] == thing.rgb).all() and (second[55:65, 55:65] == thing.rgb).all()
    x, y = (int(2 * v) for v in pan)  # what was at (x, y) to begin with is now in the corner
    before = first[max(y, 0) : 112 + min(y, 0), max(x, 0) : 168 + min(x, 0)]
    after = second[max(-y, 0) : 112 - max(y, 0), max(-x, 0) : 168 - max(x, 0)]
    same = (before == after).all(-1)
    assert same.mean() > 0.9 and not (first == second).all(-1).mean() > 0.5


def test_clutter_is_grey_and_as_dense_as_said():
    plain, littered = (Clip((0, 5), 448, 448, 1.0, (), 0.0, clutter=d) for d in (0.0, 300.0))
    changed = (render(plain, [0.0])[0] != render(littered, [0.0])[0]).any(-1)
    assert 0.02 < changed.mean() < 0.2
    painted_over = render(littered, [0.0])[0][changed].astype(int)
    assert np.median(painted_over.max(-1) - painted_over.min(-1)) < 60


def test_a_frame_does_not_depend_on_the_frame_rate_but_for_its_noise():
    clip = replace(make_clip("validation", 2), noise=0.0)
    fine = render(clip, [i / 12 for i in range(72)])
    coarse = render(clip, [i / 2 for i in range(12)])
    assert np.array_equal(fine[::6], coarse)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("radius", [6, 9, 13])
def test_shape_masks_fill_their_square(kind, radius):
    mask = thing_mask(kind, radius)
    assert mask.shape == (2 * radius, 2 * radius) and 0 <= mask.min() < 0.1 and mask.max() == 1
    assert np.array_equal(mask, mask[:, ::-1])  # every shape is its own mirror image
    others = [thing_mask(other, radius) for other in SHAPES if other != kind]
    assert min(abs(mask - other).mean() for other in others) > 0.05


def test_digits_differ():
    masks = [thing_mask(str(digit), 7) for digit in range(10)]
    assert all(mask.shape == (14, 10) and set(mask.flatten()) == {0, 1} for mask in masks)
    small = [thing_mask(str(digit), 5) for digit in range(10)]
    assert all(mask.shape == (10, 7) and mask.min() >= 0 and mask.max() <= 1 for mask in small)
    assert all(mask.mean() == pytest.approx(whole.mean(), abs=0.02) for mask, whole in zip(small, masks, strict=True))
    assert min(abs(a - b).sum() for i, a in enumerate(masks) for b in masks[:i]) >= 8


def test_a_written_video_shows_the_clip_and_says_where_it_is_from(tmp_path):
    import av

    clip = make_clip("samples", 0, seconds=1.0, grids=1)
    write_video(clip, tmp_path / "clip.mp4", fps=6)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.metadata["comment"] == DEMO_TAG
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    drawn = render(clip, [i / 6 for i in range(6)])
    assert len(frames) == 6
    assert abs(np.stack(frames).astype(int) - drawn).mean() < 8


@pytest.mark.parametrize(("codec", "ending", "times"), [("libx264", "mp4", 6), ("libvpx-vp9", "webm", 2)])
def test_a_clip_is_always_the_same_file(tmp_path, codec, ending, times):
    clip = make_clip("validation", 33, 224, 336, 3.0, 3) if ending == "mp4" else make_clip("samples", 0, 56, 56, 1.0, 1)
    written = set()
    for number in range(times):
        write_video(clip, tmp_path / f"{number}.{ending}", codec=codec, crf=24, preset="veryfast")
        written.add((tmp_path / f"{number}.{ending}").read_bytes())
    assert len(written) == 1

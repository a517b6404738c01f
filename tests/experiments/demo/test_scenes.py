"""The second world: what a clip holds, how it is drawn, that it is frozen."""

import hashlib
import itertools
from dataclasses import astuple, replace

import numpy as np
import pytest

from evoprune.video.frames import probe
from evoprune.video.info import world_of
from evoprune.video.plan import even_times
from experiments.demo.painting import CHARACTERS, glyph_mask, outline_mask
from experiments.demo.scenes.asking import ask
from experiments.demo.scenes.clip import COLOURS, OUTLINES, TEXTURES, Camera, Clip, Thing
from experiments.demo.scenes.compose import SPLITS, compose, family, make_clip
from experiments.demo.scenes.drawing import NOTHING, render, render_with_map, write_file
from experiments.demo.scenes.happening import types_for
from experiments.demo.scenes.scenery import leaves, pink_noise, texture_field, thing_sprite
from experiments.demo.scenes.signs import WORDS, similar_text

# A digest of contents and questions, and the mean of all pixels, which may differ a little elsewhere.
FROZEN = {
    ("train", 0): ("e0e4a33f072135ec", 86.4812),
    ("validation", 0): ("66498210070ccaa5", 86.0550),
    ("heldout", 100_000): ("8782ba827e885ec8", 96.9818),
}


def clips(count, height=8, width=12, pairs=4, **how):
    return [compose((99, seed), height, width, pairs, float(pairs), **how) for seed in range(count)]


def times(clip: Clip) -> list[float]:
    return even_times(0.0, clip.seconds, 2 * clip.pairs)


def rounded(value):
    """Numbers to four places, so that the last bits of a sine do not count."""
    if isinstance(value, tuple | list):
        return tuple(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


def look(split: str, seeds: range) -> tuple[str, float]:
    content, means = hashlib.sha256(), []
    for seed in seeds:
        clip = make_clip(split, seed)
        content.update(
            repr((rounded(astuple(clip)), ask(clip, np.random.default_rng(seed), 6, types_for(clip)))).encode()
        )
        means.append(render(clip, [0.2, 0.7]).mean())
    return content.hexdigest()[:16], float(np.mean(means))


@pytest.mark.parametrize(("split", "first"), FROZEN, ids=str)
def test_the_generator_is_frozen(split, first):
    digest, mean = look(split, range(first, first + 8))
    assert (digest, mean) == (FROZEN[split, first][0], pytest.approx(FROZEN[split, first][1], abs=0.02))


@pytest.mark.full
def test_some_pictures_are_pages_of_signs_and_most_clips_have_a_few():
    counts = [len(make_clip("train", seed).signs) for seed in range(120)]
    assert np.mean(np.array(counts[::2]) >= 5) > 0.25 and np.mean(counts[1::2]) > 1.5
    assert np.mean(np.array(counts) == 0) < 0.15


def test_a_clip_is_a_function_of_split_and_seed():
    one, same = make_clip("train", 31), make_clip("train", 31)
    assert one == same and np.array_equal(render(one, [0.2, 1.0]), render(same, [0.2, 1.0]))
    contents = {make_clip(split, 31).things for split in SPLITS}
    assert len(contents) == len(SPLITS)


def test_even_seeds_are_pictures_in_which_nothing_happens():
    for seed in range(20):
        clip = make_clip("validation", seed)
        assert clip.is_still == (family(seed) == "picture") == (seed % 2 == 0)
        if clip.is_still:
            assert clip.camera == Camera() and all(
                t.event(clip.seconds) == "stays" and not t.speed for t in clip.things
            )
            assert not any(t.after for t in clip.things)


@pytest.mark.full
def test_clips_are_crowded_and_no_two_things_look_the_same():
    counts, brief = [], 0
    for clip in clips(60, pairs=8):
        counts.append(len(clip.things))
        looks = [(t.outline, t.texture, t.colour) for t in clip.things]
        assert len(set(looks)) == len(looks)
        assert all(t.outline == "sign" or (t.outline in OUTLINES and t.texture in TEXTURES) for t in clip.things)
        assert all(t.colour in COLOURS and (t.text != "") == t.is_sign for t in clip.things)
        assert all(not t.is_sign or (8 <= t.glyph <= 24 and 2 <= len(t.text) <= 6) for t in clip.things)
        brief += any(t.event(clip.seconds) == "flashes" for t in clip.things)
    assert np.mean(counts) >= 6 and max(counts) <= 20 and brief > 20


def test_the_map_says_what_each_pixel_shows():
    shape = Thing("square", "plain", "red", (200, 50, 45), 10, 40.0, 50.0, "right", 6.0)
    over = Thing("circle", "plain", "blue", (60, 90, 210), 8, 52.0, 50.0, spans=((2.0, 9.0),), under=0)
    clip = Clip((0, 1), 112, 168, 4.0, 4, (shape, over), noise=0.0)
    frames, maps = render_with_map(clip, [0.0, 1.0, 2.5])
    assert maps[0, 50, 40] == 0 and maps[0, 50, 60] == NOTHING and tuple(frames[0, 50, 40]) == shape.rgb
    assert maps[1, 50, 46] == 0 and maps[2, 50, 52] == 1 and tuple(frames[2, 50, 52]) == over.rgb


@pytest.mark.parametrize("camera", [Camera("pan", dx=10.0), Camera("pan", dy=-6.0), Camera("zoom", zoom=(1.0, 1.4))])
def test_things_are_on_the_frame_where_the_camera_puts_them(camera):
    thing = Thing("square", "plain", "red", (200, 50, 45), 9, 90.0, 60.0)
    clip = Clip((0, 2), 112, 168, 4.0, 4, (thing,), camera, noise=0.0)
    for t in (0.0, 1.5, 3.5):
        ys, xs = (render_with_map(clip, [t])[1][0] == 0).nonzero()
        assert (xs.mean() + 0.5, ys.mean() + 0.5) == pytest.approx(clip.on_frame(90.0, 60.0, t), abs=1.2)


def test_layers_move_against_each_other_when_the_camera_pans():
    still = Clip((0, 3), 112, 168, 4.0, 4, (), Camera("pan", dx=8.0), clutter=0.9, noise=0.0)
    first, second = render(still, [0.0, 2.0]).astype(int)
    agree = {shift: (abs(first[:, shift:] - second[:, : 168 - shift]).max(-1) < 3).mean() for shift in range(24)}
    best = sorted(agree, key=agree.get)[-2:]
    assert sorted(best) == [8, 16]  # the far layer, at half of the speed, and the ground


@pytest.mark.full
def test_a_clip_mostly_repeats_itself():
    for clip in [c for c in clips(30, pairs=8) if c.camera.motion == "still" and c.cut > 8]:
        frames = render(replace(clip, noise=0.0), times(clip)).astype(int)
        same = [(abs(a - b).max(-1) < 3).mean() for a, b in itertools.pairwise(frames)]
        assert np.mean(same) > 0.8


def test_pictures_have_the_spectrum_of_natural_ones():
    frames = [render(clip, [0.2])[0].mean(-1) for clip in clips(12, pairs=1)]
    power = np.mean([abs(np.fft.fft2(f - f.mean())) ** 2 for f in frames], axis=0)
    f = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.fftfreq(336)[None, :])
    bands = [(f >= low) & (f < 2 * low) for low in (0.01, 0.02, 0.04, 0.08)]
    slope = np.polyfit(range(4), np.log2([power[band].mean() for band in bands]), 1)[0]
    assert -3.2 < slope < -1.2  # 1/f in amplitude is -2


def test_leaves_have_power_law_sizes_and_noise_is_pink():
    radii = np.array([len(cover) / 2 for cover, _, _ in leaves()])
    assert 3 < np.log2((radii >= 5).sum() / (radii >= 20).sum()) < 5.5  # (20 / 5)^2 is 4 octaves
    assert pink_noise().std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("height", [8, 13, 24])
def test_characters_and_outlines_and_textures_differ(height):
    masks = [glyph_mask(c, height) for c in CHARACTERS]
    assert min(abs(a - b).sum() for i, a in enumerate(masks) for b in masks[:i]) > 0.02 * masks[0].size
    shapes = [outline_mask(o, height) for o in OUTLINES]
    assert min(abs(a - b).mean() for i, a in enumerate(shapes) for b in shapes[:i]) > 0.05
    fields = [texture_field(t, 2 * height, max(5, round(height / 2.2))) for t in TEXTURES]
    assert min(abs(a - b).mean() for i, a in enumerate(fields) for b in fields[:i]) > 0.15


def test_words_have_three_to_six_letters():
    assert len(set(WORDS)) == len(WORDS) > 300 and all(3 <= len(w) <= 6 and w.isalpha() and w.isupper() for w in WORDS)
    rng = np.random.default_rng(0)
    assert all(len(similar_text(t, rng)) == len(t) for t in ("42", "98765", "EXIT") for _ in range(20))


def test_what_changes_is_drawn_anew():
    thing = Thing("circle", "plain", "red", (200, 50, 45), 9, 40.0, 40.0, turn=2.0, after="blue")
    sign = Thing("sign", "plain", "green", (60, 165, 70), 8, 90.0, 40.0, text="EXIT", turn=2.0, after="OPEN")
    assert (thing_sprite(thing, True)[0] != thing_sprite(thing, False)[0]).any()
    clip = Clip((0, 4), 112, 168, 4.0, 4, (thing, sign), noise=0.0)
    before, after = render(clip, [1.0, 3.0])
    assert tuple(before[40, 40]) == (200, 50, 45) and tuple(after[40, 40]) == COLOURS["blue"]
    assert (before[30:50, 70:110] != after[30:50, 70:110]).any()


@pytest.mark.full
@pytest.mark.parametrize(("seed", "name"), [(1, "clip.mp4"), (0, "still.jpg")])
def test_a_written_file_says_which_world_it_is_of_and_is_as_large_as_the_clip(tmp_path, seed, name):
    clip = make_clip("validation", seed)
    write_file(clip, tmp_path / name, crf=28)
    info = probe(tmp_path / name)
    assert world_of(info) == "scenes" and (info.height, info.width) == (clip.height, clip.width)


@pytest.mark.full
@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 4), (16, 24)])
def test_clips_of_all_sizes_can_be_composed(height, width):
    """Small frames leave no room for a motion, in which case the thing stands still."""
    made = clips(60, height, width, pairs=6, crowd=2.0)
    assert all(len(clip.things) <= 40 for clip in made) and np.mean([len(clip.things) for clip in made]) > 2
    assert all(bool(t.speed) == (t.motion != "still") for clip in made for t in clip.things)

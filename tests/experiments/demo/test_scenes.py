"""The second world: clip contents, drawing, and frozen output."""

import pytest

from evoprune.bundled import DEMOS
from evoprune.video import probe
from experiments.demo.scenes.clip import COLOURS, Camera, Clip, Thing
from experiments.demo.scenes.compose import make_clip
from experiments.demo.scenes.drawing import NOTHING, render, render_with_map, write_file
from experiments.demo.scenes.scenery import thing_sprite


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
    assert sorted(best) == [8, 16]  # the far layer, at half the speed, and the ground


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
    assert DEMOS["demo-scenes"].made(info.tags) and (info.height, info.width) == (clip.height, clip.width)

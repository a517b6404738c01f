from dataclasses import replace

import numpy as np
import pytest

from evoprune.bundled import DEMOS
from experiments.demo.clips import SHAPES, Clip, Thing, make_clip
from experiments.demo.drawing import render, thing_mask, write_video

SETTINGS = [{}, {"height": 112, "width": 168}, {"height": 112, "width": 112, "seconds": 3.0, "grids": 3}]


def clips(count, split="validation", **how):
    return [make_clip(split, seed, **how) for seed in range(count)]


def painted(clip: Clip, thing: Thing, t: float) -> np.ndarray:
    """Return bool `[height, width]`: the pixels that change at time t if this object is left out."""
    with_it, without = (render(replace(clip, things=things), [t])[0].astype(int) for things in ((thing,), ()))
    return (with_it != without).any(-1)


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


@pytest.mark.parametrize("pan", [(8.0, 0.0), (-8.0, 0.0), (0.0, 5.0), (4.0, -6.0)])
def test_the_camera_moves_over_the_background_and_things_do_not(pan):
    thing = Thing("square", "red", (225, 40, 40), "large", 10, 60.0, 60.0, "still", 0.0)
    first, second = render(Clip((0, 1), 112, 168, 6.0, (thing,), 0.0, pan, clutter=300.0), [0.5, 2.5]).astype(int)
    assert (first[55:65, 55:65] == thing.rgb).all() and (second[55:65, 55:65] == thing.rgb).all()
    x, y = (int(2 * v) for v in pan)  # the content that was at (x, y) is now in the corner
    before = first[max(y, 0) : 112 + min(y, 0), max(x, 0) : 168 + min(x, 0)]
    after = second[max(-y, 0) : 112 - max(y, 0), max(-x, 0) : 168 - max(x, 0)]
    same = (before == after).all(-1)
    assert same.mean() > 0.9 and not (first == second).all(-1).mean() > 0.5


def test_a_written_video_shows_the_clip_and_says_where_it_is_from(tmp_path):
    import av

    clip = make_clip("samples", 0, seconds=1.0, grids=1)
    write_video(clip, tmp_path / "clip.mp4", fps=6)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.metadata["comment"] == DEMOS["demo"].tag
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

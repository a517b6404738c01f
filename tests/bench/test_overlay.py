"""The fates that an overlay reports for units, and how images and files show them."""

import io
from itertools import combinations

import av
import numpy as np
import pytest
import torch
from PIL import Image

from evoprune.bench.overlay import (
    MARK,
    Fates,
    Marks,
    Overlay,
    TracedVideo,
    light,
    png,
    wrap,
)
from evoprune.errors import UsageError
from evoprune.video import Plan, SamplingPlan, probe
from evoprune.video_qa import VideoQA

CLIP = "samples/square.mp4"


@pytest.fixture(scope="module")
def loaded():
    return VideoQA.load("demo").loaded


def traced(loaded, path=CLIP, **settings) -> TracedVideo:
    return TracedVideo.trace(VideoQA(loaded, **settings).session, path)


def test_reused_units_are_those_whose_pixels_are_older(loaded):
    seen = traced(loaded, budget=0.25, method="reuse+divprune")
    fates, units = seen.fates, torch.arange(144)
    assert fates.grid == (6, 4, 6) and seen.frames.shape == (12, 112, 168, 3) and seen.warnings == []
    assert fates.chosen.sum() == 36
    assert fates.encoded[:24].all() and (~fates.encoded).sum() > 72  # most of the clip does not change
    assert (fates.source <= units).all() and ((units - fates.source) % 24 == 0).all()
    assert fates.encoded[fates.source].all()  # a reused unit's source has been encoded
    assert torch.equal(fates.owner, fates.source) and fates.counts()["merged"] == 0
    assert fates.counts()["rows"] == fates.counts()["encoded"]


def test_merged_units_belong_to_a_row_of_their_frame_pair(loaded):
    fates, units = traced(loaded, budget=0.25, method="evoprune-merge").fates, torch.arange(144)
    assert torch.equal(fates.owner[fates.owner], fates.owner) and torch.equal(fates.owner // 24, units // 24)
    counts = fates.counts()
    assert counts["reused"] == 0 and counts["merged"] > 0 and counts["rows"] == 144 - counts["merged"]
    assert len(fates.owner.unique()) == counts["rows"]


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "method", ["evoprune", "evoprune:rows=1", "evoprune-merge", "reuse+divprune", "divprune", "pool"]
)
def test_each_unit_has_one_fate(loaded, method):
    fates = traced(loaded, budget=0.25, method=method).fates
    counts, masks = fates.counts(), torch.stack([fates.all_of(name) for name in Fates.NAMES])
    assert sum(counts[name] for name in Fates.NAMES) == counts["units"] == 144 and (masks.sum(0) == 1).all()
    assert torch.equal(fates.all_of("read"), fates.chosen)
    reused, merged, dropped = (fates.all_of(name) for name in Fates.NAMES[1:])
    assert not fates.encoded[reused].any() and fates.encoded[merged | dropped].all()
    assert (fates.owner[merged] >= 0).all()
    assert not (method.startswith("evoprune") and dropped.any())


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["evoprune", "evoprune:rows=1", "evoprune-merge"])
def test_the_owner_of_merged_units_has_a_dot(loaded, method):
    video = traced(loaded, budget=0.25, method=method)
    fates, panels, side = video.fates, Overlay(video, ""), 3 * 28  # width of a drawn unit
    owners = fates.owner[fates.all_of("merged")].unique().tolist()
    assert method != "evoprune" or not fates.encoded[owners].all()  # some were reused: the selection took a later time
    pictures = [np.asarray(panels.panel(2 * pair)).astype(int) for pair in range(6)]
    for owner in owners:
        pair, (y, x) = owner // 24, divmod(owner % 24, 6)
        assert tuple(pictures[pair][y * side + side // 2, x * side + side // 2]) == MARK


def test_lines_lead_to_owners_and_arrows_to_their_frame_pairs():
    """Three frame pairs of 1x3 units: the middle units go to the first unit, the last units to the first of their pair."""
    drawn, seen = [], painted()
    units = torch.arange(9)
    owner = torch.tensor([0, 0, 0, 3, 0, 3, 6, 0, 6])
    fates = Fates((3, 1, 3), owner == units, units, owner, 3)

    class Recorded(Marks):
        def line(self, start, end):
            drawn.append(("line", start, end))

        def dot(self, y, x):
            drawn.append(("dot", (y, x)))

        def arrow(self, y, x, later):
            drawn.append(("arrow", (y, x), later))

    sampling = SamplingPlan.even(0.0, 3.0, 6)
    plan = Plan(probe(CLIP), sampling, 28, 84, (3, 1, 3), 768, 1000, False)
    panels = Overlay(TracedVideo(plan, seen.frames[:1].expand(6, -1, -1, -1), fates, [], 0), "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evoprune.bench.overlay.Marks", Recorded)
        panels.panel(0)
        assert drawn == [("line", (0, 1), (0, 0)), ("line", (0, 2), (0, 0)), ("dot", (0, 0))]
        drawn.clear()
        panels.panel(2)
        assert drawn == [("line", (0, 2), (0, 0)), ("arrow", (0, 1), False), ("dot", (0, 0))]


def test_the_picture_is_seen_under_every_fate_but_dropped():
    """A brightness step in the video keeps at least two fifths of its size in the overlay."""
    dark, bright = (np.full((1, 4, 3), level, np.uint8) for level in (60, 160))
    steps = (light(bright, np.arange(4)[None]).astype(int) - light(dark, np.arange(4)[None]))[0].min(1)
    assert (
        dict(zip(Fates.NAMES, steps.tolist(), strict=True)).items() >= {"read": 72, "reused": 40, "merged": 50}.items()
    )


def test_what_is_drawn_is_what_the_language_model_reads(loaded):
    qa = VideoQA(loaded, budget=0.1)
    kept = qa.encode(CLIP).encoded.kept
    assert torch.equal(TracedVideo.trace(qa.session, CLIP).fates.chosen.nonzero().flatten(), kept)


def test_a_method_that_makes_the_input_smaller(loaded):
    seen = traced(loaded, budget=0.34, method="subsample")
    assert seen.fates.grid == (2, 4, 6) and len(seen.frames) == 4 and seen.fates.chosen.all()


def test_a_method_that_reads_the_question(loaded):
    with pytest.raises(UsageError, match="reads the question, and an overlay has no question"):
        traced(loaded, method="dart")


def painted() -> TracedVideo:
    """Return the trace of a clip with two gray frame pairs of 1x3 units.

    Unit 0 is read, unit 1 merges into unit 4, units 2 and 4 are dropped, unit 3 is read with the row of unit 0, and unit 5 is
    reused from unit 2.
    """
    chosen = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool)
    source, owner = torch.tensor([0, 1, 2, 0, 4, 2]), torch.tensor([0, 4, 2, 0, 4, 2])
    sampling = SamplingPlan.even(0.0, 2.0, 4)
    plan = Plan(probe(CLIP), sampling, 28, 84, (2, 1, 3), 768, 100, False)
    frames = torch.full((4, 28, 84, 3), 100, dtype=torch.uint8)
    return TracedVideo(plan, frames, Fates((2, 1, 3), chosen, source, owner, 4), [], 0)


def test_panels_show_the_fates():
    panels = Overlay(painted(), "")
    first, second = (np.asarray(panels.panel(frame)).astype(int) for frame in (0, 2))
    side = 4 * 28  # a small frame is drawn four times as large
    assert first.shape == (side, 3 * side, 3)

    def pixel(picture, unit, down=0.3, across=0.3):
        return picture[int(down * side), int((unit + across) * side)]

    assert (pixel(first, 0) == pixel(second, 0)).all()  # both are read, whichever was encoded
    read, dropped, merged, reused = pixel(first, 0), pixel(first, 2), pixel(first, 1), pixel(second, 2)
    assert read.min() > dropped.max() + 50 and np.ptp(read) == np.ptp(dropped) == 0
    assert reused[2] > reused[0] + 50 and merged[0] > merged[2] + 50  # blue, orange
    assert tuple(pixel(second, 1, 0.5, 0.5)) == MARK  # the owner's dot
    assert tuple(pixel(first, 1, 0.5, 0.5)) == MARK  # the arrow to its frame pair
    assert np.ptp(pixel(first, 2, 0.5, 0.5)) == 0
    assert panels.caption(0) == "0:00.25: 1 read, 0 reused, 1 merged, 1 dropped"


# How colour-blind people see colours: linear RGB to linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "most": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LEVELS = [(0, 0, 0), (40, 40, 40), (128, 128, 128), (255, 255, 255), (120, 170, 240), (240, 170, 60), (10, 20, 90)]


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_colours_of_fates_are_distinct(eyes, level):
    drawn = light(np.full((1, 4, 3), level, np.uint8), np.arange(4)[None])[0]
    seen = cielab(drawn / 255, np.asarray(EYES[eyes]))
    assert (
        min(np.linalg.norm(one - other) for one, other in combinations(seen, 2)) > 12
    )  # a difference of 2 is visible side by side


def cielab(colours, eyes):
    """Convert sRGB colours between 0 and 1, as seen by some eyes, to CIELAB `[n, 3]`."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4) @ eyes.T
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    share = linear.clip(0, 1) @ to_xyz.T / to_xyz.sum(1)
    x, y, z = np.where(share > 0.008856, np.cbrt(share), 7.787 * share + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


@pytest.mark.parametrize("pairs", [1, 2, 5, 12, 40])
def test_sheets_hold_at_most_twelve_frame_pairs(pairs):
    seen = painted()
    sampling = SamplingPlan.even(0.0, 2.0, 2 * pairs)
    fates = Fates((pairs, 1, 3), torch.ones(3 * pairs, dtype=torch.bool), *[torch.arange(3 * pairs)] * 2, 3 * pairs)
    plan = Plan(probe(CLIP), sampling, 28, 84, (pairs, 1, 3), 768, 1000, False)
    video = TracedVideo(plan, seen.frames[:1].expand(2 * pairs, -1, -1, -1), fates, [], 0)
    bright = (np.asarray(Overlay(video, "title").sheet()) == 142).all(
        2
    )  # a read grey frame, and a swatch in the legend
    assert bright.sum() == pytest.approx(min(pairs, 12) * 3 * 112 * 112, rel=0.2)


def test_frames_are_of_one_even_size_and_a_long_title_wraps():
    assert wrap("", 300, 20) == [] and wrap("ab", 1, 20) == ["a", "b"]  # text that is too wide on its own is broken
    short, long = (list(Overlay(painted(), title).frames()) for title in ("t", "a long title " * 20))
    (width, height), (long_width, long_height) = {p.size for p in short}.pop(), {p.size for p in long}.pop()
    assert len({p.size for p in short}) == len({p.size for p in long}) == 1
    assert width % 2 == height % 2 == long_height % 2 == 0 and width == long_width and long_height > height + 50


@pytest.mark.full
def test_a_sheet_keeps_its_colours_as_png_and_is_small():
    grain = np.random.default_rng(0).normal(0, 9, (320, 400, 3))
    pixels = np.clip(np.linspace(20, 220, 400)[None, :, None] + grain, 0, 255).astype(np.uint8)
    pixels[:8], pixels[8:16] = (255, 51, 139), (255, 231, 51)  # outlines are few pixels among many
    content = png(Image.fromarray(pixels))
    read = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    assert content.startswith(b"\x89PNG") and len(content) < 0.4 * pixels.size
    assert np.abs(read[:16] - pixels[:16]).max() <= 2 and np.abs(read - pixels).mean() < 8


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_films_last_as_long_as_the_video(ending):
    pictures = list(Overlay(painted(), "t").frames())
    with av.open(io.BytesIO(painted().draw("t", ending))) as file:
        frames = list(file.decode(video=0))
        assert [float(frame.time) for frame in frames] == [0.0, 0.5, 1.0, 1.5] and file.duration == 2_000_000
    if ending == ".gif":
        assert Image.open(io.BytesIO(painted().draw("t", ending))).info["loop"] == 0
    for frame, picture in zip(frames, pictures, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - np.asarray(picture)).mean() < 4


@pytest.mark.few(1)
@pytest.mark.parametrize("ending", [".png", ".gif", ".mp4"])
def test_the_same_video_gives_the_same_bytes(ending):
    assert painted().draw("t", ending) == painted().draw("t", ending)

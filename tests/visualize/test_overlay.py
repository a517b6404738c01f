"""What an overlay says of each unit, and whether the pictures and files show it."""

import io
import string

import av
import numpy as np
import pytest
import torch

from evoprune.errors import UsageError
from evoprune.pipeline.opening import open_video
from evoprune.pipeline.video_qa import VideoQA
from evoprune.video.plan import Plan
from evoprune.video.sampling import SamplingPlan, even_times
from evoprune.visualize import film
from evoprune.visualize.fates import Fates, Look, look_at
from evoprune.visualize.lettering import GLYPHS, text_mask
from evoprune.visualize.overlay import GAP, Drawing, as_file

CLIP = "samples/square.mp4"


@pytest.fixture(scope="module")
def loaded():
    return VideoQA.load("demo").loaded


def look(loaded, path=CLIP, **settings) -> Look:
    return look_at(open_video(VideoQA(loaded, **settings).engine, path))


def test_every_unit_has_one_fate(loaded):
    seen = look(loaded, budget=0.25, method_args={"depth": "1", "encoder_budget": "0.2"})
    fates, units = seen.fates, torch.arange(144)
    assert fates.grid == (6, 4, 6) and seen.frames.shape == (12, 112, 168, 3) and seen.warnings == []
    assert fates.chosen.sum() == 36
    assert not fates.reused[:24].any() and fates.reused.sum() > 72  # most of the clip stands still
    assert (fates.source <= units).all() and ((units - fates.source) % 24 == 0).all()
    assert not fates.reused[fates.source].any()  # what stands for others has been encoded
    assert torch.equal(fates.owner[fates.owner], fates.owner)
    assert torch.equal(fates.owner, fates.owner[fates.source])  # and goes where its reference goes
    counts = fates.counts()
    assert counts["merged"] > 0 and counts["rows"] == 144 - counts["reused"] - counts["merged"]
    assert len(fates.owner.unique()) == counts["rows"]


def test_what_is_chosen_inside_the_tower_may_be_a_time_when_nothing_changed(loaded):
    fates, units = look(loaded, budget=0.25).fates, torch.arange(144)
    assert fates.rows == fates.chosen.sum() == 36 and fates.chosen[fates.owner].all()
    assert torch.equal(fates.owner == units, fates.chosen)
    assert (fates.chosen & fates.reused).any() and fates.merged.any()
    assert not fates.merged[fates.chosen].any() and not fates.merged[fates.reused].any()


def test_what_is_drawn_is_what_the_language_model_reads(loaded):
    qa = VideoQA(loaded, budget=0.1)
    kept = qa.encode(CLIP).encoded.kept
    assert torch.equal(look_at(open_video(qa.engine, CLIP)).fates.chosen.nonzero().flatten(), kept)


def test_methods_after_the_encoder(loaded):
    pooled = look(loaded, budget=0.25, method="pool").fates
    assert not pooled.reused.any() and pooled.rows == 144
    assert pooled.chosen[pooled.owner].all() and pooled.merged.sum() == 144 - pooled.chosen.sum()
    picked = look(loaded, budget=0.25, method="divprune").fates
    assert picked.chosen.sum() == 36 and not picked.merged.any() and not picked.reused.any()


def test_a_method_that_makes_the_input_smaller(loaded):
    seen = look(loaded, budget=0.34, method="subsample")
    assert seen.fates.grid == (2, 4, 6) and len(seen.frames) == 4 and seen.fates.chosen.all()


def test_a_method_that_reads_the_question(loaded):
    with pytest.raises(UsageError, match="chooses for a question"):
        look(loaded, method="dart")


def painted() -> Look:
    """Two grey grids of 1x3 units: 0 is read, 1 goes into 4, 2 is neither; 3 is read from 0, 4 is merged, 5 is reused."""
    chosen = torch.tensor([1, 0, 0, 1, 0, 0], dtype=torch.bool)
    source, owner = torch.tensor([0, 1, 2, 0, 4, 2]), torch.tensor([0, 4, 2, 0, 4, 2])
    sampling = SamplingPlan(0.0, 2.0, even_times(0.0, 2.0, 4), 4)
    plan = Plan(sampling, 28, 84, (2, 1, 3), 768, 100, False)
    frames = torch.full((4, 28, 84, 3), 100, dtype=torch.uint8)
    return Look(plan, frames, Fates((2, 1, 3), chosen, source, owner, 4), [], 0)


def test_the_picture_shows_it():
    drawing = Drawing(painted(), "t")
    first, second = (list(drawing.film())[frame] for frame in (0, 2))
    side = 4 * 28  # drawn four times as large, below one line of title
    top = GAP + 20 + GAP // 2

    def pixel(picture, unit, down=0.3, across=0.3):
        return picture[top + int(down * side), GAP + int((unit + across) * side)].astype(int)

    read, dark = pixel(first, 0), pixel(first, 2)
    assert read.min() > dark.max() + 50 and np.ptp(read) == np.ptp(dark) == 0
    bright_blue, dark_blue = pixel(second, 0), pixel(second, 2)
    assert all(blue[2] > blue[0] + 30 for blue in (bright_blue, dark_blue)) and bright_blue.min() > dark_blue.min()
    edge, other_edge = pixel(first, 1, across=0.005), pixel(second, 1, across=0.005)
    assert (edge == other_edge).all() and np.ptp(edge) > 100  # one colour in both grids
    assert (
        np.ptp(pixel(first, 1, 0.5, 0.5)) == 0 and np.ptp(pixel(second, 1, 0.5, 0.5)) > 100
    )  # the dot, where the row is
    assert np.ptp(pixel(first, 2, across=0.005)) == 0


@pytest.mark.parametrize("grids", [1, 2, 5, 12, 40])
def test_sheets_hold_at_most_twelve_grids(grids):
    seen = painted()
    sampling = SamplingPlan(0.0, 2.0, even_times(0.0, 2.0, 2 * grids), 2 * grids)
    fates = Fates((grids, 1, 3), torch.ones(3 * grids, dtype=torch.bool), *[torch.arange(3 * grids)] * 2, 3 * grids)
    plan = Plan(sampling, 28, 84, (grids, 1, 3), 768, 1000, False)
    sheet = Drawing(Look(plan, seen.frames[:1].expand(2 * grids, -1, -1, -1), fates, [], 0), "title").sheet()
    bright = (sheet == 130).all(2)  # what is read of grey frames, and a swatch in the legend
    assert bright.sum() == pytest.approx(min(grids, 12) * 3 * 112 * 112, rel=0.2)


def test_a_picture_survives_png():
    picture = np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8)
    content = film.png(picture)
    assert content.startswith(b"\x89PNG")
    with av.open(io.BytesIO(content)) as file:
        assert np.array_equal(next(file.decode(video=0)).to_ndarray(format="rgb24"), picture)


@pytest.mark.parametrize("ending", [".gif", ".mp4"])
def test_films_last_as_long_as_the_video(ending):
    pictures = list(Drawing(painted(), "t").film())
    with av.open(io.BytesIO(as_file(painted(), "t", ending))) as file:
        frames = list(file.decode(video=0))
        assert [float(frame.time) for frame in frames] == [0.0, 0.5, 1.0, 1.5] and file.duration == 2_000_000
    for frame, picture in zip(frames, pictures, strict=True):
        assert np.abs(frame.to_ndarray(format="rgb24").astype(int) - picture).mean() < 4


def test_letters():
    used = string.ascii_letters + string.digits + ".,:;-_/()%=+ "
    assert set(used) == set(GLYPHS) and len({glyph.tobytes() for glyph in GLYPHS.values()}) == len(GLYPHS)
    assert text_mask("ab", 2).shape == (20, 24) and not text_mask(" ").any()
    assert text_mask("é").sum() > text_mask("M").sum()  # a block, so that it is seen that something is missing

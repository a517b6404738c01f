"""Test the contact sheet, which has one panel per moment, in order of time, showing the moment's best frame."""

import io

import numpy as np
from PIL import Image

from evoprune import Moment
from evoprune.bench.overlay import BACKGROUND
from evoprune.bench.sheet import PANEL, contact_sheet
from evoprune.video import probe
from tests.video.files import write_video

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def test_the_best_frames_are_drawn_in_order_of_time(tmp_path):
    frames = [np.full((360, 640, 3), COLOURS[second], np.uint8) for second in range(3) for _ in range(5)]
    info = probe(write_video(tmp_path / "colours.mp4", frames, fps=5))
    moments = [
        Moment("a very long query, which takes several lines below its image", 2.0, 3.0, 0.9, 2.5),
        Moment("a", 0.0, 1.0, 0.9, 0.5),
        Moment("b", 1.0, 2.0, 0.9, 1.5),
    ]
    picture = Image.open(io.BytesIO(contact_sheet(info, moments, "colours.mp4")))
    assert picture.info["Software"] == "evoprune contact sheet"
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    places = []
    for colour in COLOURS:
        rows, columns = np.nonzero(np.abs(pixels - colour).sum(2) < 40)
        assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == (PANEL[0], PANEL[0] * 9 // 16)
        places.append((rows.min(), columns.min()))
    assert places == sorted(places) and len(set(places)) == 3
    assert tuple(pixels[0, 0]) == BACKGROUND


def test_one_upright_frame(tmp_path):
    info = probe(write_video(tmp_path / "tall.mp4", [np.full((96, 48, 3), 128, np.uint8)] * 2))
    content = contact_sheet(info, [Moment("a", 0.0, 0.2, 1.0, 0.1)], "tall.mp4")
    assert Image.open(io.BytesIO(content)).height > 96

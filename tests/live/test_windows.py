"""A windower turns any sequence of frames into windows: each frame is in one window, and windows follow each other."""

import random
from math import floor

import numpy as np
import pytest

from evoprune.errors import UsageError
from evoprune.live.windows import Windower
from evoprune.session import load_model
from evoprune.video import SamplingOptions, Video
from evoprune.video_qa import VideoQA

WINDOW_S, STEP_S, SIZE = 2.0, 0.5, 4


@pytest.fixture(scope="module")
def session():
    return VideoQA(load_model("demo", pack=False), budget=0.25).session


@pytest.fixture
def windower(session):
    info = Video("frames", WINDOW_S, 56, 56, 0, "raw", None, "stream", None, None, None, 0.0)
    plan = session.loaded.description.plan(info, SamplingOptions(fps=1 / STEP_S), session.pruning, "frames")
    assert (plan.sampling.frames, plan.sampling.seconds_per_frame) == (SIZE, STEP_S)
    return Windower(session, plan, 10.0)


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def go_on():
    pass


@pytest.mark.parametrize("seed", range(3))
def test_each_frame_that_is_used_is_in_one_window(windower, seed):
    """Times, flushes, and looks are random. The expected windows are computed from the times of the frames alone."""
    rng, finished, expected, slots = random.Random(seed), [], [], []
    time_s, done = 10.0, 0

    def ends(end):
        nonlocal slots, done
        expected.append((len(slots), end))
        slots, done = [], end

    for number in range(30):
        slot = floor((time_s - 10.0) / STEP_S + 1e-6)
        if slots and slot // SIZE > slots[-1] // SIZE:
            ends((slots[-1] // SIZE + 1) * SIZE)
        used = slot >= done and not (slots and slot <= slots[-1])
        assert windower.add(noise(number), time_s, go_on, finished.append) is used
        if used:
            slots.append(slot)
            if slot % SIZE == SIZE - 1:
                ends(slot + 1)
        if rng.random() < 0.2:
            window, _ = windower.look(go_on)
            assert (window and (window.frames, window.end)) == ((len(slots), slots[-1] + 1) if slots else None)
            assert windower.look(go_on) == (window, False)
        if rng.random() < 0.1:
            if slots:
                ends(slots[-1] + 1)
            windower.flush(go_on, finished.append)
        assert windower.until_s == (10.0 + (slots[-1] + 1) * STEP_S if slots else None)
        time_s += rng.choice([0.1, 0.5, 0.5, 0.5, 0.9, 3.0])
    assert [(each.frames, each.end) for each in finished] == expected
    assert windower.count == sum(count for count, _ in expected) + len(slots)
    starts = [each.window.time for each in finished]
    assert starts == sorted(set(starts))
    with pytest.raises(UsageError, match="comes after"):
        windower.add(noise(0), time_s - 9.0, go_on, finished.append)


def test_a_window_that_was_looked_at_is_not_encoded_again(windower):
    layers, finished = [], []

    def pause():
        layers.append(1)

    for number in range(3):
        windower.add(noise(number), 10.0 + number / 2, pause, finished.append)
    assert not layers
    window, fresh = windower.look(pause)
    count = len(layers)
    assert fresh and count and windower.look(pause) == (window, False)
    windower.flush(pause, finished.append)
    assert len(layers) == count and finished[0].encoding is window.encoding and windower.look(pause) == (None, False)


def test_a_window_whose_encoding_stops_is_lost_and_the_next_one_is_not(windower):
    finished = []

    def stop():
        raise UsageError("stopped")

    def feed(pause, start):
        for number in range(4):
            windower.add(noise(start + number), 10.0 + (start + number) / 2, pause, finished.append)

    with pytest.raises(UsageError, match="stopped"):
        feed(stop, 0)
    assert not finished and windower.until_s is None
    feed(go_on, 4)
    assert [(each.frames, each.end) for each in finished] == [(4, 8)]
    windower.add(noise(8), 14.0, go_on, finished.append)
    windower.clear()
    assert windower.until_s is None and windower.look(go_on) == (None, False)

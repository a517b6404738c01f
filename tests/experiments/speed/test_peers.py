"""The inputs of the comparison with other programs, and the memory of a process while it loads a model."""

import numpy as np
import torch

from experiments.speed.loading import Watch
from experiments.speed.peers import _generated, _of_video, _row


def test_generated_frames_are_the_same_for_all_programs(tmp_path):
    from PIL import Image

    given = _generated(tmp_path / "frames", 2, 28, 56)
    theirs = given.theirs()
    frames = np.fromfile(theirs["raw"], np.uint8).reshape(theirs["shape"])
    ours = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "frames").iterdir())]
    assert given.ours == {"path": str(tmp_path / "frames")} and np.array_equal(frames, np.stack(ours))


def test_other_programs_get_the_frames_that_evoprune_samples(tmp_path):
    given = _of_video("demo", "samples/square.mp4:1:4", tmp_path)
    assert given.ours == {"path": "samples/square.mp4", "end_s": 1.0, "frames": 4}
    assert given.title.startswith("4 frames of ")
    theirs = given.theirs()
    frames = np.fromfile(theirs["raw"], np.uint8).reshape(theirs["shape"])
    assert len(frames) == 4 and frames.shape[3] == 3 and theirs["read"] > 0
    assert frames.std() > 1 and not np.array_equal(frames[0], frames[-1])


def test_a_row_adds_reading_to_the_first_token():
    found = {"visual": 60, "encode": 2.0, "prefill": 1.0, "token": 0.5, "load": 9.0, "peak_gib": 3.0}
    assert _row("evoprune int8 -b 0.1", [found | {"read": 4.0}])[3:8] == ["4.00", "2.00", "1.00", "7.00", "0.500"]
    assert _row("evoprune int8 -b 0.1", [found | {"read": None}])[3:9] == ["-", "2.00", "1.00", "3.00", "0.500", "66.5"]
    assert _row("llama.cpp", [{"error": "not done in 5 s", "read": None}])[-1] == "not done in 5 s"


def test_the_largest_memory_is_recorded():
    with Watch() as watch:
        held = torch.ones(2**28, dtype=torch.uint8)
    assert 2**28 < watch.own <= watch.resident
    del held

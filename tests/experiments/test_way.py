"""The way of a video to an answer: which classes there are, how many, and how often its frames come back to a file."""

import numpy as np
import torch

from evoprune.language.pruned import PrunedPrompt
from evoprune.session.answers import Answer
from evoprune.video.plan import Plan
from evoprune.vision.encoder import Encoded
from experiments.way import followed, grouped, has_data, returns


def test_a_question_makes_no_more_classes_and_returns_than_it_did():
    made, walk = followed()
    assert made[Answer] == made[Encoded] == 1 and made[Plan] and made[PrunedPrompt]
    counts = {name: len(kinds) for name, kinds in grouped(made).items()}
    most = {"the way itself": 39, "options and reports": 14, "the reader's process": 4}
    assert all(counts[name] <= most[name] for name in most), counts
    order = [walk.files.index(file) for file in ("video/frames", "vision/encoder", "methods/chain", "language/pruned")]
    assert order == sorted(order)
    assert returns(walk.files) <= 12 and returns(walk.packages) <= 7, walk.files


def test_data_are_bytes_and_numbers_that_are_no_indices():
    assert has_data(torch.zeros(1)) and has_data(np.zeros(1, np.uint8)) and has_data([{"rows": torch.zeros(1)}])
    assert not has_data(torch.zeros(1, dtype=torch.int64)) and not has_data(torch.nn.Linear(1, 1)) and not has_data("a")
    assert returns(["video", "vision", "methods", "vision", "video"]) == 2

"""The classes between a video and an answer: which there are, and how many."""

from evoprune.language.pruned import PrunedPrompt
from evoprune.session.answering import Answer
from evoprune.video.plan import Plan
from evoprune.vision.encoder import Encoded
from experiments.way import grouped, made_by_a_question


def test_a_question_makes_no_more_classes_than_it_did():
    made = made_by_a_question()
    assert made[Answer] == made[Encoded] == 1 and made[Plan] and made[PrunedPrompt]
    counts = {name: len(kinds) for name, kinds in grouped(made).items()}
    most = {"the way itself": 39, "options and reports": 14, "the reader's process": 4}
    assert all(counts[name] <= most[name] for name in most), counts

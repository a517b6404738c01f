"""Lessons of the second world, for training alone: how a letter and the text of its option belong together.

A model that has never read text does not find out from questions about pictures alone that it should answer with the letter of the
option that says what it sees. Imported by `scenes_batches`.
"""

import numpy as np
import torch

from evoprune.demo.scenes.asking import OPTIONS, Question, ask
from evoprune.demo.scenes.compose import SPLITS, compose
from evoprune.demo.scenes.happening import kinds
from experiments.demo.batches import packed
from experiments.demo.build import BEFORE_VIDEO
from experiments.demo.scenes_model import prompt, said

GROUPS = ("text", "look", "place", "count", "gist", "events", "motion", "moment", "choice", "open", "match", "recite")
LETTERS = "ABCD"
LESSONS = 0.15  # share of the questions with options in the third stage that are lessons
MATCH = 0.6  # share of lessons that ask for a letter
BATCH = 60  # lessons a step of the second stage


def lesson(question: Question, rng: np.random.Generator) -> Question:
    """A question with options, asked so that its text alone answers it: which option says this, or what an option says."""
    _, *options, request = prompt(question).rsplit("\n", OPTIONS + 1)
    if rng.random() < MATCH:
        asked = f"Which option is {question.answer}?"
        return Question("match", "\n".join([asked, *options, request]), said(question), question.options, ("match",))
    at = int(rng.integers(OPTIONS))
    asked = "\n".join([f"What is option {LETTERS[at]}?", *options])
    return Question("recite", asked, question.options[at], question.options, ("recite",))


def text_batches(recipe, tokenizer, first: int, rank: int = 0):
    """Stage 2: lessons without a clip, as dicts of tensors, for ever."""
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    before, step = ids(BEFORE_VIDEO)[:-1], first
    while True:
        rng, asked = np.random.default_rng((recipe.seed, 3, step, rank)), []
        while len(asked) < BATCH:
            pairs = int(rng.choice([1, 4]))
            clip = compose((SPLITS["train"], int(rng.integers(2**40, 2**62))), 4, 6, pairs, float(pairs), crowd=1.5)
            asked += [lesson(q, rng) for q in ask(clip, rng, 14, kinds(clip), choice=1.0) if q.options]
        asked = asked[:BATCH]
        yield {
            "prefix": torch.tensor(before),
            "slots": torch.zeros(len(before), dtype=torch.bool),
            "where": torch.arange(len(before)).expand(3, -1),
            "pack": packed([asked], ids, len(before)),
            "groups": numbered_groups([asked]),
        }
        step += 1


def numbered_groups(asked: list[list[Question]]) -> torch.Tensor:
    """Which groups each question counts in, by its number `64 * prompt + segment`: bool `[64 * (prompts + 1), groups]`."""
    member = torch.zeros(64 * (len(asked) + 1), len(GROUPS), dtype=torch.bool)
    for row, questions in enumerate(asked):
        for segment, q in enumerate(questions, 1):
            for group in q.groups:
                if group in GROUPS:
                    member[64 * row + segment, GROUPS.index(group)] = True
    return member

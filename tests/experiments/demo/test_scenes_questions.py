"""Questions about scenes are balanced, and cannot be guessed; test_frozen.py holds the answers."""

from collections import Counter, defaultdict
from functools import cache

import numpy as np

from experiments.demo.questions import Question
from experiments.demo.scenes.asking import ask
from experiments.demo.scenes.clip import Clip
from experiments.demo.scenes.compose import make_clip
from experiments.demo.scenes.happening import types_for

CLIPS = 700


@cache
def asked() -> list[tuple[Clip, Question]]:
    """Six questions about each of many clips, as an evaluation asks them."""
    made = []
    for seed in range(CLIPS):
        clip = make_clip("validation", seed)
        made += [(clip, q) for q in ask(clip, np.random.default_rng(seed), 6, types_for(clip))]
    return made


def test_a_question_has_four_options_or_none_and_one_is_the_answer():
    for clip, q in asked():
        assert len(q.options) in (0, 4) and len(set(q.options)) == len(q.options)
        assert not q.options or q.answer in q.options
        kinds = "picture" if clip.is_still else "video", "choice" if q.options else "open"
        assert (q.groups[0], q.groups[-1]) == kinds and not (clip.is_still and "moment" in q.groups)
    share = np.mean([bool(q.options) for _, q in asked() if q.answer not in ("yes", "no")])
    assert 0.7 < share < 0.9


def test_letters_are_balanced():
    counts = Counter(q.options.index(q.answer) for _, q in asked() if q.options)
    assert all(0.22 < counts[i] / counts.total() < 0.28 for i in range(4))


def test_answers_can_not_be_guessed():
    """The best that the texts of questions and options allow, learned on half of the clips and tried on the other half."""
    right = defaultdict(lambda: [1.0, 4.0])
    most: dict[str, Counter] = defaultdict(Counter)
    half, guesses, open_guesses, yes_or_no = len(asked()) // 2, [], [], []
    for _, q in asked()[:half]:
        most[q.type][q.answer] += 1
        for option in q.options:
            right[q.type, option][0] += option == q.answer
            right[q.type, option][1] += 1
    for _, q in asked()[half:]:
        if q.options:
            odds = [right[q.type, option][0] / right[q.type, option][1] for option in q.options]
            guesses.append(q.options[int(np.argmax(odds))] == q.answer)
        elif q.answer in ("yes", "no"):
            yes_or_no.append(most[q.type].most_common(1)[0][0] == q.answer)
        else:
            open_guesses.append(most[q.type].most_common(1)[0][0] == q.answer)
    assert np.mean(guesses) < 0.32 and np.mean(open_guesses) < 0.3 and np.mean(yes_or_no) < 0.58

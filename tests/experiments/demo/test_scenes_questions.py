"""Questions about scenes: each answer is worked out again, answers are balanced, and cannot be guessed."""

import itertools
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest

from experiments.demo.questions import Question
from experiments.demo.scenes.asking import ask
from experiments.demo.scenes.clip import COLOURS, OUTLINES, TEXTURES, Clip, Thing
from experiments.demo.scenes.compose import make_clip
from experiments.demo.scenes.happening import CHECKED_OVER_TIME, GIST, HAPPENING, types_for
from experiments.demo.scenes.looking import CHECKED, LOOKING

pytestmark = pytest.mark.full  # users never run it, and test_frozen.py and test_scenes.py hold what it makes
CLIPS = 700


@cache
def clip_of(seed: int) -> Clip:
    return make_clip("validation", seed)


@cache
def asked() -> list[tuple[Clip, Question]]:
    """Six questions about each of many clips, as an evaluation asks them."""
    made = []
    for seed in range(CLIPS):
        clip = clip_of(seed)
        made += [(clip, q) for q in ask(clip, np.random.default_rng(seed), 6, types_for(clip))]
    return made


@cache
def of_type(type: str) -> list[tuple[Clip, Question]]:
    """All that can be asked of a type about some clips."""
    clips = map(clip_of, range(200))
    fitting = ((clip, found[type]) for clip in clips if type in (found := types_for(clip)))
    made = [(clip, q) for clip, kind in fitting for q in ask(clip, np.random.default_rng(clip.seed), 9, {type: kind})]
    assert len(made) > 10
    return made


def fits(thing: Thing, words: list[str]) -> bool:
    colours = thing.colours if not thing.is_sign else (thing.colour,)
    return all(w in (thing.outline, thing.texture, "thing") or w in colours for w in words) and (
        thing.is_sign == ("sign" in words)
    )


def referred(clip: Clip, text: str) -> Thing:
    found = [t for t in clip.things if fits(t, text.split())]
    assert len(found) == 1, (text, clip.things)
    return found[0]


def between(question: Question, *pairs: tuple[str, str]) -> str:
    for before, after in pairs:
        if question.question.startswith(before) and question.question.endswith(after):
            return question.question[len(before) : len(question.question) - len(after)]
    raise AssertionError(question)


def named(clip: Clip, text: str) -> list[Thing]:
    """The shapes that `red star` names."""
    colour, outline = text.split()
    return [t for t in clip.shapes if t.outline == outline and colour in t.colours]


def test_a_question_has_four_options_or_none_and_one_is_the_answer():
    for clip, q in asked():
        assert len(q.options) in (0, 4) and len(set(q.options)) == len(q.options)
        assert not q.options or q.answer in q.options
        assert q.groups[0] == ("picture" if clip.is_still else "video") and q.groups[-1] == (
            "choice" if q.options else "open"
        )
    share = np.mean([bool(q.options) for _, q in asked() if q.answer not in ("yes", "no")])
    assert 0.7 < share < 0.9


def test_letters_are_balanced():
    counts = Counter(q.options.index(q.answer) for _, q in asked() if q.options)
    assert all(0.22 < counts[i] / counts.total() < 0.28 for i in range(4))


def test_some_questions_about_videos_are_about_a_flash():
    brief = ["moment" in q.groups for clip, q in asked() if not clip.is_still]
    assert 0.05 < np.mean(brief) < 0.15
    assert not any("moment" in q.groups for clip, q in asked() if clip.is_still)


@pytest.mark.parametrize(
    ("first", "types"),
    [(0, {*LOOKING, *CHECKED}), (1, {*GIST, *HAPPENING, *CHECKED_OVER_TIME})],
    ids=["picture", "video"],
)
def test_all_types_can_be_asked(first, types):
    rng, found = np.random.default_rng(0), set()
    for seed in range(first, 400, 2):
        clip = clip_of(seed)
        found |= {name for name, kind in types_for(clip).items() if name not in found and [*kind.make(clip, rng)]}
    assert found == types


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


def test_what_signs_say():
    for clip, q in of_type("read"):
        name = between(q, ("What does the ", " say?"), ("What is written on the ", "?"))
        assert referred(clip, name).text == q.answer
    for clip, q in of_type("sign_colour"):
        text = between(q, ("What colour is the sign that says ", "?"))
        assert [t.colour for t in clip.signs if t.text == text] == [q.answer]


@pytest.mark.parametrize(
    ("type", "values", "phrases"),
    [
        ("colour", COLOURS, (("What colour is the ", "?"), ("Which colour does the ", " have?"))),
        ("texture", TEXTURES, (("What pattern does the ", " have?"),)),
        ("outline", OUTLINES, (("What shape is the ", "?"),)),
    ],
)
def test_looks(type, values, phrases):
    for clip, q in of_type(type):
        assert getattr(referred(clip, between(q, *phrases)), type) == q.answer and {q.answer, *q.options} <= set(values)


def test_where_and_what_lies_on_what():
    for clip, q in of_type("where"):
        thing = referred(clip, between(q, ("Where is the ", "?")))
        assert (
            q.answer
            == f"{'top' if thing.y < clip.height / 2 else 'bottom'} {'left' if thing.x < clip.width / 2 else 'right'}"
        )
    for clip, q in of_type("top"):
        below = clip.things.index(referred(clip, between(q, ("What lies on top of the ", "?"))))
        assert [t.under for t in named(clip, q.answer)] == [below]
        others = [t for option in q.options if option != q.answer for t in named(clip, option)]
        assert all(t.under != below for t in others)


def test_counts():
    for clip, q in of_type("count"):
        what = between(q, ("How many ", " are there?"))
        word = what.removesuffix(" things")
        word = {"crosses": "cross"}.get(word, word.removesuffix("s") if word == what else word)
        assert str(sum(word in (t.outline, t.texture, t.colour) for t in clip.shapes)) == q.answer


def test_one_of_four_is_there_or_missing():
    for clip, q in of_type("there"):
        assert [bool(named(clip, option)) for option in q.options] == [option == q.answer for option in q.options]
    for clip, q in of_type("missing"):
        assert [not named(clip, option) for option in q.options] == [option == q.answer for option in q.options]


def test_events_and_directions():
    for clip, q in of_type("event"):
        thing = referred(clip, between(q, ("What happens to the ", "?"), ("What does the ", " do?")))
        seen = [thing.visible(t) for t in np.linspace(0, clip.seconds, 400, endpoint=False)]
        changes = sum(a != b for a, b in itertools.pairwise(seen))
        fate = {(True, 0): "stays", (False, 1): "appears", (True, 1): "vanishes", (False, 2): "flashes"}
        assert fate.get((seen[0], changes), "blinks") == q.answer
    for clip, q in of_type("way"):
        thing = referred(clip, between(q, ("Which way does the ", " move?"), ("Where does the ", " go?")))
        (x0, y0), (x1, y1) = (clip.on_frame(*thing.centre(t), t) for t in (0.0, clip.seconds))
        way = ("right" if x1 > x0 else "left") if abs(x1 - x0) > abs(y1 - y0) else ("down" if y1 > y0 else "up")
        assert way == q.answer


def test_how_often_and_what_lasts():
    for clip, q in of_type("often"):
        thing = referred(clip, between(q, ("How often does the ", " disappear?")))
        seen = [thing.visible(t) for t in np.linspace(0, clip.seconds, 1000, endpoint=False)]
        assert str(sum(a and not b for a, b in itertools.pairwise(seen))) == q.answer
    for clip, q in of_type("lasts"):
        lasting = {o: all(t.event(clip.seconds) == "stays" for t in named(clip, o)) for o in q.options}
        wanted = "not there" not in q.question
        assert [o for o, lasts in lasting.items() if lasts == wanted] == [q.answer]


def test_order_counts_what_comes_or_goes():
    for clip, q in of_type("order"):
        times = {}
        for option in q.options:
            for t in named(clip, option):
                times[option] = t.spans[0][0] if "appears" in q.question else t.spans[0][1]
        pick = min if "first" in q.question else max
        assert pick(times, key=times.get) == q.answer and len(times) >= 2


def test_changes():
    for clip, q in of_type("turns"):
        if q.question == "What changes its colour?":
            assert [t.outline for t in clip.shapes if t.after] == [q.answer]
            continue
        end = q.question.endswith("the end?")
        phrases = (("What does the ", "say "), ("What is written on the ", ""), ("What colour is the ", ""))
        name = between(q, *((a, f" {b}at the {'end' if end else 'start'}?") for a, b in phrases))
        thing = referred(clip, name)
        at = clip.seconds * 0.99 if end else 0.0
        assert q.answer == (thing.after if at >= thing.turn else thing.text or thing.colour)


def test_cameras_and_cuts():
    for clip, q in of_type("camera"):
        camera = clip.camera
        way = {
            "pans left": camera.dx < 0,
            "pans right": camera.dx > 0,
            "pans up": camera.dy < 0,
            "pans down": camera.dy > 0,
        }
        zoom = {"zooms in": camera.zoom[1] > camera.zoom[0], "zooms out": camera.zoom[1] < camera.zoom[0]}
        assert [text for text, holds in {**way, **zoom}.items() if holds] == (
            [] if q.answer == "stands still" else [q.answer]
        )
    for clip, q in of_type("scenes"):
        at = 0.0 if "before" in q.question else clip.seconds * 0.999
        assert [any(t.visible(at) for t in named(clip, o)) for o in q.options] == [o == q.answer for o in q.options]
    for clip, q in of_type("moves"):
        moving = {o: any(t.speed for t in named(clip, o)) for o in q.options}
        assert [o for o, moves in moving.items() if moves == ("not move" not in q.question)] == [q.answer]


def test_yes_and_no():
    for clip, q in of_type("any"):
        assert q.answer == ("yes" if named(clip, between(q, ("Is there any ", "?"))) else "no")
    for clip, q in of_type("half"):
        when = next(when for when in (" at the start", " at the end", "") if q.question.endswith(f"{when}?"))
        side = next(side for side in ("left", "top") if f"in the {side} half" in q.question)
        half = clip.seconds / clip.pairs / 2
        t = clip.seconds - half if when == " at the end" else half
        thing = referred(clip, between(q, ("Is the ", f" in the {side} half{when}?")))
        x, y = clip.on_frame(*thing.centre(t), t)
        assert thing.visible(t) and q.answer == (
            "yes" if (2 * x < clip.width if side == "left" else 2 * y < clip.height) else "no"
        )
    for clip, q in of_type("then"):
        when, at = ("start", 0.5) if q.question.endswith("start?") else ("end", clip.seconds - 0.5)
        thing = referred(clip, between(q, ("Is the ", f" there at the {when}?")))
        assert q.answer == ("yes" if thing.visible(at) else "no")
    for clip, q in of_type("does_move"):
        assert q.answer == ("yes" if referred(clip, between(q, ("Does the ", " move?"))).speed else "no")

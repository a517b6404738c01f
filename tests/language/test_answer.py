import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.language.answer import stream_answer, stream_text
from evoprune.language.constraints import AnswerConstraint
from evoprune.language.stops import StopStrings
from tests.language.test_generate import Steps, own_tokenizer
from tests.thinking import ids_of, thinking_tokenizer
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize("text", ["Yes.", " naïve 你好, 世界 👩‍👩‍👧 fin", "🎬", "\n\n a  b\t", "", "real \ufffd mark"])
def test_text_arrives_in_whole_characters(text):
    ids = tiny_tokenizer()(text + "<|im_end|>")["input_ids"]  # special tokens are left out
    pieces = list(stream_text(own_tokenizer(), iter(ids)))
    assert "".join(pieces) == text and all(pieces)


def test_text_arrives_as_soon_as_it_is_certain():
    ids, read = tiny_tokenizer()("ab é c")["input_ids"], []
    pieces = stream_text(own_tokenizer(), (read.append(token) or token for token in ids))
    assert tiny_tokenizer().decode(ids).startswith(next(pieces))
    assert len(read) == 1


def said(text, special=False, prompt="<think>\n", n=None):
    """Split a model's output after a prompt into its thoughts and its answer."""
    own = thinking_tokenizer(special=special)
    prompt_ids = torch.tensor(ids_of(own, f"<|im_start|>assistant\n{prompt}"))
    pieces = list(stream_answer(own, iter(ids_of(own, text)[:n]), prompt_ids))
    assert all(piece for piece, _ in (pieces[1:] if ("", True) in pieces[:1] else pieces))
    return tuple("".join(piece for piece, thought in pieces if thought is wanted) for wanted in (True, False))


@pytest.mark.parametrize("special", [False, True, None], ids=["token", "special", "text"])
@pytest.mark.parametrize("thoughts", ["It is green.", "a < b </thin </ </</think", "<think> naïve 你好\n\n- </b>", ""])
@pytest.mark.parametrize("answer", ["Green.", "<b>yes</b>\n", ""])
def test_thoughts_end_where_they_say(special, thoughts, answer):
    text = f"{thoughts}\n</think>\n\n{answer}"
    if special is not None:  # without a token, the text itself would open thoughts
        thoughts = thoughts.replace("<think>", "") if special else thoughts
    found = said(text, special)
    assert (found[0].strip(), found[1]) == (thoughts.strip(), answer)


def test_an_answer_without_thoughts_stays_as_it_is():
    assert said("\n Green. </think> x", prompt="") == ("", "\n Green. </think> x")
    assert said("\n Green.", prompt="<think>\n\n</think>\n\n") == ("", "\n Green.")
    assert said("", prompt="") == ("", "")


def test_thoughts_may_begin_with_the_first_token():
    assert said("<think>\nHm.\n</think>\n\nGreen.", prompt="") == ("Hm.\n", "Green.")


def test_thoughts_that_are_cut_are_no_answer():
    own = thinking_tokenizer(special=True)
    prompt_ids = torch.tensor(ids_of(own, "<|im_start|>assistant\n"))
    assert list(stream_answer(own, iter(ids_of(own, "<think>")), prompt_ids)) == [("", True)]
    assert said("Hm, it may well be", n=6)[1] == ""


@pytest.mark.parametrize("special", [False, None])
def test_thoughts_and_answer_arrive_as_soon_as_they_are_certain(special):
    own, read = thinking_tokenizer(special=special), []
    ids = ids_of(own, "Hm, hm.</think>Yes and no.")
    pieces = stream_answer(own, (read.append(token) or token for token in ids), torch.tensor(ids_of(own, "<think>")))
    assert next(pieces) == ("", True) and next(pieces)[1] and len(read) == 1
    while (piece := next(pieces))[1]:
        pass
    assert piece[0] == "Y" or "Yes".startswith(piece[0])
    assert len(own.decode(read)) <= len("Hm, hm.</think>Yes")


@settings(deadline=None)
@given(st.lists(st.integers(0, 413), max_size=40))
def test_pieces_join_to_the_text_of_all_tokens(ids):
    expected = tiny_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(stream_text(own_tokenizer(), ids)) == expected


def cut(pieces, *stops) -> tuple[list[str], str | None]:
    ends = StopStrings(stops)
    made = list(ends.cut((piece, False) for piece in pieces))
    assert all(piece and not thought for piece, thought in made)
    return [piece for piece, _ in made], ends.found


@pytest.mark.parametrize(
    ("text", "stops", "answer", "found"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two", ["three"], "one two", None),
        ("two", ["two"], "", "two"),
        ("aab", ["ab"], "a", "ab"),
        ("aaab", ["aab"], "a", "aab"),
        ("abcd", ["abcd", "c"], "ab", "c"),  # complete first
        ("xab", ["b", "ab"], "x", "ab"),
        ("one tw", ["two"], "one tw", None),
        ("", ["a"], "", None),
        ("a\nb", ["\n"], "a", "\n"),
    ],
)
def test_an_answer_ends_before_a_stop_string_in_whatever_pieces_it_comes(text, stops, answer, found):
    for size in range(1, len(text) + 2):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        made, why = cut(pieces, *stops)
        assert ("".join(made), why) == (answer, found)


def test_only_what_may_begin_a_stop_string_is_held_back():
    ends, read = StopStrings(["two", "ten"]), []
    pieces = ends.cut((read.append(piece) or piece, False) for piece in ["one t", "w", "ig ", "t", "e", "n", "more"])
    assert [(next(pieces)[0], len(read)) for _ in range(2)] == [("one ", 1), ("twig ", 3)]
    assert list(pieces) == [] and ends.found == "ten" and read[-1] == "n"


def test_thoughts_may_have_a_stop_string():
    ends = StopStrings(["\n"])
    assert list(ends.cut([("a\nb", True), ("c\nd", False)])) == [("a\nb", True), ("c", False)]


@settings(deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1), st.integers(1, 4))
def test_the_pieces_do_not_matter(text, stops, size):
    whole, found = cut([text] if text else [], *stops)
    pieces, why = cut([text[start : start + size] for start in range(0, len(text), size)], *stops)
    assert ("".join(pieces), why) == ("".join(whole), found)
    assert not any(stop in "".join(pieces) for stop in stops)


@pytest.mark.parametrize("special", [False, True, None], ids=["token", "special", "text"])
@pytest.mark.parametrize("in_thoughts", [True, False])
def test_a_constraint_waits_for_the_end_of_thoughts(special, in_thoughts):
    own = thinking_tokenizer(special=special)
    inner = Steps([3], [4])
    constraint = AnswerConstraint(inner, own, in_thoughts, may_think=True)
    begin = own.backend.token_to_id("<think>")
    if not in_thoughts:
        mask = constraint.mask(600)
        assert mask[3] and int(mask.sum()) == (1 if begin is None else 2)
        if begin is None:  # thoughts that are only text cannot begin here
            constraint.advance(3)
            assert constraint.mask(600)[4] and not constraint.complete
            return
        constraint.advance(begin)
    for token in ids_of(own, "a < b </thin </</think>"):
        assert constraint.mask(600) is None and not constraint.complete
        constraint.advance(token)
    for token in (3, 4):
        assert constraint.mask(600).nonzero().tolist() == [[token]]
        constraint.advance(token)
    assert constraint.complete


def test_a_constraint_has_no_thoughts_where_they_are_off():
    own = thinking_tokenizer()
    begin = own.backend.token_to_id("<think>")
    constraint = AnswerConstraint(Steps([3, begin], [3, begin]), own, in_thoughts=False, may_think=False)
    assert not constraint.mask(600)[begin]  # it would begin thoughts, not an answer with this text
    constraint.advance(3)
    assert constraint.mask(600)[begin]


@pytest.mark.parametrize("after", ["", "\n\n", "a", "\n a"])
def test_a_constraint_begins_inside_the_token_that_ends_thoughts(after):
    own = thinking_tokenizer(special=None)
    ends = f"</think>{after}"
    own.backend.add_tokens([ends])
    (letter,) = own.encode("a")
    constraint = AnswerConstraint(Steps([letter]), own, in_thoughts=True, may_think=True)
    constraint.advance(own.backend.token_to_id(ends))
    assert constraint.complete == after.endswith("a")

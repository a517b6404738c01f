"""What counts as a right answer."""

import json
import time

import pytest

from evoprune.batch.rows import Row
from evoprune.bench.questions import chosen_option, grade, load_questions
from evoprune.errors import UsageError

SHAPES = ("red square", "blue star", "circle")
FRUIT = ("apple", "a pear", "red plum", "plum")
COUNTS = ("2", "3", "13")
YES_NO = ("yes", "no")
MOVES = ("moves", "does not move")
COLOURS_ZH = ("红色", "蓝色")
LABELLED = ("A. Apples.", "B. Pears.")
TEN = ("ant", "bee", "cat", "dog", "eel", "fox", "goat", "hare", "ibis", "jay")
BOTH = ("red", "blue", "both A and B", "none of the above")
NONE = None  # names no option, or more than one

# The answer given, and the index of the option that it names.
ANSWERS = {
    ("letter alone", SHAPES): [
        *((said, 1) for said in ("B", "b", " B \n", "B.", "b.", "B:", "B)", "b)", "(B)", "(b)", "[B]", "( B )", "<B>")),
        *((said, 1) for said in ("**B**", "**b**", "**(B)**", "**B.**", "`B`", "'B'", '"B".', "['B']", '{"answer": "B"}')),
        *((said, 1) for said in ("$B$", r"\(B\)", r"\boxed{B}", r"$\boxed{\text{b}}$", r"$\mathbf{B}$")),
        *((said, 1) for said in ("B<|im_end|>", "B</s>", "<answer>B</answer>", "<answer> (b) </answer>")),
        *((said, 1) for said in ("Ｂ", "（Ｂ）", "Ⓑ", "【B】")),
        *(("a", 0), ("A.", 0), ("(a)", 0), ("D", NONE), ("(D)", NONE), ("I", NONE), ("1", NONE), ("B2", NONE)),
    ],
    ("letter and text", SHAPES): [
        *((said, 1) for said in ("B. blue star", "b. Blue Star", "B) blue star", "(B) the blue star.", "B: blue star")),
        *((said, 1) for said in ("B - blue star", "B blue star", "B, blue star", "B.blue star", "B\nblue star")),
        *((said, 1) for said in ("**B. blue star**", "**B**: blue star", "The blue star (B)", "[b] a blue star")),
        *(("A red square", 0), ("A. A red square.", 0), ("C: the circle", 2)),
        *((said, NONE) for said in ("B. circle", "(B) the circle", "B: circle", "B circle", "D. circle")),  # contradictions
    ],
    ("letter and reason", SHAPES): [
        ("B because A is wrong", 1),
        ("B, because the circle is hidden.", 1),
        ("B. It is left of the circle.", 1),
        ("(B) blue star, left of the circle", 1),
        ("B\n\nThe circle hides the red square.", 1),
        ("B) blue star\nOption A shows a square, option C shows a circle.", 1),
        ("B is correct, since the red square leaves.", 1),
        ("B best describes the video.", 1),
    ],
    ("stated letter", SHAPES): [
        *((said, 1) for said in ("The answer is B", "The answer is b.", "the answer is (B)", "The correct answer is **B**.")),
        *((said, 1) for said in ("Answer: B", "Answer: b", "ANSWER: (B)", "Answer B", "Answer - b", "**Answer:** B")),
        *((said, 1) for said in ("Answer:\n\nB", "## Final Answer\n\nB", "Answer\n(b)", r"Final answer: $\boxed{B}$")),
        *((said, 1) for said in ("The best answer is: (B) blue star.", "The answer is B: a blue star", "The answer is option B")),
        *((said, 1) for said in ("The answer would be B", "The answer to the question is B.")),
        ("The most likely answer is B, left of the circle.", 1),
        *((said, 1) for said in ("Best Option: (B", "The correct option is B.", "My choice is b", "The option is B")),
        *((said, 1) for said in ("Option B", "option b", "Option (B)", "Choice B is right", "Option B is the correct answer.")),
        *((said, 1) for said in ("I choose B", "I choose B because A is wrong", "I'd pick (B).", "I would go with option B.")),
        *((said, 1) for said in ("I think B", "I think it's B, not C", "It is B.", "It must be B")),
        *((said, 1) for said in ("Probably B", "So B!", "Only B", "Assistant: B")),
        *((said, 1) for said in ("B is the answer.", "B is the best choice because A shows nothing", "Therefore, (B).")),
        (r"The single most likely answer is: $\boxed{\text{(B) a blue star}}$.", 1),
        ("Therefore, the best answer is:\n\n(B) blue star\n\nThe circle stays.", 1),
        ("The answer is B. A is too small. C shows a circle.", 1),
        ("The answer is A because it is red", 0),
        ("The answer is a.", 0),
        ("A is correct", 0),
        ("Antwort: B", 1),
        ("The answer is D", NONE),
        ("The answer is unclear.", NONE),
        ("Answer: unknown", NONE),
    ],
    ("article, not a letter", SHAPES): [
        ("The answer is a circle.", 2),
        ("the answer is a red circle", 2),  # a colour was added to the text
        ("The correct option is a circle", 2),
        ("Answer: A circle", 2),
        ("A circle.", 2),
        ("a circle", 2),
        ("A blue star", 1),
        ("The answer is a blue star, a big one.", 1),
        ("This is a video of a park.", NONE),
        ("The answer is a triangle.", NONE),
        ("A triangle", NONE),
        ("A man walks in.", NONE),
    ],
    ("pronoun, not a letter", TEN): [
        ("I think it is C", 2),
        ("C, I think.", 2),
        ("Answer: I think it is C.", 2),
        ("I see a dog", 3),
        ("I'd say (C).", 2),
        ("I cannot tell.", NONE),
        ("I am not sure", NONE),
        ("I", 8),
        ("(I)", 8),
        ("I. ibis", 8),
        ("The answer is I.", 8),
    ],
    ("not a letter of an option", SHAPES): [
        *((said, NONE) for said in ("Because", "ABC", "Cab", "B2B", "R&B", "e.g. this", "C++", "25 °C", "U.S.A.", "B's")),
        *((said, NONE) for said in ("vitamin C", "The man takes vitamin C.", "Team B wins", "Plan B", "They play in C major")),
    ],
    ("several options", SHAPES): [
        *((said, NONE) for said in ("A and B", "A or B", "A/B", "A, B", "AB", "Either B or C", "Both A and B", "B or C, I think")),
        *((said, NONE) for said in ("Option A or option B", "(A) (B)", "I think B or C", "It is B and C", "A, B, and C")),
        *((said, NONE) for said in ("The answer is A or B", "The answer is B, C", "Answer: A and B", "The answer is (B) or (C).")),
        *((said, NONE) for said in ("The answer is B, or maybe C", "Answer: B/C", "The answer is a circle, so option B")),
        *((said, NONE) for said in ("circle and red square", "a circle next to a blue star", "circle or triangle")),
        ("The circle hides. The blue star stays.", NONE),
        *((said, NONE) for said in ("A. red square B. blue star C. circle", "A. red square\nB. blue star\nC. circle")),
        ("A. red square: no. B. blue star: yes.", NONE),
        ("B. The answer is C.", NONE),  # it begins with one and states another
        ("It could be B or C. The answer is B.", 1),
        ("A. red square: hidden\nB. blue star: seen\nThe answer is B.", 1),
        ("Answer: A\nWait. Answer: B", 1),  # the last statement
        ("The answer is B. So the answer is clear.", 1),
    ],
    ("denied", SHAPES): [
        *((said, 1) for said in ("not A but B", "B, not A", "B and not A", "B rather than A", "It is B instead of A.")),
        *((said, 1) for said in ("It is not A, so it is B.", "Not A. B.", "A is wrong, B is right.")),
        ("A and C are incorrect. B is correct.", 1),
        *((said, 1) for said in ("The answer is not A but B", "It isn't a circle, it is a blue star")),
        ("The answer is B. I would not choose A.", 1),
        *((said, NONE) for said in ("It is not A", "not A", "A is wrong", "B is not correct.")),
        *((said, NONE) for said in ("neither A nor B", "It is not A or B")),
        *((said, NONE) for said in ("The answer is not B", "The circle is not the answer", "It isn't a circle.")),
        ("There is no circle", NONE),
        *((said, NONE) for said in ("None of the above", "none", "No", "Not visible", "Is it a circle?", "Could it be B?")),
        ("The circle, because the red square is hidden", 2),
        ("a circle instead of a red square", 2),
    ],
    ("refusal", SHAPES): [
        ("I'm sorry, but I can't help with that.", NONE),
        ("I cannot determine whether it is a circle.", NONE),
        ("As an AI, I am unable to watch videos.", NONE),
        ("Cannot be determined from the video.", NONE),
    ],
    ("thinking before", SHAPES): [
        ("<think>Maybe A. Or the circle?</think>B", 1),
        ("<think>\nOption A? No.\n</think>\n\n<answer>B</answer>", 1),
        ("<think>The answer is B", NONE),  # cut off
        ("The red square leaves, then the circle. The blue star stays. So the answer is B.", 1),
        ("The red square leaves, then the circle stays.\n\n**B**", 1),
        ("The red square leaves first.\nB. blue star", 1),
        ("It shows the red square and the circle.\nAnswer: blue star", 1),
        ("Option A: a red square. Option B: a star. Option B is the correct answer.", 1),
    ],
    ("text", SHAPES): [
        *((said, 2) for said in ("circle", "Circle.", "CIRCLE!", '"circle"', "the circle", "*circle*", "It is a circle")),
        *((said, 1) for said in ("blue  star", "There is a blue star in it.", "A big blue star", "Answer: the blue star")),
        *((said, NONE) for said in ("semicircle", "encircled", "circle-shaped", "square", "blue", "star blue", "triangle")),
    ],
    ("text within text", FRUIT): [
        *(("apple", 0), ("a pear", 1), ("pear", 1), ("The pear.", 1), ("B a pear", 1), ("B: a pear, I think", 1)),
        *(("plum", 3), ("Answer: (d)", 3), ("there is a red plum", 2)),
        *(("a red plum and a plum", NONE), ("apple or plum", NONE), ("pineapple", NONE)),
    ],
    ("texts that differ in an article", ("a car", "the car", "a van")): [
        ("the car", 1),
        ("A car.", 0),
        ("It is the car", NONE),
        ("car", NONE),
        ("van", 2),
    ],
    ("texts that are letters", ("A", "B", "C")): [("B", 1), ("The answer is B.", 1), ("(C)", 2), ("B. B", 1), ("B. C", NONE)],
    ("texts that are other letters", ("B", "A", "X")): [
        ("B", NONE),  # the letter, or the text?
        ("The answer is A", NONE),
        ("C", 2),
        ("X", 2),
        ("The answer is X.", 2),
        ("A. B", 0),
        ("A is B", NONE),
    ],
    ("texts that are a letter and a full stop", ("red", "C.", "blue")): [("C.", NONE), ("C", NONE), ("B", 1), ("B. C.", 1)],
    ("texts that have letters", ("vitamin C", "vitamin A", "vitamin B")): [
        ("vitamin C", 0),
        ("It is vitamin A.", 1),
        ("A", 0),
        ("A. vitamin C", 0),
        ("The answer is vitamin C", 0),
        ("C", 2),
    ],
    ("texts about options", BOTH): [
        ("both A and B", 2),
        ("Both A and B.", 2),
        ("The answer is both A and B", 2),
        ("C. both A and B", 2),
        ("None of the above", 3),
        ("red", 0),
        ("both", NONE),
        ("none", NONE),
        ("red and blue", NONE),
    ],
    ("numbers", COUNTS): [
        *((said, 1) for said in ("3", "3.", "three", "Three.", "There are three cars.", "3 cars", "B. 3", "(B) three")),
        ("The answer is 3", 1),
        *(("13", 2), ("two", 0), ("There are 2.", 0), ("A", 0)),
        *(("There is 1.", NONE), ("3 or 4", NONE)),
        *((said, NONE) for said in ("3.5", "-3", "2-3", "1/3", "3:30", "30", "2 or 3", "B. 2", "23", "in 2 seconds 3 cars")),
    ],
    ("one", ("one", "two")): [
        *(("One.", 0), ("1", 0), ("There is one car.", 0), ("The answer is one", 0), ("the left one", NONE), ("one of them", NONE)),
    ],
    ("units", ("3 m", "3 km", "30 %", "$4.50")): [
        *(("3 km", 1), ("It is 3 km.", 1), ("30 %", 2), ("30%", 2), ("$4.50", 3), ("It costs $4.50.", 3), ("4.50", 3)),
        *(("3", NONE), ("3 kmh", NONE), ("13 km", NONE), ("$14.50", NONE)),
    ],
    ("yes and no", YES_NO): [
        *(("Yes", 0), ("no.", 1), ("A", 0), ("The answer is no", 1), ("No, the car stays.", 1), ("B. No", 1)),
        *(("Yes, there is no other car.", 0), ("There is no doubt.", NONE), ("No one", NONE), ("A. no", NONE)),
    ],
    ("texts that deny", MOVES): [
        *(("It does not move.", 1), ("it moves", 0), ("does not move", 1), ("It never moves", NONE), ("It doesn't move", NONE)),
    ],
    ("labelled texts", LABELLED): [
        *(("B", 1), ("Pears", 1), ("B. Pears.", 1), ("Pears.", 1), ("The answer is Pears.", 1), ("B. Apples", NONE)),
        ("(B) Pears", 1),
    ],
    ("Chinese", SHAPES): [
        *((said, 1) for said in ("答案是B", "答案：B", "答案为（B）。", "正确答案是 B。", "选B", "选项B正确", "B是正确的")),
        *((said, 1) for said in ("应该选择B，因为A不对", "不是A，是B", "A是错的，B是对的")),
        *((said, NONE) for said in ("不是A", "没有答案", "A或B")),
    ],
    ("Chinese texts", COLOURS_ZH): [
        *(("蓝色", 1), ("答案是蓝色。", 1), ("B. 蓝色", 1)),
        *(("不是红色", NONE), ("B. 红色", NONE), ("红色和蓝色", NONE)),
    ],
    ("Unicode", ("café", "Straße", "naïve")): [("CAFE\u0301", 0), ("the café", 0), ("STRASSE", 1), ("Ｂ．", 1), ("С", NONE)],
    ("signs", ("+", "-", "×")): [("+", 0), ("-", 1), ("C", 2), ("5 + 3", NONE), ("The answer is A.", 0)],
    ("nothing", SHAPES): [
        *((said, NONE) for said in ("", " \n", ".", "!!!!", "<|im_end|>", "**", "()", "\\boxed{}", "<answer></answer>")),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("why", "options"), ANSWERS, ids=[why for why, _ in ANSWERS])
def test_which_option_an_answer_names(why, options):
    table = ANSWERS[why, options]
    wrong = {said: found for said, named in table if (found := chosen_option(said, options)) != named}
    assert not wrong


@pytest.mark.parametrize(
    ("said", "right"), [("C", True), ("a circle", True), ("B", False), ("A or C", None), ("", None)]
)
def test_a_row_with_options_is_graded_by_the_option_that_is_named(said, right):
    assert grade(Row("1", ("v",), ("v",), "Which?", options=SHAPES, answer="circle"), said) is right


@pytest.mark.parametrize(
    ("said", "expected", "right"),
    [
        ("green", "green", True),
        (" Green. ", "green", True),
        ("green", "Green.", True),
        ("A man", "a man", True),
        ("the man", "a man", False),
        ("green!", "green", False),
        ("", "green", False),
        ("light green", "green", False),
        ("three", "3", False),
    ],
)
def test_open_questions_want_the_exact_words(said, expected, right):
    assert grade(Row("1", ("v",), ("v",), "What colour?", answer=expected), said) is right


PIECES = (
    "The star moves, and the circle leaves because it is late. ", "(", " ", "\n", "**", "\\", "<|a", "<a", "'", "a'", "a", "B ",
    "B.", "(B)", "B or ", "answer: ", "not ", "because ", "red ", "3.", ":\n", "I would ", "\\boxed{", "答案",
)  # fmt: skip


def seconds(said):
    start = time.process_time()
    chosen_option(said, SHAPES)
    return time.process_time() - start


@pytest.mark.full
@pytest.mark.parametrize("piece", PIECES)
def test_the_time_to_read_an_answer_grows_with_its_length_only(piece):
    assert seconds(piece * (20_000 // len(piece))) < 3


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"video": "a.mp4", "question": "What?", "answer": "yes"}


def test_a_file_is_read_video_by_video(tmp_path):
    rows = [ROW, ROW | {"video": "b.mp4", "id": 7, "type": "order", "groups": ["time"]}, "", ROW | {"answer": 3}]
    rows.append(ROW | {"options": ["no", "yes", "maybe"], "answer": "b"})
    rows.append(ROW | {"options": ["B", "A"], "answer": "B"})  # a text goes before a letter
    first, second = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert (first.name, first.path) == ("a.mp4", tmp_path / "a.mp4") and second.name == "b.mp4"
    assert [row.id for row in first.rows] == ["1", "4", "5", "6"] and second.rows[0].id == "7"
    assert first.rows[1].answer == "3" and [row.answer for row in first.rows[2:]] == ["yes", "B"]
    assert (second.rows[0].type, second.rows[0].groups) == ("order", ("time",))


def test_options_with_letters(tmp_path):
    options = ["A. red", "B. blue"]
    answers = ["A", "A. red", "red", "(B)", "blue"]
    rows = [ROW | {"options": options, "answer": answer} for answer in answers]
    (video,) = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert [row.answer for row in video.rows] == ["red", "red", "red", "blue", "blue"]
    assert all(row.options == ("red", "blue") for row in video.rows)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("[]", "line 2"),
        ({"video": "a.mp4", "question": "What?"}, "line 2: no answer"),
        (ROW | {"groups": [3]}, "groups is not a list"),
        (ROW | {"options": ["yes", "Yes."]}, "different"),
        (ROW | {"options": ["red", "green"]}, "none of the options"),
        (ROW | {"options": ["red", "green"], "answer": "C"}, "none of the options"),
    ],
)
def test_wrong_questions_are_refused(tmp_path, row, says):
    with pytest.raises(UsageError, match=says) as caught:
        load_questions(write(tmp_path / "q.jsonl", ROW, row))
    assert caught.value.hint


def test_csv(tmp_path):
    (tmp_path / "q.csv").write_text(
        "video,question,answer,options,groups,type\na.mp4,Which?,b,red| blue,time|space,order\n"
    )
    (video,) = load_questions(tmp_path / "q.csv")
    (row,) = video.rows
    assert (row.options, row.answer, row.groups, row.type) == (("red", "blue"), "blue", ("time", "space"), "order")

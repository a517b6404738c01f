"""Test which answers are graded as right."""

import json
import time

import pytest

from evoprune.batch import Row
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
LISTED = "A. red square\nB. blue star\nC. circle\n"
NONE = None  # names no option, or more than one

# The given answer, and the index of the option it names.
ANSWERS = {
    ("letter alone", SHAPES): [
        *((said, 1) for said in ("B", "b", " B \n", "B.", "b.", "B:", "B)", "b)", "(B)", "(b)", "[B]", "( B )", "<B>")),
        *((said, 1) for said in ("**B**", "**b**", "**(B)**", "**B.**", "`B`", "'B'", '"B".', "['B']", '{"answer": "B"}')),
        *((said, 1) for said in ("$B$", r"\(B\)", r"\boxed{B}", r"$\boxed{\text{b}}$", r"$\mathbf{B}$", "B<|im_end|>")),
        *((said, 1) for said in ("B</s>", "<answer>B</answer>", "<answer> (b) </answer>", "Ｂ", "（Ｂ）", "Ⓑ", "【B】")),
        *((said, 0) for said in ("a", "A.", "(a)")),
        *((said, NONE) for said in ("D", "(D)", "I", "1", "B2")),
    ],
    ("letter and text", SHAPES): [
        *((said, 1) for said in ("B. blue star", "b. Blue Star", "B) blue star", "(B) the blue star.", "B: blue star")),
        *((said, 1) for said in ("B - blue star", "B blue star", "B, blue star", "B.blue star", "B\nblue star")),
        *((said, 1) for said in ("**B. blue star**", "**B**: blue star", "The blue star (B)", "[b] a blue star")),
        *((said, 0) for said in ("A red square", "A. A red square.")),
        *((said, NONE) for said in ("B. circle", "(B) the circle", "B: circle", "B circle", "D. circle")),
        ("C: the circle", 2),
    ],
    ("letter and reason", SHAPES): [
        *((said, 1) for said in ("B because A is wrong", "B, because the circle is hidden.", "B. It is left of the circle.")),
        *((said, 1) for said in ("(B) blue star, left of the circle", "B\n\nThe circle hides the red square.")),
        *((said, 1) for said in ("B) blue star\nOption A shows a square, option C shows a circle.",)),
        *((said, 1) for said in ("B is correct, since the red square leaves.", "B best describes the video.")),
    ],
    ("stated letter", SHAPES): [
        *((said, 1) for said in ("The answer is B", "The answer is b.", "the answer is (B)", "The correct answer is **B**.")),
        *((said, 1) for said in ("Answer: B", "Answer: b", "ANSWER: (B)", "Answer B", "Answer - b", "**Answer:** B")),
        *((said, 1) for said in ("Answer:\n\nB", "## Final Answer\n\nB", "Answer\n(b)", r"Final answer: $\boxed{B}$")),
        *((said, 1) for said in ("The best answer is: (B) blue star.", "The answer is B: a blue star")),
        *((said, 1) for said in ("The answer is option B", "The answer would be B", "The answer to the question is B.")),
        *((said, 1) for said in ("The most likely answer is B, left of the circle.", "Best Option: (B")),
        *((said, 1) for said in ("The correct option is B.", "My choice is b", "The option is B", "Option B", "option b")),
        *((said, 1) for said in ("Option (B)", "Choice B is right", "Option B is the correct answer.", "I choose B")),
        *((said, 1) for said in ("I choose B because A is wrong", "I'd pick (B).", "I would go with option B.", "I think B")),
        *((said, 1) for said in ("I think it's B, not C", "It is B.", "It must be B", "Probably B", "So B!", "Only B")),
        *((said, 1) for said in ("Assistant: B", "B is the answer.", "B is the best choice because A shows nothing")),
        *((said, 1) for said in ("Therefore, (B).", r"The single most likely answer is: $\boxed{\text{(B) a blue star}}$.")),
        *((said, 1) for said in ("Therefore, the best answer is:\n\n(B) blue star\n\nThe circle stays.",)),
        *((said, 1) for said in ("The answer is B. A is too small. C shows a circle.", "Antwort: B")),
        *((said, 0) for said in ("The answer is A because it is red", "The answer is a.", "A is correct")),
        *((said, NONE) for said in ("The answer is D", "The answer is unclear.", "Answer: unknown")),
    ],
    ("article, not a letter", SHAPES): [
        *((said, 2) for said in ("The answer is a circle.", "The correct option is a circle", "Answer: A circle", "A circle.")),
        *((said, 2) for said in ("a circle",)),
        *((said, 1) for said in ("A blue star", "The answer is a blue star, a big one.")),
        *((said, NONE) for said in ("This is a video of a park.", "The answer is a triangle.", "A triangle")),
        *((said, NONE) for said in ("A man walks in.",)),
        ("the answer is a red circle", 2),  # the answer adds a colour to the option's text
    ],
    ("pronoun, not a letter", TEN): [
        *((said, 2) for said in ("I think it is C", "C, I think.", "Answer: I think it is C.", "I'd say (C).")),
        *((said, NONE) for said in ("I cannot tell.", "I am not sure")),
        *((said, 8) for said in ("I", "(I)", "I. ibis", "The answer is I.")),
        ("I see a dog", 3),
    ],
    ("not a letter of an option", SHAPES): [
        *((said, NONE) for said in ("Because", "ABC", "Cab", "B2B", "R&B", "e.g. this", "C++", "25 °C", "U.S.A.", "B's")),
        *((said, NONE) for said in ("vitamin C", "The man takes vitamin C.", "Team B wins", "Plan B", "They play in C major")),
    ],
    ("several options", SHAPES): [
        *((said, NONE) for said in ("A and B", "A or B", "A/B", "A, B", "AB", "Either B or C", "Both A and B")),
        *((said, NONE) for said in ("B or C, I think", "Option A or option B", "(A) (B)", "I think B or C", "It is B and C")),
        *((said, NONE) for said in ("A, B, and C", "The answer is A or B", "The answer is B, C", "Answer: A and B")),
        *((said, NONE) for said in ("The answer is (B) or (C).", "The answer is B, or maybe C", "Answer: B/C")),
        *((said, NONE) for said in ("The answer is a circle, so option B", "circle and red square")),
        *((said, NONE) for said in ("a circle next to a blue star", "circle or triangle")),
        *((said, NONE) for said in ("The circle hides. The blue star stays.", "A. red square B. blue star C. circle")),
        *((said, NONE) for said in ("A. red square\nB. blue star\nC. circle", "A. red square: no. B. blue star: yes.")),
        *((said, 1) for said in ("It could be B or C. The answer is B.",)),
        *((said, 1) for said in ("A. red square: hidden\nB. blue star: seen\nThe answer is B.",)),
        *((said, 1) for said in ("The answer is B. So the answer is clear.",)),
        ("B. The answer is C.", NONE),  # starts with one option and states another
        ("Answer: A\nWait. Answer: B", 1),  # the last statement counts
    ],
    ("all options, then a letter", SHAPES): [
        *((LISTED + said, 1) for said in ("**B**", "B", "b", "B.", "(B)", "(b)", "[B]", "B)", "B:", "B,", "B!", "B。", "（B）")),
        *((LISTED + said, 1) for said in ("Ｂ", "Ⓑ", "【B】", "`B`", "*B*", "__B__", "'B'", '"B"', "{B}", "$B$", "**(B)**")),
        *((LISTED + said, 1) for said in ("**B.**", "### B", "- B", "> B", "=> B", "→ B", "✅ B", "**b**", "\n\nB\n\n", "B</s>")),
        *((LISTED + said, 1) for said in ("Option B", "**Option B**", "So B", "Therefore: B.", "It is B.", "Final: B", "Best: B")),
        *((LISTED + said, 1) for said in ("Answer: B", "Answer - B", r"\boxed{B}", "<answer>B</answer>", "<ans>B</ans>")),
        *((LISTED + said, 1) for said in ("**B**\n\nThe star stays.", "B\nIt is the only one that stays.")),
        *((LISTED + said, 1) for said in ("B. blue star", "**B. blue star**", "(B) the blue star", "blue star", "B. blue star\nB")),
        *(("**B**\n\n" + said, 1) for said in (LISTED, "A. red square: hidden\nC. circle: too small")),
        *((said, 1) for said in ("A: it leaves.\nB: it stays.\nC: it is hidden.\n\n**B**", "A\nB\nC\n\n**B**")),
        *((said, 1) for said in ("A\nWait. The square leaves, the star stays.\nB", "The answer may be A.\nIt is late.\n(B)")),
        *((LISTED + said, NONE) for said in ("", LISTED, "A and B", "B or C", "not B", "B?", "D", "A circle or a square", "None")),
        *((said, NONE) for said in ("A\nB", "(A)\nred square\n(B)\nblue star\n(C)\ncircle", "A: hidden\nB: seen\nC: small")),
        (LISTED + "A", 0),
        (LISTED + "The answer is B.\nC is too small.", 1),
    ],
    ("denied", SHAPES): [
        *((said, 1) for said in ("not A but B", "B, not A", "B and not A", "B rather than A", "It is B instead of A.")),
        *((said, 1) for said in ("It is not A, so it is B.", "Not A. B.", "A is wrong, B is right.")),
        *((said, 1) for said in ("A and C are incorrect. B is correct.", "The answer is not A but B")),
        *((said, 1) for said in ("It isn't a circle, it is a blue star", "The answer is B. I would not choose A.")),
        *((said, NONE) for said in ("It is not A", "not A", "A is wrong", "B is not correct.", "neither A nor B")),
        *((said, NONE) for said in ("It is not A or B", "The answer is not B", "The circle is not the answer")),
        *((said, NONE) for said in ("It isn't a circle.", "There is no circle", "None of the above", "none", "No")),
        *((said, NONE) for said in ("Not visible", "Is it a circle?", "Could it be B?")),
        *((said, 2) for said in ("The circle, because the red square is hidden", "a circle instead of a red square")),
    ],
    ("refusal", SHAPES): [
        *((said, NONE) for said in ("I'm sorry, but I can't help with that.", "I cannot determine whether it is a circle.")),
        *((said, NONE) for said in ("As an AI, I am unable to watch videos.", "Cannot be determined from the video.")),
    ],
    ("thinking before", SHAPES): [
        *((said, 1) for said in ("<think>Maybe A. Or the circle?</think>B",)),
        *((said, 1) for said in ("<think>\nOption A? No.\n</think>\n\n<answer>B</answer>",)),
        *((said, 1) for said in ("The red square leaves, then the circle. The blue star stays. So the answer is B.",)),
        *((said, 1) for said in ("The red square leaves, then the circle stays.\n\n**B**",)),
        *((said, 1) for said in ("The red square leaves first.\nB. blue star",)),
        *((said, 1) for said in ("It shows the red square and the circle.\nAnswer: blue star",)),
        *((said, 1) for said in ("Option A: a red square. Option B: a star. Option B is the correct answer.",)),
        ("<think>The answer is B", NONE),  # cut off
    ],
    ("text", SHAPES): [
        *((said, 2) for said in ("circle", "Circle.", "CIRCLE!", '"circle"', "the circle", "*circle*", "It is a circle")),
        *((said, 1) for said in ("blue  star", "There is a blue star in it.", "A big blue star", "Answer: the blue star")),
        *((said, NONE) for said in ("semicircle", "encircled", "circle-shaped", "square", "blue", "star blue", "triangle")),
    ],
    ("text within text", FRUIT): [
        *((said, 1) for said in ("a pear", "pear", "The pear.", "B a pear", "B: a pear, I think")),
        *((said, 3) for said in ("plum", "Answer: (d)")),
        *((said, NONE) for said in ("a red plum and a plum", "apple or plum", "pineapple")),
        *(("apple", 0), ("there is a red plum", 2)),
    ],
    ("texts that differ in an article", ("a car", "the car", "a van")): [
        *((said, NONE) for said in ("It is the car", "car")),
        *(("the car", 1), ("A car.", 0), ("van", 2)),
    ],
    ("texts that are letters", ("A", "B", "C")): [
        *((said, 1) for said in ("B", "The answer is B.", "B. B")),
        *(("(C)", 2), ("B. C", NONE)),
    ],
    ("texts that are other letters", ("B", "A", "X")): [
        *((said, NONE) for said in ("The answer is A", "A is B")),
        *((said, 2) for said in ("C", "X", "The answer is X.")),
        ("A. B", 0),
        ("B", NONE),  # the letter, or the text?
    ],
    ("texts that are a letter and a full stop", ("red", "C.", "blue")): [
        *((said, NONE) for said in ("C.", "C")),
        *((said, 1) for said in ("B", "B. C.")),
    ],
    ("texts that have letters", ("vitamin C", "vitamin A", "vitamin B")): [
        *((said, 0) for said in ("vitamin C", "A", "A. vitamin C", "The answer is vitamin C")),
        *(("It is vitamin A.", 1), ("C", 2)),
    ],
    ("texts about options", BOTH): [
        *((said, 2) for said in ("both A and B", "Both A and B.", "The answer is both A and B", "C. both A and B")),
        *((said, NONE) for said in ("both", "none", "red and blue")),
        *(("None of the above", 3), ("red", 0)),
    ],
    ("numbers", COUNTS): [
        *((said, 1) for said in ("3", "3.", "three", "Three.", "There are three cars.", "3 cars", "B. 3", "(B) three")),
        *((said, 1) for said in ("The answer is 3",)),
        *((said, 0) for said in ("two", "There are 2.", "A")),
        *((said, NONE) for said in ("There is 1.", "3 or 4", "3.5", "-3", "2-3", "1/3", "3:30", "30", "2 or 3", "B. 2", "23")),
        *((said, NONE) for said in ("in 2 seconds 3 cars",)),
        ("13", 2),
    ],
    ("one", ("one", "two")): [
        *((said, 0) for said in ("One.", "1", "There is one car.", "The answer is one")),
        *((said, NONE) for said in ("the left one", "one of them")),
    ],
    ("units", ("3 m", "3 km", "30 %", "$4.50")): [
        *((said, 1) for said in ("3 km", "It is 3 km.")),
        *((said, 2) for said in ("30 %", "30%")),
        *((said, 3) for said in ("$4.50", "It costs $4.50.", "4.50")),
        *((said, NONE) for said in ("3", "3 kmh", "13 km", "$14.50")),
    ],
    ("yes and no", YES_NO): [
        *((said, 0) for said in ("Yes", "A", "Yes, there is no other car.")),
        *((said, 1) for said in ("no.", "The answer is no", "No, the car stays.", "B. No")),
        *((said, NONE) for said in ("There is no doubt.", "No one", "A. no")),
    ],
    ("texts that deny", MOVES): [
        *((said, 1) for said in ("It does not move.", "does not move")),
        *((said, NONE) for said in ("It never moves", "It doesn't move")),
        ("it moves", 0),
    ],
    ("labelled texts", LABELLED): [
        *((said, 1) for said in ("B", "Pears", "B. Pears.", "Pears.", "The answer is Pears.", "(B) Pears")),
        ("B. Apples", NONE),
    ],
    ("Chinese", SHAPES): [
        *((said, 1) for said in ("答案是B", "答案：B", "答案为（B）。", "正确答案是 B。")),
        *((said, 1) for said in ("选B", "选项B正确", "B是正确的", "应该选择B，因为A不对", "不是A，是B")),
        *((said, 1) for said in ("A是错的，B是对的",)),
        *((said, NONE) for said in ("不是A", "没有答案", "A或B")),
    ],
    ("Chinese texts", COLOURS_ZH): [
        *((said, 1) for said in ("蓝色", "答案是蓝色。", "B. 蓝色")),
        *((said, NONE) for said in ("不是红色", "B. 红色", "红色和蓝色")),
    ],
    ("Unicode", ("café", "Straße", "naïve")): [
        *((said, 0) for said in ("CAFE\u0301", "the café")),
        *((said, 1) for said in ("STRASSE", "Ｂ．")),
        ("С", NONE),
    ],
    ("signs", ("+", "-", "×")): [
        *((said, 0) for said in ("+", "The answer is A.")),
        *(("-", 1), ("C", 2), ("5 + 3", NONE)),
    ],
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
        ("green .", "green", True),
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
SAID = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A man."},
    {"role": "user", "content": "What?"},
]


def test_a_file_is_read_video_by_video(tmp_path):
    rows = [
        ROW,
        ROW | {"video": "b.mp4", "id": 7, "type": "order", "groups": ["time"]},
        "",
        ROW | {"answer": 3, "type": 2},
    ]
    rows.append(ROW | {"options": ["no", "yes", "maybe"], "answer": "b"})
    rows.append(ROW | {"options": ["B", "A"], "answer": "B"})  # a text has precedence over a letter
    first, second = load_questions(write(tmp_path / "q.jsonl", *rows))
    assert (first.name, first.path) == ("a.mp4", tmp_path / "a.mp4") and second.name == "b.mp4"
    assert [row.id for row in first.rows] == ["1", "4", "5", "6"] and second.rows[0].id == "7"
    assert (first.rows[1].answer, first.rows[1].type) == ("3", "2") and [row.answer for row in first.rows[2:]] == [
        "yes",
        "B",
    ]
    assert (second.rows[0].type, second.rows[0].groups) == ("order", ("time",))


@pytest.mark.parametrize(
    "asked",
    [
        *("<video>\nWhich <image> is it?", "<image>\nWhich <image> is it?", "<video>Which <image> is it?"),
        *(
            "<image>\n<image>\r\n <video> Which <image> is it?",
            "Which <image> is it?\n<video>",
            " <video>\n\nWhich <image> is it?",
        ),
        "<|vision_start|><|video_pad|><|vision_end|>Which <image> is it?",
    ],
)
def test_tags_of_the_input_are_left_out(tmp_path, asked):
    """Tags as in files for LLaVA, before or after the question. A tag inside the question is text."""
    ((row,),) = (video.rows for video in load_questions(write(tmp_path / "q.jsonl", ROW | {"question": asked})))
    assert row.question == row.prompt == "Which <image> is it?"


@pytest.mark.parametrize(
    "asked", ["Is <video> a tag?", "What is <|video_pad|>", "<videos>\nWhich?", "Which ends in <image>", "<b>What?"]
)
def test_other_tags_are_text(tmp_path, asked):
    ((row,),) = (video.rows for video in load_questions(write(tmp_path / "q.jsonl", ROW | {"question": asked})))
    assert row.question == asked


def test_a_question_of_tags_alone(tmp_path):
    with pytest.raises(UsageError, match="question is empty"):
        load_questions(write(tmp_path / "q.jsonl", ROW | {"question": "<video>\n"}))


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
        (ROW | {"groups": ["all"]}, "a group cannot be called 'all'"),
        (ROW | {"groups": ["type:count"]}, "nor begin with 'type:'"),
        (ROW | {"subtitles": "a.srt"}, "subtitles are not read"),
        ({"video": "a.mp4", "messages": SAID, "answer": "Yes"}, "asks single questions"),
        (ROW | {"video": None, "inputs": ["a.mp4", "b.mp4"]}, "is about one video or image"),
        (ROW | {"options": ["yes", "Yes."]}, "different"),
        (ROW | {"options": ["red", "green"]}, "not one of the options"),
        (ROW | {"options": ["red", "green"], "answer": "C"}, "not one of the options"),
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

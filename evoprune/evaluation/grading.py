"""Grading: whether what a model said is the expected answer. No torch."""

import re

from evoprune.batch.rows import LETTERS, Row
from evoprune.evaluation.answer_words import Word, read

ENDS = ("clause", "stop", "line", "aside")
JOINS = re.compile("and|then|to|maybe|perhaps|possibly|[/&]", re.IGNORECASE)  # two names that are both meant
BETWEEN = re.compile(rf"{JOINS.pattern}|[,:.–—()\[\]-]|an?|the|option", re.IGNORECASE)


def grade(row: Row, said: str) -> bool | None:
    """Whether `said` is the row's answer; None if the row has options and `said` names none of them, or more than one."""
    if not row.options:
        return normalised(said) == normalised(row.answer)
    choice = chosen_option(said, row.options)
    return None if choice is None else row.options[choice] == row.answer


def normalised(text: str) -> str:
    """The text without case, outer blanks and a final full stop."""
    return text.strip().removesuffix(".").strip().casefold()


def chosen_option(said: str, options: tuple[str, ...]) -> int | None:
    """The index of the option that an answer names, by letter or by text; None if it names none, or more than one.

    The rules, in order; the first that finds options decides:

    1. The answer is the text of an option, or its line in the prompt (`B. blue star`).
    2. The last statement that names an option: `the answer is B`, `I choose B`, `B is the correct answer`, `\\boxed{B}`,
       `<answer>B</answer>`. A letter decides, what follows explains it.
    3. The only option whose letter begins a line (`B: it is blue`, `(B)`, `B, because`), or that is all of a line. It must not
       contradict the statement.
    4. The only option that is named anywhere.

    What names an option:

    - A letter in brackets, at the start of a clause, or after words such as "is" and "option"; not directly before a word. So the
      article of "a circle", the pronoun of "I think" and the C of "vitamin C" name nothing.
    - A text as whole words, with or without articles, numbers up to twelve in figures or words. Of several the longest.
    - Nothing in a clause that denies ("not A", "A is wrong") or has an "or", after "because" and the like, in a question, or in
      `<think>`.

    "A and B", and a letter beside the text of another option (`B. circle`), name two options.
    """
    alone = normalised(said)
    for whole in (options, [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]):
        texts = [normalised(text) for text in whole]
        if texts.count(alone) == 1 and not re.fullmatch("[a-z]", alone):  # a letter may be that of another option
            return texts.index(alone)
    words = read(said, options)
    named = _stated(words) | _of_lines(words) or _anywhere(words)
    return max(named) if len(named) == 1 and named != {-1} else None


def _stated(words: list[Word]) -> frozenset[int]:
    """What the last statement names that names anything."""
    end = len(words)
    for place in reversed([place for place, word in enumerate(words) if word.kind == "states"]):
        start = place + 1
        if start == end or words[start].kind in ("stop", "line", "aside") or words[start].text == ",":
            first = place
            while first and words[first - 1].kind not in (*ENDS, "states"):
                first -= 1
            if named := _anywhere(words[first:place]):  # "B is the answer."
                return named
        while start < end and words[start].kind in ENDS:
            start += 1
        stop = next((i for i in range(start, end) if words[i].kind in ("stop", "line")), end)
        sure = next((i for i in range(start, stop) if words[i].kind == "name" and words[i].sure), stop)
        if sure < stop:
            return _decided(words, sure) if words[sure].letter else _anywhere(words[start:stop])
        end = place
    return frozenset()


def _of_lines(words: list[Word]) -> frozenset[int]:
    """The option whose letter begins a line, or that is all of a line; none if there are several, or other marked letters."""
    named: frozenset[int] = frozenset()
    start = 0
    for end in [*(place for place, word in enumerate(words) if word.kind == "line"), len(words)]:
        line, start = words[start:end], end + 1
        if not line:
            continue
        first, second = line[0], line[1] if len(line) > 1 else Word("line", "")
        if first.kind == "name" and first.letter and first.sure and (first.marked or second.kind in ENDS):
            named |= _decided(line, 0)
        elif all(word.kind == "name" or BETWEEN.fullmatch(word.text) for word in line):
            named |= _anywhere(line)
    others = (word.options for word in words if word.kind == "name" and word.marked)
    return named if len(named.union(*others)) == 1 else frozenset()


def _decided(words: list[Word], place: int) -> frozenset[int]:
    """The option of a letter that what follows explains, and any other that is named beside it ("B or C", "B. circle")."""
    named, joined = words[place].options, False
    for number in range(place + 1, len(words)):
        word = words[number]
        if word.kind == "name":
            alone = number + 1 == len(words) or words[number + 1].kind in ENDS
            return named | word.options if (joined or alone) and not named & word.options else named
        if not BETWEEN.fullmatch(word.text):
            break
        joined = joined or bool(JOINS.fullmatch(word.text))
    return named


def _anywhere(words: list[Word]) -> frozenset[int]:
    """All options that are named."""
    names = [word for word in words if word.kind == "name"]
    letters = any(word.letter and word.sure for word in names)
    return frozenset().union(*(word.options for word in names if word.sure or (letters and word.letter)))

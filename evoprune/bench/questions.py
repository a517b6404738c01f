"""Questions with known answers, read from a JSONL or CSV file, and the code for grading a model's answers.

This module does not import torch.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from evoprune.batch import Row, RowReader
from evoprune.bench.scores import ALL, TYPE
from evoprune.util import is_url, without_tags

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
# Patterns that match a number as a word or as digits, keyed by both spellings.
NUMBERS = {
    name: f"(?:{word}|{number})" for number, word in enumerate(_NUMBERS) for name in (word, f"{number}", f"{number:02}")
}
STATES = (
    r"(?:(?:final|correct|right|best|my) )?answer|(?:final|correct|best|my) (?:option|choice|letter|one)"
    r"|(?:option|choice)(?= is\b|:)"
    r"|(?:I|we)(?:'d|'ll|'m| would| will| am)? (?:choose|chose|select|selected|pick|picked|go with|going with|opt for)"
)
IS = "is|was|would be|should be|must be"
DENIES = r"or|not|no|none|never|neither|nor|cannot|without|rul(?:ed?|es|ing) out|eliminat\w*|exclud\w*|\w+n't"
DENIES_BEFORE = "wrong|incorrect|false|impossible|unlikely"
ASIDE = (
    "because|since|due to|given that|while|whereas|although|though|if|unlike|except|other than"
    "|rather than|instead of|as opposed to"
)
# A letter refers to an option if it starts a clause or follows one of the words in `LEADS`, unless it is directly followed by
# another word ("A circle", "I think", "C major"). Words in `FOLLOWS` are allowed.
LEADS = re.compile(
    "is|was|be|are|it's|that's|options?|choice|letter|say|think|guess|believe|with|choose|choosing|pick|select|either|only|just"
    "|probably|definitely|clearly|certainly|surely|likely|maybe|perhaps|possibly|是|为|项",
    re.IGNORECASE,
)
FOLLOWS = re.compile(
    "is|was|would|seems|appears|looks|best|correctly|matches|describes|shows|fits|as|and|then|to", re.IGNORECASE
)
# Options that are also common words require stricter patterns. For example, "no car" does not refer to the option "no", and neither
# "the left one" nor "one of them" refers to the option "one".
COMMON = {
    "no": r"no(?! (?!because\b)\w)",
    "(?:one|1)": r"(?:1|(?:(?<![\w ])|(?<=\bis )|(?<=\bonly )|(?<=\bjust )|(?<=\bexactly ))one(?! of\b))",
}

_SPACED = re.compile(
    r"([\u3041-\u9fff\uac00-\ud7a3])"
)  # Chinese, Japanese, and Korean characters, which are not separated by spaces
_MARKUP = str.maketrans(dict.fromkeys('*`$"“”{}#', " ") | {"\\": "", "’": "'", "‘": "'"})
ENDS = ("clause", "stop", "line", "aside")
JOINS = re.compile(
    "and|then|to|maybe|perhaps|possibly|[/&]", re.IGNORECASE
)  # words that join two options if the answer refers to both
FILLERS = re.compile(rf"{JOINS.pattern}|[,:.–—()\[\]-]|an?|the|option", re.IGNORECASE)


@dataclass
class Word:
    """A word or punctuation mark in an answer.

    A letter that isn't `sure`, such as the C in "vitamin C" or "B and C", does not refer to an option by itself, but it can
    contradict another letter.
    """

    # "name" (of an option), "states", "denies", "denies_before", "aside", "clause" (the start of one), "stop", "line" or "plain"
    kind: str
    text: str
    # The indices of the options that the word refers to, or -1 for a letter without a corresponding option.
    options: frozenset[int] = frozenset()
    letter: bool = False  # True for a single letter
    marked: bool = (
        # True for a letter that is in brackets, or that starts a clause and precedes a bracket, a period, or a colon.
        False
    )
    sure: bool = True  # True if the word by itself refers to an option


def grade(row: Row, said: str) -> bool | None:
    """Grade an answer.

    Returns:
        True if `said` is correct, False if it is wrong, and None if the row has options but `said` does not clearly refer to one of
        them.
    """
    if not row.options:
        return normalised(said) == normalised(row.answer)
    choice = chosen_option(said, row.options)
    if choice is None:
        return None
    return row.options[choice] == row.answer


def normalised(text: str) -> str:
    """Normalize text for comparison: ignore case, and remove surrounding whitespace and a final period."""
    return text.strip().removesuffix(".").strip().casefold()


def chosen_option(said: str, options: tuple[str, ...]) -> int | None:
    """Find the option chosen by an answer, based on the option's letter or text.

    These rules are tried in order until one finds an option:

    1. The whole answer is the text of an option, or an option's line in the prompt (`B. blue star`).
    2. Take the last statement that mentions an option, such as `the answer is B`, `I choose B`, `B is the correct answer`,
       `\\boxed{B}` or `<answer>B</answer>`. If it mentions the option's letter, any text after the letter is an explanation.
    3. Take the option whose letter begins a line (`B: it is blue`, `(B)`, `B, because`) or whose name is a whole line, if there is
       only one such option.
    4. Take the option mentioned anywhere in the answer, if there is only one.
    5. If several options are mentioned, take the last line that consists of a letter. If there is no such line, take the last line
       if it repeats an option.

    A letter refers to an option if it is in brackets, at the start of a clause, or after a word such as "is" or "option", unless
    another word follows directly ("a circle", "I think"). The text of an option must appear with all of its words, but articles are
    optional, and numbers up to twelve may be written as digits or as words. Options are ignored inside `<think>`, in questions,
    after words such as "because", and in clauses that contain a denial ("not A", "A is wrong") or an "or". The answer mentions two
    options if it contains "A and B", or a letter followed by the text of another option (`B. circle`).

    Returns:
        The index of the option, or None if the answer does not clearly choose one.
    """
    alone = normalised(said)
    for lines in (options, [f"{letter}. {option}" for letter, option in zip(Row.LETTERS, options, strict=False)]):
        texts = [normalised(text) for text in lines]
        if texts.count(alone) == 1 and not re.fullmatch("[a-z]", alone):  # a single letter may refer to another option
            return texts.index(alone)
    words = read(said, options)
    named = _stated(words) | _of_lines(words) or _anywhere(words)
    if len(named) != 1:
        named = _last_letter(words) or _repeated(words)
    if len(named) != 1 or named == {-1}:
        return None
    return max(named)


def _stated(words: list[Word]) -> frozenset[int]:
    """Return the options in the last statement such as "the answer is B". The result is empty if there is no such statement."""
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
            if words[sure].letter:
                return _decided(words, sure)
            return _anywhere(words[start:stop])
        end = place
    return frozenset()


def _of_lines(words: list[Word]) -> frozenset[int]:
    """Return the option whose letter starts a line, or whose letter or text is a whole line.

    The result is empty if there are several such options, or if the answer marks other options' letters.
    """
    named: frozenset[int] = frozenset()
    for line in _lines(words):
        first = line[0]
        alone = len(line) == 1 or line[1].kind in ENDS
        if first.kind == "name" and first.letter and first.sure and (first.marked or alone):
            named |= _decided(line, 0)
        elif _names_alone(line):
            named |= _anywhere(line)
    others = (word.options for word in words if word.kind == "name" and word.marked)
    if len(named.union(*others)) != 1:
        return frozenset()
    return named


def _last_letter(words: list[Word]) -> frozenset[int]:
    """Return the option on the last line that consists of a letter. The result is empty if that line is part of a list."""
    lines = _lines(words)
    letters = {number: _anywhere(line) for number, line in enumerate(lines) if _is_letter(line)}
    if not letters:
        return frozenset()
    *before, last = letters
    chosen = letters[last]
    earlier = [letters[number] for number in before]
    if all(option == chosen for option in earlier):
        return chosen
    # True if the line is another item in a list with one letter per line.
    listed = last - 1 in letters and chosen not in earlier
    ends = last + 1 == len(lines)  # if not, each letter may be followed by an explanation
    if listed or not ends:
        return frozenset()
    return chosen


def _repeated(words: list[Word]) -> frozenset[int]:
    """Return the option on the last line, if it has more lines to itself than any other option."""
    lines = _lines(words)
    if not lines or not _names_alone(lines[-1]):
        return frozenset()
    counts = Counter(_anywhere(line) for line in lines if _names_alone(line))
    chosen = _anywhere(lines[-1])
    count = counts.pop(chosen)
    if count <= max(counts.values(), default=0):
        return frozenset()
    return chosen


def _lines(words: list[Word]) -> list[list[Word]]:
    """Split words into lines, and drop empty lines."""
    ends = [place for place, word in enumerate(words) if word.kind == "line"]
    lines = [words[start:end] for start, end in zip([0, *(end + 1 for end in ends)], [*ends, len(words)], strict=True)]
    return [line for line in lines if line]


def _names_alone(line: list[Word]) -> bool:
    return all(word.kind == "name" or FILLERS.fullmatch(word.text) for word in line)


def _is_letter(line: list[Word]) -> bool:
    """Return True if a line consists of an option letter preceded by up to three words, such as `It is B.` or `Final: B`."""
    names = [place for place, word in enumerate(line) if word.kind == "name"]
    if len(names) != 1 or not (line[names[0]].letter and line[names[0]].sure):
        return False
    plain = [place for place, word in enumerate(line) if word.kind == "plain" and not FILLERS.fullmatch(word.text)]
    return len(plain) <= 3 and all(place < names[0] for place in plain)


def _decided(words: list[Word], place: int) -> frozenset[int]:
    """Return a letter's option, and any other option mentioned directly after it ("B or C", "B. circle").

    All other text after the letter is treated as an explanation, in which options are ignored.
    """
    named = words[place].options
    joined = False
    for number in range(place + 1, len(words)):
        word = words[number]
        if word.kind == "name":
            alone = number + 1 == len(words) or words[number + 1].kind in ENDS
            if (joined or alone) and not named & word.options:
                return named | word.options
            return named
        if not FILLERS.fullmatch(word.text):
            break
        joined = joined or bool(JOINS.fullmatch(word.text))
    return named


def _anywhere(words: list[Word]) -> frozenset[int]:
    names = [word for word in words if word.kind == "name"]
    letters = any(word.letter and word.sure for word in names)
    return frozenset().union(*(word.options for word in names if word.sure or (letters and word.letter)))


def read(said: str, options: tuple[str, ...]) -> list[Word]:
    """Split an answer into words and punctuation marks, and find the words that refer to options.

    An option becomes a plain word if the answer denies it, leaves it open, asks about it, or mentions it in passing.
    """
    scanner, names = _scanner(options)
    words: list[Word] = []
    for match in scanner.finditer(_plain(said)):
        kind = match.lastgroup
        text = match[0]
        if kind == "letter":
            letter = next(char for char in text if char.isalpha()).upper()
            words.append(Word("name", text, names[letter], letter=True, marked=len(text) > 1))
        elif kind in names:
            words.append(Word("name", text, names[kind]))
        else:
            words.append(Word(kind, text))
    edge = Word("line", "")
    for before, word, after in zip([edge, *words], words, [*words[1:], edge], strict=False):
        if word.letter and not word.marked:
            _weigh(word, before, after, pronoun=len(options) < 9)
    _drop_denied([*words, edge])
    return words


def _plain(text: str) -> str:
    """Remove thinking and markup from an answer, and normalize its characters. Markers such as <answer> become words."""
    text = unicodedata.normalize("NFKC", text).rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"<\|[^<>|]*\|>", " ", text)  # removes special tokens
    text = re.sub(r"<answer>|\\boxed\b", "\nanswer: ", text)
    text = re.sub(r"</?[a-z]+>|\\(?:text|math)[a-z]*", " ", text)
    text = re.sub(r"(\*\*|__|[*_`$])([A-Za-z])\1", r"(\2)", text)
    text = re.sub(r"(?<!\w)'([A-Za-z])'", r" \1 ", text)
    text = _SPACED.sub(r" \1 ", text.translate(_MARKUP))
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    return re.sub(r" (?=[.,:;!?%)\]])", "", text).replace(":\n", ": ")


def _weigh(word: Word, before: Word, after: Word, pronoun: bool) -> None:
    """Decide whether an unbracketed letter refers to an option by itself. If it is an ordinary word, its kind becomes "plain"."""
    letter = word.text
    word.marked = before.kind in ("stop", "line", "clause", "name") and after.text in (".", ":", ")", "]")
    wordy = after.kind == "plain" and after.text.isascii() and not FOLLOWS.fullmatch(after.text)
    article = letter in "Aa" and (wordy or (after.kind in ("name", "states") and not after.letter))
    personal = letter in "Ii" and (pronoun or (after.kind not in ("clause", "stop", "line") and after.text != "is"))
    led = before.kind in ("states", "aside", "clause", "stop", "line") or LEADS.fullmatch(before.text)
    word.sure = bool(led) and not wordy
    if article or personal or (letter.islower() and not word.sure):
        word.kind = "plain"


def _drop_denied(words: list[Word]) -> None:
    """Turn options into plain words in questions, after words such as "because", and in clauses containing "not" or "or"."""
    clause = []
    sentence = []
    denied = False
    for word in words:
        if word.kind == "name":
            clause.append(word)
            sentence.append(word)
        elif word.kind in ("clause", "aside", "stop", "line"):
            plain = []
            if word.text == "?":
                plain = sentence
            elif denied:
                plain = clause
            for name in plain:
                name.kind = "plain"
            clause = []
            denied = word.kind == "aside"
            if word.kind in ("stop", "line"):
                sentence = []
        elif word.kind == "denies":
            denied = True
        elif word.kind == "denies_before":
            for name in clause:
                name.kind = "plain"


@lru_cache(maxsize=256)
def _scanner(options: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, frozenset[int]]]:
    """Build a pattern that matches one word of an answer.

    The name of the last matching group is the word's kind. The text of each option has its own group, with the longest text first.

    Returns:
        The pattern, and a dict that maps letters and group names to the indices of options.
    """
    letters = {letter: {-1} for letter in Row.LETTERS}
    letters |= {letter: {index} for index, letter in enumerate(Row.LETTERS[: len(options)])}
    patterns: dict[str, set[int]] = {}
    for index, option in enumerate(options):
        pattern = _pattern(option, Row.LETTERS[index])
        if re.fullmatch(
            "[A-Z]", pattern, re.IGNORECASE
        ):  # the text is a single letter, which may also be another option's letter
            letters[pattern.upper()] = letters[pattern.upper()] - {-1} | {index}
        elif pattern:
            patterns.setdefault(pattern, set()).add(index)
    ordered = sorted(patterns, key=len, reverse=True)
    groups = {f"text{number}": pattern for number, pattern in enumerate(ordered)}
    names = letters | {group: patterns[pattern] for group, pattern in groups.items()}
    texts = "|".join(f"(?P<{group}>{pattern})" for group, pattern in groups.items()) or "(?!)"
    branches = (
        rf"(?<![\w+-])(?<!\d[.,:/])(?i:{texts})(?!\w|-\w|[.,:/]\d)",
        rf"(?P<states>(?i:\b(?:{STATES})\b(?: (?:{IS})\b)?)|答 案|选(?: [择项])?)",
        rf"(?P<aside>(?i:\b(?:{ASIDE})\b)|因 为)",
        rf"(?P<denies>(?i:\b(?:{DENIES})\b)|[不没或])",
        rf"(?P<denies_before>(?i:\b(?:{DENIES_BEFORE})\b)|错)",
        r"(?P<letter>[(\[【<] ?[A-Za-z] ?[.:]?[)\]】>]|(?<![\w.&°'-])[A-Za-z](?![\w+#]|[.&'-]\w))",
        r"(?P<line>\n)",
        r"(?P<stop>[.!?;。])",
        r"(?P<clause>,(?! (?i:or)\b)|[:()\[\]、–—]|(?<!\w)-(?!\w)|(?i:\b(?:but|so|therefore|thus|hence|and(?= not\b))\b))",
        r"(?P<plain>\w+(?:'\w+)?|[/&,])",
    )
    return re.compile("|".join(branches)), {name: frozenset(named) for name, named in names.items()}


def _pattern(option: str, letter: str) -> str:
    """Return a pattern that matches an option's text, with optional articles and with numbers as digits or words.

    The pattern is empty if the text does not contain any word characters.
    """
    words = re.sub(rf"^\(?{letter}[.):] (?=.)", "", _plain(option)).removesuffix(".").split()
    if not re.search(r"\w", "".join(words)):
        return ""
    words[0] = words[0].lower()
    kept = [*(word for word in words[:-1] if word not in ("a", "an", "the")), words[-1]]
    pattern = r" (?:(?:an?|the) )?".join(NUMBERS.get(word.lower()) or re.escape(word) for word in kept)
    return COMMON.get(pattern, pattern)


@dataclass(frozen=True)
class VideoQuestions:
    """A video and the questions about it. `name` identifies the video in results, where intervals are clustered by this name."""

    name: str
    path: Path
    rows: tuple[Row, ...]


def of_groups(videos: Sequence[VideoQuestions], groups: Collection[str]) -> list[VideoQuestions]:
    """Select the questions that belong to any of the `groups`. Videos without matching questions are dropped.

    If `groups` is empty, all questions are selected.
    """
    if not groups:
        return list(videos)
    every = [replace(video, rows=tuple(row for row in video.rows if set(groups) & set(row.groups))) for video in videos]
    return [video for video in every if video.rows]


def load_questions(path: Path) -> list[VideoQuestions]:
    """Read questions from a file, and group them by video in order of first appearance.

    In addition to the fields read by `RowReader`, each row must have an `answer`. If the row has `options`, the answer is an
    option's letter or text. A row may also have a `type` and `groups` (separated by | in CSV files). If a row has no ID, its line
    number is used.

    Raises:
        UsageError: If the file cannot be read or has no rows, or if a row is invalid or has the same ID as an earlier row.
    """
    videos: dict[str, list[Row]] = {}
    for row in GRADED.load(str(path)):
        videos.setdefault(row.video, []).append(row)
    return [VideoQuestions(name, Path(rows[0].paths[0]), tuple(rows)) for name, rows in videos.items()]


def _complete(row: Row, fields: dict[str, Any]) -> Row:
    texts = [normalised(option) for option in row.options]
    groups = fields.get("groups", [])
    type = fields.get("type")
    asked = without_tags(row.question)
    answer = str(row.answer) if isinstance(row.answer, int) else row.answer
    for wrong, problem in (
        (len(set(texts)) < len(texts), f"options must be 2 to {len(Row.LETTERS)} different texts"),
        (
            not isinstance(groups, list) or not all(isinstance(g, str) for g in groups),
            "groups is not a list of strings",
        ),
        (
            isinstance(groups, list) and any(g == ALL or str(g).startswith(TYPE) for g in groups),
            f"a group cannot be called {ALL!r}, nor begin with {TYPE!r}",
        ),
        (len(row.inputs) > 1, "a question in an evaluation is about one video or image"),
        (any(map(is_url, row.inputs)), "an evaluation does not read URLs: download the video first"),
        (bool(row.earlier), "an evaluation asks single questions, so a row needs question, not messages"),
        (row.subtitles is not None, "subtitles are not read in an evaluation"),
        (not asked.strip(), "question is empty"),
        (answer is None, "no answer"),
        (not isinstance(answer, str) or not answer.strip(), "answer is not a string"),
    ):
        if wrong:
            raise ValueError(problem)
    if texts:  # an option's text takes precedence over its letter
        choice = texts.index(normalised(answer)) if normalised(answer) in texts else chosen_option(answer, row.options)
        if choice is None:
            raise ValueError(f"the answer {answer!r} is not one of the options")
        answer = row.options[choice]
    if type is not None:
        type = str(type)
    return replace(row, question=asked, answer=answer, type=type, groups=tuple(groups))


GRADED = RowReader(
    fields=f"a row has video, question and answer, and may have {RowReader.MAY_HAVE}, type and groups",
    file="give a JSONL or CSV file of questions",
    numbered=True,
    complete=_complete,
)

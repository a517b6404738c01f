"""Questions with known answers: reading them from a file, and telling whether an answer is right. No torch."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from evoprune.errors import UsageError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """A question about a video.

    Attributes:
        id: what names it in the results.
        question, answer: as they stand in the file; with `options` the answer is the text of one of them.
        options: what there is to choose from, or nothing for an open question.
        type, groups: what accuracy is told apart by.
    """

    id: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    type: str | None = None
    groups: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What is asked; options follow as lines with letters, as lmms-eval puts them."""
        if not self.options:
            return self.question
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False)]
        request = "Answer with the option's letter from the given choices directly."
        return "\n".join([self.question, *lines, request])

    def grade(self, said: str) -> bool | None:
        """Whether an answer is right; None if it names none of the options."""
        if not self.options:
            return _plain(said) == _plain(self.answer)
        choice = chosen_option(said, self.options)
        return None if choice is None else self.options[choice] == self.answer


@dataclass(frozen=True)
class Video:
    """A part of a video and what is asked about it; `name` stands for it in results and is what intervals are clustered by."""

    name: str
    path: Path
    items: tuple[Item, ...]


def _plain(text: str) -> str:
    """Without case, outer blanks and a final full stop."""
    return text.strip().removesuffix(".").strip().casefold()


def chosen_option(said: str, options: tuple[str, ...]) -> int | None:
    """Which option an answer names, by text or by letter; None if none, or more than one.

    In this order: the text of an option and nothing else; a letter alone, or set off by a bracket, a full stop, a colon or a comma
    (`B`, `(b)`, `B. red`); a letter with the option's own text (`B red`); `the answer is B`, `option B`; the only option whose
    text occurs as whole words.
    """
    plain, texts = _plain(said), [_plain(option) for option in options]
    letters = LETTERS[: len(options)].casefold()
    if plain in texts:
        return texts.index(plain) if texts.count(plain) == 1 else None
    first = re.match(rf"[(\[*]*([{letters}])(?:$|[)\].:,*])", plain)
    if first is None:
        with_text = re.match(rf"([{letters}])\s+(.*)", plain)
        if with_text and with_text[2] == texts[letters.index(with_text[1])]:
            first = with_text
    if first is None:
        named = rf"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[*]*([{letters}])(?![\w'])"
        found = set(re.findall(named, plain))
        if len(found) == 1:
            return letters.index(found.pop())
    if first:
        return letters.index(first[1])
    within = [i for i, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)]
    return within[0] if len(within) == 1 else None


def load_items(path: Path) -> list[Video]:
    """The questions of a JSONL file, video by video in the order of their first lines.

    A line has `video` (relative to the file), `question` and `answer`, and may have `id`, `options` (then `answer` is a letter or
    an option's text), `type` and `groups`. Ids default to the line's number.

    Raises:
        UsageError: the file cannot be read, a line is no such object, an id is there twice, or there are no lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        reason = getattr(problem, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"cannot read {path}: {reason}", "give a JSONL file of questions, or demo") from problem
    videos: dict[str, list[Item]] = {}
    seen = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            item = _item(row, number)
            videos.setdefault(_text(row, "video"), []).append(item)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            what = f"no {problem}" if isinstance(problem, KeyError) else problem
            hint = "a line has video, question and answer, and may have id, options, type and groups"
            raise UsageError(f"{path}, line {number} is not a question: {what}", hint) from problem
        if item.id in seen:
            raise UsageError(
                f"{path}, line {number}: the id {item.id!r} is there twice", "give every question its own id"
            )
        seen.add(item.id)
    if not videos:
        raise UsageError(f"{path} holds no questions", "a line has video, question and answer")
    return [Video(name, path.parent / name, tuple(items)) for name, items in videos.items()]


def _text(row: dict, name: str) -> str:
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name} is not a text")
    return row[name]


def _item(row: dict, number: int) -> Item:
    options, answer = row.get("options") or (), row["answer"]
    answer = str(answer) if isinstance(answer, int) else _text(row, "answer")
    groups = row.get("groups") or ()
    for name, value in (("options", options), ("groups", groups)):
        if isinstance(value, str) or not all(isinstance(each, str) for each in value):
            raise ValueError(f"{name} is not a list of texts")
    if len(options) > len(LETTERS) or len(options) == 1 or len({_plain(o) for o in options}) < len(options):
        raise ValueError(f"options are 2 to {len(LETTERS)} different texts")
    if options:
        choice = chosen_option(answer, tuple(options))
        if choice is None:
            raise ValueError(f"the answer {answer!r} is none of the options")
        answer = options[choice]
    kind = row.get("type")
    name = str(row.get("id", number))
    return Item(
        name, _text(row, "question"), answer, tuple(options), None if kind is None else str(kind), tuple(groups)
    )

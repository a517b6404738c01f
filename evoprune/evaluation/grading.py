"""Grading: whether what a model said is the expected answer. No torch."""

import re

from evoprune.batch.rows import LETTERS, Row


def grade(row: Row, said: str) -> bool | None:
    """Whether `said` is the row's answer; None if the row has options and `said` names none of them."""
    if not row.options:
        return normalised(said) == normalised(row.answer)
    choice = chosen_option(said, row.options)
    return None if choice is None else row.options[choice] == row.answer


def normalised(text: str) -> str:
    """The text without case, outer blanks and a final full stop."""
    return text.strip().removesuffix(".").strip().casefold()


def chosen_option(said: str, options: tuple[str, ...]) -> int | None:
    """The index of the option that an answer names, by text or by letter; None if it names none, or more than one.

    Tried in this order: the text of an option and nothing else; a letter alone, or followed by a bracket, a full stop, a colon or
    a comma (`B`, `(b)`, `B. red`); a letter with the option's own text (`B red`); `the answer is B`, `option B`; the only option
    whose text occurs as whole words.
    """
    words, texts = normalised(said), [normalised(option) for option in options]
    letters = LETTERS[: len(options)].casefold()
    if words in texts:
        return texts.index(words) if texts.count(words) == 1 else None
    first = re.match(rf"[(\[*]*([{letters}])(?:$|[)\].:,*])", words)
    if first is None:
        with_text = re.match(rf"([{letters}])\s+(.*)", words)
        if with_text and with_text[2] == texts[letters.index(with_text[1])]:
            first = with_text
    if first is None:
        named = rf"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*[(\[*]*([{letters}])(?![\w'])"
        found = set(re.findall(named, words))
        if len(found) == 1:
            return letters.index(found.pop())
    if first:
        return letters.index(first[1])
    within = [i for i, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", words)]
    return within[0] if len(within) == 1 else None

"""Which texts a model can be given, and what of a text must not reach a terminal."""

import re

from evoprune.errors import UsageError

# Control characters but for tab and newline, which a terminal obeys; and those that make it show text in another order.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    r"""The text with escapes, such as \x1b, for what a terminal would obey."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_text(value: str) -> bool:
    """Whether it is text: no half of a surrogate pair, as stray bytes in arguments become, and no NUL, as in UTF-16."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def check_text(*texts: str | None) -> None:
    """Raises UsageError if one of a question and a system prompt is no text."""
    if not all(is_text(text) for text in texts if text):
        raise UsageError("the question or the system prompt is not valid text", "write it in UTF-8")

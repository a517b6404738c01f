"""Numbers as short texts: times, sizes, counts; texts that must fit, misspelt words; and texts that are harmless."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from evoprune.errors import UsageError

# Control characters but for tab and newline, which a terminal obeys; and those that make it show text in another order.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

FILE_URL = "file://"
LONGEST = 200  # characters of a path in a message
SOME = 10  # texts that a sentence names before it only counts them


def clock(seconds: float | None) -> str:
    """1:02:03.5, 2:31.4 or 0:06.0."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}.{rest % 10}"
    return f"{hours}:{minutes:02d}:{tail}" if hours else f"{minutes}:{tail}"


def roughly(seconds: float) -> str:
    """~40 s, ~12 min or ~9 h: an estimate with one digit or two."""
    if seconds >= 5700:
        return f"~{seconds / 3600:,.0f} h"
    return f"~{seconds / 60:,.0f} min" if seconds >= 95 else f"~{float(f'{seconds:.1g}'):.0f} s"


def shorten(text: str, width: int) -> str:
    """The text with its middle left out where it is too long."""
    head = max(0, (width - 3) // 2)
    return text if len(text) <= width else text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def shown(path: str) -> str:
    """A path in a message: no more than its beginning and end where it is long, or a video inside a data: URL."""
    return shorten(path, 40 if path.startswith("data:") else LONGEST)


def size(count: int | None) -> str:
    if count is None:
        return "?"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def counted(count: int, noun: str) -> str:
    """1 token, 2 tokens."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def budget_text(budget: float | str) -> str:
    """0.25, or the name of a budget such as auto."""
    return budget if isinstance(budget, str) else f"{budget:g}"


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """The beginning of a hint, which names the known words, at most so many, that a misspelt one is like; empty where none is."""
    near = get_close_matches(word.lower(), list(known), most)
    return f"did you mean {listed(near, 'or')}? " if near else ""


def missing_hint(path: str, usual: str) -> str:
    """The hint where there is no file of that name: what else it is, or else `usual`."""
    if path.startswith("data:"):
        return "write it to a file, and give the path of that"
    if path.startswith(FILE_URL):
        return f"leave out {FILE_URL}"
    return "download what is on the web first, e.g. with yt-dlp" if "://" in path else usual


def some(texts: Sequence[str], separator: str = ", ") -> str:
    """The first `SOME` texts, and how many more there are: a, b, and 3 more."""
    more = [f"and {len(texts) - SOME:,} more"] if len(texts) > SOME else []
    return separator.join([*texts[:SOME], *more])


def listed(names: Sequence[str], word: str = "and") -> str:
    """a; a and b; a, b and c."""
    *before, last = names
    return f"{', '.join(before)} {word} {last}" if before else last


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

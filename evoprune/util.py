"""Helpers for formatting messages, file states, seeds, process-wide state, and declaring and checking options."""

import hashlib
import math
import os
import re
import shlex
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import wraps
from itertools import islice
from numbers import Integral, Number, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

from evoprune.errors import UsageError, VideoError, is_out_of_memory

# Matches characters that change the text direction, and control characters interpreted by terminals (except tab and newline).
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

# Matches the beginning of a cell that a spreadsheet would run as a formula, even after apostrophes, so that `from_cell` is exact.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_SIGNED_NUMBER = re.compile(r"[+-]\d+([.,]\d+)*([eE][+-]?\d+)?%?")

WIDTH = 80  # maximum number of columns of printed text
FILE_URL = "file://"
WEB = re.compile("https?://", re.IGNORECASE)  # matches the scheme of a web address
# Matches a URL, even with a leading folder. The lookbehind keeps the time for a long text linear.
ADDRESS = re.compile(r"(?<![a-z\d+.-])([a-z][a-z\d+.-]*)://.*", re.IGNORECASE | re.DOTALL)
WWW = re.compile(r"www\.[^/\s]+\.[^/\s]+(/\S*)?", re.IGNORECASE)  # matches a web address without a scheme
# Matches words that look like files: a data URL, any other URL, a word that starts like a path, or a word with a file extension.
PATH = re.compile(r"data:\S*|\S+://\S+|(?:/|\.{1,2}[/\\]|~|[A-Za-z]:[/\\]|\\\\)\S*|\S*\.[A-Za-z0-9]{2,5}")
# What the values of an environment variable mean that stands for yes or no.
SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("", "0", "false", "no", "off"), False)
STREAMS = ("rtsp", "rtsps", "udp", "tcp")  # URL schemes for live video, which can't be read as a file
DOWNLOAD_HINT = "download it first, e.g. with yt-dlp"
_TAG = r"(?:<(?:video|image)>|<\|vision_start\|><\|(?:video|image)_pad\|><\|vision_end\|>)"
TAGS_BEFORE = re.compile(rf"\A\s*+(?:{_TAG}\s*+)+")
TAGS_AFTER = re.compile(rf"(?:\n[ \t]*+{_TAG}[ \t\r]*+){{1,64}}\s*+\Z")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LONGEST = 200  # maximum length of a path in a message, in characters
T = TypeVar("T")
MOST_PLACES = 1000  # maximum number of folders searched for a file
SOME = 10  # maximum number of items listed in a message


def clock(seconds: float | None) -> str:
    """Format a time for display, for example as 1:02:03.5, 2:31.4, or 0:06.0."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    tail = f"{rest // 10:02d}.{rest % 10}"
    if not hours:
        return f"{minutes}:{tail}"
    return f"{hours}:{minutes:02d}:{tail}"


def long_clock(seconds: float) -> str:
    """Format a time with hours and milliseconds, for example as 01:02:03.500."""
    rest, milliseconds = divmod(round(1000 * seconds), 1000)
    rest, whole_seconds = divmod(rest, 60)
    hours, minutes = divmod(rest, 60)
    return f"{hours:02d}:{minutes:02d}:{whole_seconds:02d}.{milliseconds:03d}"


def parse_time(text: str) -> float:
    """Parse a time such as `90`, `90.5`, `1:30`, `01:30:00`, `1:02:03.5`, `90s`, `1m30s`, or `2h`, with an optional minus sign.

    Returns:
        The time in seconds.

    Raises:
        UsageError: If the text doesn't match any of these formats.
    """
    negative = text.strip().startswith("-")
    digits = text.strip().removeprefix("-")
    clock = r"(?:(?:([0-9]+):)?([0-9]+):)?([0-9]+(?:\.[0-9]+)?)"
    units = r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?"
    if digits and (match := re.fullmatch(clock, digits) or re.fullmatch(units, digits)):
        hours, minutes, seconds = (float(group or 0) for group in match.groups())
        total = hours * 3600 + minutes * 60 + seconds
        # The first field may have any value (90:00 is an hour and a half), but the fields after it must be below 60.
        proper = (minutes < 60 or not match[1]) and (seconds < 60 or not (match[1] or match[2]))
        if proper and math.isfinite(total):
            return -total if negative and total else total
    hint = (
        "write seconds (90.5 or 90.5s), minutes (1:30 or 1m30s) or hours (1:02:03 or 1h2m3s); from the end: -5 or -5s"
    )
    raise UsageError(f"{shorten(text, 80)!r} is not a time", hint)


def roughly(seconds: float) -> str:
    """Format an estimated time with one or two digits, for example as ~0.3 s, ~40 s, ~12 min, or ~9 h."""
    if seconds >= 5700:
        return f"~{seconds / 3600:,.0f} h"
    if seconds >= 95:
        return f"~{seconds / 60:,.0f} min"
    digit = float(f"{seconds:.1g}")
    if seconds >= 0.95:
        return f"~{digit:.0f} s"
    return f"~{digit:g} s"


def shorten(text: str, width: int) -> str:
    """Shorten text to at most `width` characters by replacing its middle with an ellipsis."""
    if len(text) <= width:
        return text
    head = max(0, (width - 3) // 2)
    return text[:head] + "..." + text[len(text) - (width - 3 - head) :]


def shown(path: str) -> str:
    """Format a path for a message, without passwords. Long paths and data: URLs are shortened to their beginning and end."""
    if path.startswith("data:"):
        return shorten(path, 40)
    return shorten(without_password(path), LONGEST)


def size(count: int | None) -> str:
    if count is None:
        return "?"
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.1f} GiB"


def counted(count: int, noun: str) -> str:
    """Format a count with its noun, for example as "1 token" or "2 tokens"."""
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun}s"


def budget_text(budget: float | str) -> str:
    """Format a budget, either a number such as 0.25 or a name such as auto."""
    if isinstance(budget, str):
        return budget
    return f"{budget:g}"


def did_you_mean(word: str, known: Iterable[str], most: int = 1) -> str:
    """Return the start of a hint with suggestions for a misspelled word, or an empty string if no known word is similar.

    Args:
        word: The misspelled word.
        known: The valid words.
        most: The maximum number of words to suggest.
    """
    near = get_close_matches(word.lower(), list(known), most)
    if not near:
        return ""
    return f"did you mean {listed(near, 'or')}? "


def cannot_read(path: str, problem: OSError, what: str = "") -> str:
    """Return the error message for a file that cannot be opened. `what` says what kind of file it is, followed by a space."""
    if isinstance(problem, FileNotFoundError):
        return f"no such file: {shown(path)}"
    return f"cannot read {what}{shown(path)}: {problem.strerror}"


def missing_hint(path: str, usual: str, meant: str = "") -> str:
    """Return a hint on how to correct a nonexistent path.

    For a URL, the hint says what to pass instead. For a misspelled path, it suggests an existing path with a similar name, followed
    by `usual`. If there isn't one, the hint is just `usual`.

    Args:
        path: The nonexistent path.
        usual: What the hint says in any case.
        meant: A suggestion from `did_you_mean`, which replaces the suggestion of a path.
    """
    if path.startswith("data:"):
        return "write it to a file and give its path"
    if path.startswith(FILE_URL):
        return f"leave out {FILE_URL}"
    if WWW.fullmatch(path):
        return f"web addresses start with https://: https://{shown(path)}"
    if address := ADDRESS.search(path):
        if address[1].lower() in STREAMS:
            return f'live video: evoprune watch {without_password(shown(address[0]))} -Q "What happens?"'
        if WEB.match(path):
            return DOWNLOAD_HINT
        return "download it first; only http:// and https:// URLs are read directly"
    if not meant and (near := near_file(path)):
        meant = f"did you mean {shown(near)}? "
    return f"{meant}{usual}".rstrip()


def near_file(path: str) -> str | None:
    """Find an existing path that resembles a nonexistent one. Returns None if there is no match.

    Misspelled folders are corrected like file names. Otherwise, a file with the same name is searched in neighboring folders.
    """
    place = os.sep * path.startswith(os.sep)
    for name in filter(None, path.split(os.sep)):
        names = _names_in(place)
        if name not in (*names, os.curdir, os.pardir):
            name = _near_name(name, names)
        if name is None:
            return _same_name(path)
        place = os.path.join(place, name)
    return None if os.path.normpath(place) == os.path.normpath(path) else place


def _near_name(name: str, names: Sequence[str]) -> str | None:
    """Return the name that resembles a misspelled one most, or None.

    Names are compared without their extensions; otherwise, all videos in a folder would look similar. If the extensions differ, the
    rest of the name must be nearly identical.
    """
    stem, extension = os.path.splitext(name.lower())
    parts = {each: os.path.splitext(each.lower()) for each in names}
    alike = [parts[each][0] for each in names if parts[each][1] == extension]
    near = get_close_matches(stem, alike, 1) or get_close_matches(stem, [each for each, _ in parts.values()], 1, 0.8)
    found = get_close_matches(name, [each for each in names if parts[each][0] in near], 1, 0.0)
    return found[0] if found else None


def _same_name(path: str) -> str | None:
    """Find a path with the same name in the current folder, or in a folder above, next to, or inside the folder of `path`."""
    folder, name = os.path.split(path)
    above = os.path.dirname(folder)
    inside = (os.path.join(place, each) for place in dict.fromkeys((folder, above)) for each in _names_in(place))
    found = (os.path.join(place, name) for place in ("", above, *islice(inside, MOST_PLACES)))
    return next((each for each in found if name and os.path.lexists(each)), None)


def _names_in(folder: str) -> list[str]:
    """Return the names in a folder in order, or an empty list if it can't be read."""
    try:
        return sorted(os.listdir(folder or os.curdir))
    except (OSError, ValueError):  # the folder can't be read, or its name is invalid
        return []


def looks_like_input(value: Any) -> bool:
    """Return True for an existing path, a word that looks like one, and everything that isn't text, such as an array of frames."""
    if isinstance(value, list | tuple):
        return any(map(looks_like_input, value))
    if not isinstance(value, str):
        return not isinstance(value, Mapping | Number | NoneType)
    try:
        return PATH.fullmatch(value) is not None or os.path.lexists(value)
    except ValueError:  # not a valid filename
        return False


def check_order(inputs: Any, question: Any, call: str) -> None:
    """Check that an input and the question about it aren't swapped.

    Args:
        call: The right call, for the hint.

    Raises:
        VideoError: If the input is text that doesn't look like a path, and the question looks like an input.
    """
    if isinstance(inputs, str) and not looks_like_input(inputs) and looks_like_input(question):
        message = f"no such file: {shown(inputs)} (the question and the input are swapped)"
        raise VideoError(message, f"the input comes first: {call}")


def is_url(path: Any) -> bool:
    """Return True if a value is an http or https URL and no file with that name exists."""
    return isinstance(path, str) and WEB.match(path) is not None and not os.path.lexists(path)


def without_password(source: str) -> str:
    """Return a URL without its user name and password."""
    return re.sub(r"(?<=://)[^/]*@", "", source)


def unwritable_hint(path: str | PathLike[str]) -> str:
    """Return a hint on how to correct the path of an output file that cannot be written."""
    folder = os.path.dirname(os.path.expanduser(path))
    hint = "name a file in a folder that you can write to"
    if folder and not os.path.lexists(folder):
        hint += f", or create the folder: mkdir -p {shlex.quote(shown(folder))}"
    return hint


def some(texts: Sequence[str], separator: str = ", ") -> str:
    """Join the first `SOME` strings. If there are more, append the number omitted, as in "a, b, and 3 more"."""
    first = list(texts[:SOME])
    if len(texts) > SOME:
        first.append(f"and {len(texts) - SOME:,} more")
    return separator.join(first)


def listed(names: Sequence[str], word: str = "and") -> str:
    """Join names for use in a sentence, as in "a", "a and b", or "a, b and c"."""
    *before, last = names
    if not before:
        return last
    return f"{', '.join(before)} {word} {last}"


def one_line(text: str) -> str:
    """Convert text, such as a path, to a single line of printable characters."""
    return "".join(c if c.isprintable() else "?" for c in text)


def harmless(text: str) -> str:
    """Replace terminal control characters in text with visible escape sequences."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def to_cell(value: Any) -> Any:
    """Return a value for a cell of a CSV file. Text that a spreadsheet would run as a formula gets a leading apostrophe.

    Numbers stay numbers, even if they are text such as "-3".
    """
    if isinstance(value, str) and _FORMULA.match(value) and not _SIGNED_NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def from_cell(text: str) -> str:
    """Return the text of a cell without the apostrophe added by `to_cell`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def is_text(value: str) -> bool:
    """Return True if a string contains neither NUL characters (as in UTF-16) nor lone surrogates (from stray bytes)."""
    return not any(character == "\0" or "\ud800" <= character <= "\udfff" for character in value)


def without_tags(question: str) -> str:
    """Remove leading and trailing tags such as `<video>` from a question. For example, the LLaVA datasets contain such tags.

    The prompt already contains the input, so the tags aren't needed. Tags in the middle of a question are kept as text.
    """
    return TAGS_AFTER.sub("", TAGS_BEFORE.sub("", question))


def check_text(*texts: str | None) -> None:
    """Check that questions and system prompts are valid text. None values are ignored.

    Raises:
        UsageError: If any text is invalid.
    """
    if not all(is_text(text) for text in texts if text):
        raise UsageError("the question or the system prompt is not valid text", "encode it as UTF-8")


def file_stats(paths: Iterable[str | PathLike]) -> list[tuple[str, int, int, int]]:
    """Return each file's path, size in bytes, mtime, and ctime, both in nanoseconds.

    The ctime changes even if a replaced or modified file has the previous file's size and mtime, as after `cp -p` or `rsync -t`.

    Raises:
        OSError: If a file is missing.
    """
    stats = [(os.fspath(path), os.stat(path)) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in stats]


def open_safetensors(path: str | PathLike[str]) -> Any:
    """Open a safetensors file with memory-mapped torch tensors.

    Raises:
        OSError: If the file is missing or damaged, or was just deleted by another process.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    # safetensors reads the header, then torch reopens the file by name. Either step may fail.
    except (RuntimeError, SafetensorError) as problem:
        if is_out_of_memory(problem):
            raise
        raise OSError(str(problem)) from problem


def file_state(paths: Iterable[str | PathLike]) -> dict[str, Any] | None:
    """Describe the state of files as flat JSON data, without reading them. Returns None if there are no files or one is missing.

    `files` is the number of files, `bytes` is their total size, and `modified_utc` is the latest modification time. `digest` is a
    hash of all names, sizes, and modification times.
    """
    try:
        stats = sorted((os.path.basename(path), size, time) for path, size, time, _ in file_stats(paths))
        newest = EPOCH + timedelta(microseconds=max(time for _, _, time in stats) // 1000)
    except (
        OSError,
        ValueError,
        OverflowError,
    ):  # a file is missing, a name is invalid, there are no files, or a file was modified after the year 9999
        return None
    return {
        "files": len(stats),
        "bytes": sum(size for _, size, _ in stats),
        "modified_utc": newest.isoformat(),
        "digest": hashlib.sha256(repr(stats).encode()).hexdigest()[:16],
    }


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def install_hint(extra: str) -> str:
    """Return the command that installs an extra of this package, such as "speech".

    If evoprune was installed from a local checkout, pip has recorded its folder (PEP 610, direct_url.json).
    """
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        record = json.loads(distribution("evoprune").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        record = {}
    url = urlsplit(record.get("url", ""))
    folder = url2pathname(url.path)
    if url.scheme == "file" and os.path.isdir(folder):
        return f"pip install '{folder}[{extra}]'"
    return f"in a checkout of evoprune: pip install '.[{extra}]'"


def generator_seed(seed: int) -> int:
    """Return a seed for torch's CPU generator, which uses only 32 bits. Larger seeds are replaced by their hash."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
    return seed if 0 <= seed < 2**32 else int.from_bytes(digest)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the differing entries of two dicts. Returns an empty string if the dicts are equal."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names)


def file_changes(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Describe the file changes between two states returned by `file_state`.

    Returns:
        The description, or an empty string if the states are equal or one of them is unknown.
    """
    if not before or not now or before == now:
        return ""
    first, second = ({name: value for name, value in state.items() if name != "digest"} for state in (before, now))
    return differences(first, second) or "some files have different sizes or modification times"


OPTION = "option"  # key of the `Option` in a field's metadata
# For each declared type, the required type of values, and its description in messages.
ACCEPTED: dict[type, tuple[type, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    str: (str, "a string"),
    bool: (bool, "True or False"),
    dict: (Mapping, "a dict"),
    PathLike: (PathLike, "a path"),
    Callable: (Callable, "a function"),
    NoneType: (NoneType, "None"),
}
# The integer range accepted by torch, for example for seeds.
MIN_INTEGER = -(2**63)
MAX_INTEGER = 2**64 - 1


def brief(value: Any) -> str:
    """Return a short description of a value for a message: its repr, or its class name if the repr is long."""
    try:
        text = repr(value)
    except Exception:  # a third-party `__repr__` may raise any exception
        text = ""
    if 0 < len(text) <= 60 and "\n" not in text:
        return text
    return f"of class {type(value).__name__}"


@dataclass(frozen=True)
class Option:
    """An option available both on the command line and as a keyword argument in Python."""

    help: str
    flags: tuple[str, ...] = ()  # command line flags; if empty, the flag is derived from the field name
    # The possible values, for help text and shell completion. If empty, they are derived from the type. Uppercase words, such as
    # FILE or N, are placeholders.
    words: tuple[str, ...] = ()
    metavar: str | None = None  # placeholder for the value in the help text
    least: int | None = None  # minimum value; `most` is the maximum
    most: int | None = None
    env: str | None = None  # environment variable that sets the option
    typed: Any = None  # type of the command line argument passed to `parse`; None means the field type
    unless_typed: Any = None  # default on the command line; None means the field default
    parse: Callable[[Any], Any] | None = None
    changes_answers: bool = True  # whether the option affects answers and must be recorded in outputs
    in_python: str | None = None  # help text for Python users; None means `help` with flags replaced by keyword names
    # An additional type accepted by Python functions, as source code because this file can't import the class.
    also: str | None = None


def option(
    default: Any,
    help: str,
    *flags: str,
    accept: Callable[[Any], Any] | None = None,
    convert: Callable[[Any], Any] | None = None,
    **more: Any,
) -> Any:
    """Return a dataclass field that declares an option. `more` contains additional `Option` fields.

    Args:
        accept, convert: Functions that convert the value before and after its type is checked; see `converted`.
    """
    metadata = {OPTION: Option(help, flags, **more)}
    if accept is not None:
        metadata[ACCEPT] = accept
    if convert is not None:
        metadata[CONVERT] = convert
    return field(default=default, metadata=metadata)


def from_keywords(given: Mapping[str, Any], *declared: type) -> list:
    """Create an instance of each dataclass in `declared` from keyword arguments named after the dataclass fields.

    Raises:
        TypeError: If a keyword doesn't match any dataclass field.
        UsageError: If a value is invalid.
    """
    known = [f.name for group in declared for f in fields(group)]
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
    return [group(**{f.name: given[f.name] for f in fields(group) if f.name in given}) for group in declared]


Kind = TypeVar("Kind", bound=type)
ACCEPT = "accept"  # key of a function in a field's metadata, which is applied before the type check; see `converted`
CONVERT = "convert"  # key of a function in a field's metadata, which is applied after the type check; see `converted`


def converted(kind: Kind) -> Kind:
    """Class decorator for a frozen dataclass that converts the arguments of the constructor before it sets the fields.

    Each argument is passed through the function `ACCEPT` in the field's metadata, if any. If the field declares an option, its type
    is then checked, and numpy numbers become Python numbers, because JSON and torch seeds require them. If all arguments are valid,
    each is passed through the function `CONVERT` in the field's metadata. Default values must be in their final form, and these
    functions must leave such values unchanged, because `dataclasses.replace` passes all fields through them again.
    """
    known = {each.name: each for each in fields(kind) if each.init}
    set_fields = kind.__init__

    @wraps(set_fields)
    def constructor(self: Any, *args: Any, **given: Any) -> None:
        if len(args) > len(known) or any(name not in known for name in given):
            set_fields(self, *args, **given)  # raises TypeError
        values = dict(zip(known, args, strict=False)) | given
        for name, value in values.items():
            metadata = known[name].metadata
            if ACCEPT in metadata:
                value = metadata[ACCEPT](value)
            if OPTION in metadata:
                value = check_type(name, value, known[name].type)
            values[name] = value
        for name, value in values.items():
            if convert := known[name].metadata.get(CONVERT):
                values[name] = convert(value)
        set_fields(self, **values)

    kind.__init__ = constructor
    return kind


def parts_of(declared: Any) -> Sequence[Any]:
    """Return the members of a union type. For any other type, return a list containing only that type."""
    return get_args(declared) if get_origin(declared) in (Union, UnionType) else [declared]


def kinds_of(declared: Any) -> list[type]:
    """Return the possible value classes of a declared type. For a `Literal` type, the class is `str`."""
    return [str if get_origin(part) is Literal else get_origin(part) or part for part in parts_of(declared)]


def words_of(declared: Any) -> tuple[str, ...]:
    """Return the values of the `Literal` types in a declared type."""
    return tuple(word for part in parts_of(declared) if get_origin(part) is Literal for word in get_args(part))


def check_type(name: str, value: Any, declared: Any) -> Any:
    """Check that a value has the declared type, and return it. Numpy numbers are converted to Python numbers.

    Types not listed in `ACCEPTED` are not checked.

    Raises:
        UsageError: If the value has a different type. The message lists the accepted types.
    """
    wanted = [ACCEPTED.get(kind) for kind in kinds_of(declared)]
    if None in wanted:
        return value
    described = zip(parts_of(declared), wanted, strict=True)
    words = [get_args(part) if get_origin(part) is Literal else [kind] for part, (_, kind) in described]
    right = listed([word for each in words for word in each], "or")
    if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in wanted):
        raise UsageError(f"{name} is {brief(value)}, not {right}", f"give {right}")
    if isinstance(value, Integral) and not MIN_INTEGER <= value <= MAX_INTEGER:
        raise UsageError(f"{name} is {brief(value)}, which does not fit into 64 bits", "give a smaller number")
    if isinstance(value, Real) and not isinstance(value, int | float):
        if isinstance(value, Integral):
            return int(value)
        return float(value)
    return value


def record_of(groups: Iterable[Any], always: Iterable[str]) -> dict[str, Any]:
    """Combine option dataclasses into the flat dict recorded in output files.

    The dict contains the options that affect answers and differ from their defaults, plus the options listed in `always`,
    regardless of their values. Don't add options from later versions to `always`; otherwise, outputs from earlier versions could no
    longer be resumed.
    """
    values = {}
    for group in groups:
        for f in fields(group):
            value = getattr(group, f.name)
            if f.name in always or (f.metadata[OPTION].changes_answers and value != f.default):
                values[f.name] = value
    return values


def switched_on(variable: str) -> bool:
    """Return whether an environment variable that means yes or no is set to yes. If it is unset or empty, it means no.

    Raises:
        UsageError: If the value is neither.
    """
    value = os.environ.get(variable, "").strip().lower()
    if value not in SWITCH:
        raise UsageError(f"{variable} is {os.environ[variable]!r}, neither yes nor no", f"{variable}=1 or {variable}=0")
    return SWITCH[value]


def overlapping(change: Callable[[], Iterator[None]]) -> Callable[[], AbstractContextManager[None]]:
    """Decorator for a generator function that changes process-wide state, yields, and restores the state.

    Returns a function like `contextlib.contextmanager`, but its blocks may overlap in several threads. The first block to begin
    changes the state, and the last block to end restores it. If each block restored the state that it had found, the state could
    remain changed.
    """
    manager = contextmanager(change)
    lock = threading.RLock()
    running = 0
    shared: AbstractContextManager[None]

    @contextmanager
    @wraps(change)
    def block() -> Iterator[None]:
        nonlocal running, shared
        with lock:
            if not running:
                shared = manager()
                shared.__enter__()
            running += 1
        try:
            yield
        finally:
            with lock:
                running -= 1
                if not running:
                    shared.__exit__(None, None, None)

    return block


def in_a_thread(function: Callable[[], T], name: str) -> T:
    """Run a function in a new daemon thread, wait for it, and return its result. Ctrl-C interrupts the wait.

    The function sees the caller's context variables. Its OpenMP workers exit together with the thread.
    """
    from concurrent.futures import Future

    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as problem:
            done.set_exception(problem)

    threading.Thread(target=copy_context().run, args=(run,), name=name, daemon=True).start()
    return done.result()


def check_question(question: Any) -> None:
    """Check that a question is a string and is not empty.

    Raises:
        UsageError: If the question is empty or not a string.
    """
    if isinstance(question, list | tuple) and all(isinstance(each, str) for each in question):
        hint = "ask one after another: video = qa.encode(path); [video.ask(question).text for question in questions]"
        raise UsageError(f"the question is {brief(question)}, not a string", hint)
    if isinstance(question, list | tuple) and all(isinstance(each, Mapping) for each in question):
        hint = "a conversation is a chat: qa.encode(path).chat(messages=earlier).ask(question)"
        raise UsageError(f"the question is {brief(question)}, not a string", hint)
    if not isinstance(question, str):
        raise UsageError(f"the question is {brief(question)}, not a string", 'for example "What happens?"')
    if not question.strip():
        raise UsageError("the question is empty", 'for example "What happens?"')


class Uncopied:
    """Base class for objects that can't be copied or pickled.

    These objects hold caches and locks, so they belong to a single process and model.
    """

    INSTEAD: ClassVar[str]  # hint for the error message: what to do instead of copying the object

    def __reduce_ex__(self, protocol: int):
        """Raise an exception with a hint, because the object can't be copied or pickled.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{type(self).__name__} objects cannot be pickled or copied: {self.INSTEAD}")

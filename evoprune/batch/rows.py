"""Rows, which are questions about videos and images.

Rows are read from a JSONL or CSV file or created by pairing each video with each question. This module does not import torch.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any, BinaryIO, ClassVar, Self
from urllib.parse import unquote

from evoprune.errors import LFS, LFS_HINT, EvopruneError, EvopruneWarning, UsageError
from evoprune.files import in_natural_order, read_all
from evoprune.language import GenerationOptions, Turn
from evoprune.untrusted import loads
from evoprune.util import (
    FILE_URL,
    cannot_read,
    check_type,
    counted,
    did_you_mean,
    from_cell,
    is_text,
    is_url,
    missing_hint,
    parse_time,
    shorten,
    shown,
    some,
    without_password,
)
from evoprune.video import Folder, SamplingOptions

LETTERED = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])\s*[.):])\s*(.*\S)\s*", re.IGNORECASE | re.DOTALL)
ALIASES = {
    "video_start": "start",
    "video_end": "end",
    "nframes": "frames",
}  # maps names from qwen-vl-utils to the corresponding fields
LONGEST_PATH = 4096  # characters
LIST_COLUMNS = ("inputs", "options", "groups")  # CSV columns whose cells contain lists, with entries separated by |
ENDINGS_HINT = f"names of videos and images end in {', '.join((*Folder.VIDEOS, *Folder.IMAGES))}"
# A line in an input file: the word "line", or "row" for a JSON array element; the one-based number; and the fields, or an error if
# they are invalid.
Line = tuple[str, int, dict[str, Any] | ValueError]


@dataclass(frozen=True)
class Setting:
    """How a row overrides an option of the batch. The `Row` field has the option's name; in files, it has no `_s` suffix.

    `read` converts a value from a file, given the value and the name of the field. It raises ValueError or UsageError.
    """

    options: type  # the dataclass with the option: `SamplingOptions` or `GenerationOptions`
    read: Callable[[Any, str], Any]
    applied: str | None = None  # the `Row` field with the option's value, if it isn't the same field
    recorded: bool = False  # whether records and IDs also contain the default value

    def field(self, default: Any = None) -> Any:
        """Return a dataclass field for `Row`."""
        return field(default=default, metadata={SETTING: self})


SETTING = "setting"


def _must(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _filled(value: Any, name: str) -> str:
    _must(value is not None, f"no {name}")
    _must(isinstance(value, str), f"{name} is not text")
    _must(value.strip(), f"{name} is empty")
    return value


def _file(value: Any, name: str) -> str:
    hint = "write it to a file and give its path"
    if _filled(value, name).startswith("data:"):
        raise UsageError(f"{name} is a data: URL, not a path", hint)
    if len(value) > LONGEST_PATH:
        raise UsageError(f"{name} has {len(value):,} characters, too many for a path", hint)
    return value


def _number(value: Any, name: str, kind: type[int] | type[float] = float) -> Any:
    """Convert the value of a numeric field, which is a string in a CSV file."""
    number = value
    if isinstance(value, str):
        for read in (float, kind):
            with suppress(ValueError):
                number = read(value)
    if kind is int and isinstance(number, float) and number.is_integer():  # spreadsheets may write 8 as 8.0
        number = int(number)
    right = isinstance(number, (int, kind))
    noun = "whole number" if kind is int else "number"
    _must(right, f"{name} is not a {noun}")
    return check_type(name, number, kind)


def _whole_number(value: Any, name: str) -> Any:
    return _number(value, name, int)


def _rate(value: Any, name: str) -> float:
    return float(_number(value, name))


def _seconds(value: Any, name: str) -> float:
    if isinstance(value, str):
        return parse_time(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _must(number and math.isfinite(check_type(name, value, float)), f"{name} is not a time in seconds")
    return float(value)


@dataclass(frozen=True)
class Row:
    """A question about one or more videos and images, optionally limited to a time span of the videos."""

    LETTERS: ClassVar[str] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # labels for a question's options

    id: str  # identifies the row in the results
    inputs: tuple[str, ...]  # the paths of the videos and images as specified by the user
    paths: tuple[str, ...]  # the same inputs as paths that can be opened
    question: str
    # Settings, which override options of the batch. None means the batch's value, except that every row has its own time span.
    start_s: float = Setting(SamplingOptions, _seconds, recorded=True).field(0.0)
    end_s: float | None = Setting(SamplingOptions, _seconds, recorded=True).field()
    fps: float | None = Setting(SamplingOptions, _number).field()
    frames: int | None = Setting(SamplingOptions, _whole_number).field()
    frame_rate: float | None = Setting(SamplingOptions, _rate).field()
    max_new_tokens: int | None = Setting(GenerationOptions, _whole_number).field()
    options: tuple[str, ...] = ()  # the possible answers; empty for an open-ended question
    scored: bool = False  # whether to choose the most probable option instead of asking for a letter
    # Subtitles as specified by the user; None means the batch's subtitles.
    subtitles: str | None = Setting(SamplingOptions, _file, applied="subtitles_path").field()
    subtitles_path: str | None = None  # the same subtitles as a path that can be opened
    earlier: tuple[Turn, ...] = ()  # the earlier turns, if the question continues a conversation
    # The expected answer. If there are `options`, it is one of them. A batch copies it to the output, and an evaluation compares
    # the model's answer with it.
    answer: Any = None
    type: str | None = None  # the row's category in an evaluation
    groups: tuple[str, ...] = ()  # additional categories
    # The original fields as (name, value) pairs, which are repeated in an output table.
    cells: tuple[tuple[str, str], ...] = field(default=(), compare=False, repr=False)

    @property
    def video(self) -> str:
        """The names of all inputs, separated by commas."""
        return ", ".join(self.inputs)

    @property
    def prompt(self) -> str:
        """The text for the model: the question followed by its lettered options, worded as in lmms-eval.

        If the options are scored by probability, they are not part of the prompt.
        """
        if not self.options or self.scored:
            return self.question
        lines = [f"{letter}. {option}" for letter, option in zip(Row.LETTERS, self.options, strict=False)]
        return "\n".join([self.question, *lines, "Answer with the option's letter from the given choices directly."])

    @property
    def asked(self) -> dict[str, Any]:
        """Fields that affect the model's answer, as JSON values. URLs have no passwords."""
        about = {"video": without_password(self.video)}
        if len(self.inputs) > 1:
            about = {"inputs": list(map(without_password, self.inputs))}
        facts = {"question": self.question, "options": list(self.options)}
        for name, (setting, default) in SETTINGS.items():
            value = getattr(self, name)
            if setting.recorded or value != default:
                facts[name] = value
        if self.earlier:
            facts["messages"] = Turn.to_messages(self.earlier)
        return about | facts

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingOptions` set by this row. They always include the time span."""
        return self._settings(SamplingOptions)

    def generation(self, usual: GenerationOptions) -> GenerationOptions:
        """Return a copy of the batch's options (`usual`), overridden with any values from this row."""
        own = self._settings(GenerationOptions)
        if self.scored:
            own["choices"] = self.options
        return replace(usual, **own)

    def _settings(self, options: type) -> dict[str, Any]:
        values = {
            name: getattr(self, setting.applied or name)
            for name, (setting, _) in SETTINGS.items()
            if setting.options is options
        }
        return {name: value for name, value in values.items() if value is not None or name in SamplingOptions.SPAN}

    def with_scored_options(self) -> Self:
        """Return a copy of the row in which the model chooses the most probable option.

        Raises:
            UsageError: If the row has no options or has duplicate options.
        """
        if not self.options:
            raise UsageError(f"row {shown(self.id)} has no options to choose from", "give each row a list of options")
        if len(set(self.options)) < len(self.options):
            texts = shown(", ".join(self.options))
            raise UsageError(f"row {shown(self.id)} has an option twice: {texts}", "give each option once")
        return replace(self, scored=True)


# Maps each `Row` field that overrides an option to its `Setting` and its default value.
SETTINGS = {
    each.name: (each.metadata[SETTING], each.default) for each in dataclass_fields(Row) if SETTING in each.metadata
}
NAMES = {name: name.removesuffix("_s") for name in SETTINGS}  # their names in files
# All fields in files. Only evaluations use `type` and `groups`, but batches accept files that contain them.
FIELDS = (
    "id", "video", "inputs", "question", *NAMES.values(), "options", "messages", "answer", "type", "groups",
)  # fmt: skip


@dataclass(frozen=True)
class Span:
    """One or more rows with the same inputs, time span, frames, and subtitles, so that their inputs are encoded only once."""

    rows: tuple[Row, ...]

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of `SamplingOptions` set by these rows."""
        return self.rows[0].sampling

    @classmethod
    def group(cls, rows: Iterable[Row]) -> list[Self]:
        """Group rows that can share an encoding. The groups are ordered by their first rows."""
        inputs: dict[tuple[str, ...], dict[tuple, list[Row]]] = {}
        for row in rows:
            encoding = tuple(row.sampling.items())
            inputs.setdefault(row.paths, {}).setdefault(encoding, []).append(row)
        return [cls(tuple(group)) for spans in inputs.values() for group in spans.values()]


@dataclass(frozen=True)
class RowReader:
    """Reads rows from a file, or creates them from videos and questions.

    Attributes:
        fields: The hint for errors in a row's fields.
        file: The hint for errors in the file.
        passes_on: Whether unknown fields are copied to the output.
        numbered: Whether rows without an ID use their line number as the ID. If False, the ID is a digest of the row's contents.
        complete: A function that takes a row and its fields and returns the completed row. It raises ValueError to reject the row.
        sampling: Options whose time span applies to rows that do not set their own.
    """

    # The optional fields, as listed in hints.
    MAY_HAVE: ClassVar[str] = ", ".join(["id", *(name for name in NAMES.values() if name != "subtitles"), "options"])

    fields: str = (
        "a row has question (or messages) and video (or inputs for several), and may have "
        f"{MAY_HAVE}, subtitles and answer"
    )
    file: str = "give a JSONL or CSV file of rows"
    passes_on: bool = False
    numbered: bool = False
    complete: Callable[[Row, dict[str, Any]], Row] = lambda row, fields: row
    sampling: SamplingOptions = field(default_factory=SamplingOptions)

    def load(self, path: str) -> list[Row]:
        """Read rows from a JSONL or CSV file. Paths in the file are relative to the file's folder.

        Raises:
            UsageError: If the file cannot be read. See `read` for other errors.
        """
        try:
            with open(path, "rb") as file:
                content = read_all(file, path, self.file)
        except OSError as problem:
            raise UsageError(cannot_read(path, problem), missing_hint(path, self.file)) from problem
        return self._parsed(content, path, os.path.dirname(path))

    def read(self, file: BinaryIO, name: str, folder: str = "") -> list[Row]:
        """Read rows from an open file. Paths in the file are relative to `folder`.

        Raises:
            UsageError: If there are no rows, a row is invalid, or two rows have the same ID. The message lists the first invalid
                rows and the number of remaining invalid rows.
        """
        return self._parsed(read_all(file, name, self.file), name, folder)

    def _parsed(self, content: bytes, name: str, folder: str) -> list[Row]:
        rows = _rows(_lines(content, name, self.fields), name, folder, self)
        if not rows:
            raise UsageError(f"{name} contains no rows", self.fields)
        return rows

    def pairs(
        self, videos: Sequence[str], questions: Sequence[str], recursive: bool = False, pictures: bool = False
    ) -> list[Row]:
        """Create a row for each combination of a video and a question.

        Args:
            videos: Paths of videos and folders. A folder of videos is replaced with the videos in it.
            questions: Questions to ask about each video.
            recursive: Whether to search subfolders as well.
            pictures: Whether to include images from a folder of videos. Images with the same name as a video are never included.

        Raises:
            UsageError: If any video, question, or time span is invalid. The message lists all problems.
        """
        problems = Problems()
        videos = list(in_folders(videos, problems, recursive, pictures))
        for noun, texts, check in (("video", videos, _file), ("question", questions, _text)):
            for text, times in Counter(texts).items():
                if times > 1:
                    problems.add(f"the {noun} {text!r} is given twice", f"give every {noun} once")
                with problems.noting(f"{shown(text)!r}: ", self.fields):
                    check(text, noun)
        with problems.noting("", self.fields):
            self.sampling.check_span()
        problems.check(dict.fromkeys(videos, ""))
        pairs = (("", 0, {"video": video, "question": question}) for video in videos for question in questions)
        return _rows(pairs, "", "", self)


def _rows(lines: Iterable[Line], name: str, folder: str, reader: RowReader) -> list[Row]:
    """Parse lines into rows.

    Args:
        name: The file name, or an empty string if there is no file.
        folder: The base folder for relative paths in the rows.

    Raises:
        UsageError: If any row is invalid.
    """
    problems = Problems()
    rows: dict[str, Row] = {}
    places: dict[str, str] = {}
    unused = Counter()
    for noun, number, fields in lines:
        place = f"{name}, {noun} {number}"
        with problems.noting(f"{place}: ", reader.fields):
            row = _row(number, fields, folder, reader)
            if row.id in rows:
                message = f"{place}: same id (or same question) as {places[row.id]}"
                problems.add(message, "give every row its own id")
            rows[row.id] = row
            places[row.id] = place
            unused.update(
                field for field, value in fields.items() if value is not None and field not in (*FIELDS, *ALIASES)
            )
    videos: dict[str, str] = {}
    for row in rows.values():
        place = f"{places[row.id]}: " if name else ""
        for path in row.paths:
            videos.setdefault(path, place)
    problems.check(videos, name)
    if unused:
        title = "unused fields"
        if reader.passes_on:
            title = "fields that are only copied to the output"
        warnings.warn(f"{name}: {title}: {_describe_fields(unused)}", EvopruneWarning, stacklevel=4)
    return list(rows.values())


def _describe_fields(unused: Counter) -> str:
    """List the unused fields with the number of rows that contain them, and suggest the correct name for likely typos."""
    texts = []
    for name, count in unused.items():
        text = f"{shorten(name, 40)} in {counted(count, 'row')}"
        if near := did_you_mean(name, (*FIELDS, *ALIASES)).strip():
            text += f" ({near})"
        texts.append(text)
    return some(texts)


def _row(number: int, fields: dict[str, Any] | ValueError, folder: str, reader: RowReader) -> Row:
    if isinstance(fields, ValueError):
        raise fields
    fields = {name: value for name, value in fields.items() if value is not None}
    cells = tuple((name, _cell(value)) for name, value in fields.items())
    cells = tuple((name, without_password(cell) if name in ("video", "inputs") else cell) for name, cell in cells)
    for theirs, own in ALIASES.items():
        _must(theirs not in fields or own not in fields, f"{own} and {theirs} cannot be combined")
    fields = {ALIASES.get(name, name): value for name, value in fields.items()}
    given = {NAMES[name]: getattr(reader.sampling, name) for name in SamplingOptions.SPAN} | fields
    own = {
        name: setting.read(given[NAMES[name]], NAMES[name])
        for name, (setting, _) in SETTINGS.items()
        if given.get(NAMES[name]) is not None
    }
    if "inputs" in fields:
        _must("video" not in fields, "video and inputs cannot be combined")
        _must(isinstance(fields["inputs"], list) and fields["inputs"], "inputs is not a list of paths")
        inputs = tuple(_file(path, "input") for path in fields["inputs"])
    else:
        inputs = (_file(fields.get("video"), "video"),)
    subtitles_path = own.get("subtitles")
    if subtitles_path not in (None, "none", "auto"):
        subtitles_path = _path(folder, subtitles_path)
    earlier, question = _turns_and_question(fields)
    row = Row(
        id="",
        inputs=inputs,
        paths=tuple(_path(folder, path) for path in inputs),
        question=question,
        earlier=earlier,
        options=_options(fields.get("options", [])),
        subtitles_path=subtitles_path,
        answer=fields.get("answer"),
        **own,
    )
    # The next two lines only validate values, raising an error if a value is out of range.
    row.generation(GenerationOptions())
    SamplingOptions(**row.sampling).check_span()
    row = reader.complete(row, fields)
    name = number
    if not reader.numbered:
        name = hashlib.sha256(json.dumps(row.asked, sort_keys=True).encode()).hexdigest()[:16]
    name = fields.get("id", name)
    right = isinstance(name, str | int) and not isinstance(name, bool) and name != ""
    _must(right, "id is neither text nor a whole number")
    return replace(row, id=str(name), cells=cells)


def _turns_and_question(fields: dict[str, Any]) -> tuple[tuple[Turn, ...], str]:
    """Return the earlier turns of a row's conversation and its question: the `question` field or the last message in `messages`."""
    if "messages" not in fields:
        return (), _text(fields.get("question"), "question")
    messages = fields["messages"]
    _must("question" not in fields, "question and messages cannot be combined")
    _must(isinstance(messages, list), "messages is not a list")
    _must(messages, "messages is empty")
    last = messages[-1]
    asks = isinstance(last, dict) and last.get("role") == "user" and {*last} == {"role", "content"}
    _must(asks, "the last message is not a question from the user")
    earlier = tuple(Turn.from_messages(messages[:-1]))
    for turn in earlier:
        _must(is_text(turn.question) and is_text(turn.answer), "a message is not valid text")
    return earlier, _text(last["content"], "the last message")


def _cell(value: Any) -> str:
    """Format a value for a table cell: strings unchanged, lists of strings separated by |, and all other values as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) and "|" not in each for each in value):
        return "|".join(value)
    return json.dumps(value, ensure_ascii=False)


def _path(folder: str, text: str) -> str:
    """Resolve a path from a row relative to `folder`, so that it can be opened. Supports ~, file: URLs, and web URLs.

    Raises:
        ValueError: If the path is not a valid file name.
    """
    if is_url(text):
        return text
    file = os.path.expanduser(text)
    if text.startswith(FILE_URL):
        file = unquote(text.removeprefix(FILE_URL))
    path = os.path.join(folder, file)
    try:
        possible = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # the name contains a lone surrogate
        possible = False
    _must(possible, f"no file can have the name {shown(text)!r}")
    return path


def _options(options: Any) -> tuple[str, ...]:
    """Validate a question's options and remove any leading letters, because the prompt adds its own letters."""
    right = isinstance(options, list) and len(options) != 1 and len(options) <= len(Row.LETTERS)
    _must(right, f"options is not a list of 2 to {len(Row.LETTERS)} texts")
    options = tuple(_text(option, "option") for option in options)
    lettered = [LETTERED.fullmatch(option) for option in options]
    if not options or not all(lettered):
        return options
    letters = "".join(match[1] or match[2] for match in lettered).upper()
    in_order = Row.LETTERS[: len(options)]
    mixed = letters != in_order and sorted(letters) == list(in_order)
    _must(not mixed, f"the options have the letters {', '.join(letters)}, out of order")
    if letters != in_order:
        return options
    return tuple(match[3] for match in lettered)


def _text(value: Any, name: str) -> str:
    _must(is_text(_filled(value, name)), f"{name} is not valid text")
    return value


class Problems:
    """Collects problems with a batch's videos and rows, so that a single error can report all of them with hints."""

    def __init__(self):
        self._found: list[tuple[str, str]] = []

    def add(self, message: str, hint: str) -> None:
        self._found.append((message, hint))

    @contextmanager
    def noting(self, place: str, hint: str) -> Iterator[None]:
        """Collect an error raised in a `with` block instead of letting it propagate.

        Args:
            place: Prefix for the error message, such as the file and line.
            hint: The hint to use if the error has no hint of its own.
        """
        try:
            yield
        except (ValueError, EvopruneError) as problem:
            self.add(f"{place}{getattr(problem, 'message', problem)}", getattr(problem, "hint", None) or hint)

    def check(self, videos: Mapping[str, str], name: str = "") -> None:
        """Raise an error if any problems have been collected.

        Args:
            videos: A mapping from input paths to their locations in the file. Missing input files are added to the error.
            name: The name of the file that contains the rows, which is mentioned only once in the message.

        Raises:
            UsageError: If a problem has been collected. The message lists all problems and all missing files.
        """
        if not self._found:
            return
        for path, place in videos.items():
            if not is_url(path) and not os.path.exists(path):
                usual = "paths in a file of rows are relative to that file" if name else "check the path"
                self.add(f"{place}no such file: {shown(path)}", missing_hint(path, usual))
        first, *others = (message for message, _ in self._found)
        messages = [first, *(message.removeprefix(f"{name}, ") for message in others)]
        raise UsageError(some(messages, "; "), some(list(dict.fromkeys(hint for _, hint in self._found)), "; "))


def folders_below(folder: str) -> Iterator[str]:
    """Yield a folder and all of its subfolders in natural order, except hidden folders and symbolic links."""
    yield folder
    try:
        with os.scandir(folder) as entries:
            inside = [e.name for e in entries if e.name[0] != "." and e.is_dir(follow_symlinks=False)]
    except OSError:  # `in_folders` reports the error
        return
    for name in in_natural_order(inside):
        yield from folders_below(os.path.join(folder, name))


def in_folder(folder: str, pictures: bool = False) -> list[str]:
    """Return the videos in a folder, plus the images if `pictures` is True, in natural order of their names.

    An image with the same name as a video is skipped, because it is probably a thumbnail. HEIC and AVIF files are not skipped,
    because in a Live Photo, they are the actual photo. In this case, the video next to the photo is a separate input.

    Raises:
        OSError: If the folder cannot be read.
    """
    inside = Folder(folder)
    videos = inside.videos
    if not pictures:
        return videos
    stems = {os.path.splitext(path)[0] for path in videos}
    thumbnails = {path for path in inside.images if os.path.splitext(path)[0] in stems}
    return [path for path in inside.files if path not in thumbnails]


def in_folders(
    videos: Iterable[str], problems: Problems, recursive: bool = False, pictures: bool = False
) -> Iterator[str]:
    """Yield the given videos, replacing folders of videos with the files in them, in natural order.

    A folder of images is treated as a single video. If a folder contains more videos than images, its images are skipped unless
    `pictures` is True (see `in_folder`).

    Args:
        videos: The paths of videos and of folders.
        problems: Collects an error for each folder that is neither clearly a folder of videos nor clearly a folder of images.
        recursive: Whether to search subfolders as well. Subfolders without videos or images are skipped.
    """
    for video in videos:
        if not Folder.is_at(video):
            yield video
            continue
        if recursive:
            below = [folder for folder in folders_below(video) if has_inputs(folder, pictures)]
            if not below:
                problems.add(f"no videos or images in the folder {video} and its subfolders", ENDINGS_HINT)
            yield from in_folders(below, problems, pictures=pictures)
            continue
        try:
            inside = Folder(video)
        except OSError as problem:
            hint = "check the path and its permissions"
            problems.add(f"cannot read the folder {video}: {problem.strerror}", hint)
            continue
        images = inside.images
        video_files = inside.videos
        is_video = images and not video_files
        only_photos = pictures and inside.files and not images
        if len(video_files) > len(images) or is_video or only_photos:
            yield from [video] if is_video else in_folder(video, pictures)
        elif images:
            pattern = os.path.join(video, "*" + os.path.splitext(video_files[0])[1])
            hint = f"name the videos ({pattern}), or move the images to a folder of their own"
            problems.add(
                f"the folder {video} contains {counted(len(images), 'image')} and {counted(len(video_files), 'video')}",
                hint,
            )
        else:
            hint = f"-r also searches subfolders; {ENDINGS_HINT}" if pictures else ENDINGS_HINT  # `find` has no -r
            problems.add(f"no videos or images in the folder {video}", hint)


def has_inputs(folder: str, pictures: bool) -> bool:
    """Return True if a folder directly contains videos or images.

    Also returns True if the folder is not readable, so that the error is reported later. For `pictures`, see `in_folder`.
    """
    try:
        inside = Folder(folder)
        return bool(inside.files if pictures else inside.videos or inside.images)
    except OSError:
        return True


def left_out(video: str, pictures: bool = False, hint: str = " (-r)") -> str:
    """Describe, in one line, the folder entries that are not used as inputs. Returns an empty string if there aren't any.

    Hidden files are not mentioned. In a folder of images, only subfolders are mentioned.

    Args:
        video: The folder path. For non-folder paths, the result is an empty string.
        pictures: Whether images in a folder of videos are used. See `RowReader.pairs`.
        hint: Text that explains how to search the subfolders of a folder of images.
    """
    if not Folder.is_at(video):
        return ""
    inside = Folder(video)
    videos = inside.videos
    images = inside.images
    taken = in_folder(video, pictures)
    with os.scandir(video) as entries:
        others = [entry for entry in entries if entry.name[0] != "." and entry.path not in taken]
        names = in_natural_order(entry.name + "/" * entry.is_dir() for entry in others)
    if len(videos) <= len(images):
        if not images or not any(name.endswith("/") for name in names):
            return ""
        return f"{video}: {counted(len(images), 'image')} as one video; subfolders are not searched{hint}"
    if not names:
        return ""
    counts = {"video": len(videos), "image": len(taken) - len(videos)}
    counts_text = " and ".join(counted(count, noun) for noun, count in counts.items() if count)
    return f"{video}: {counts_text}; skipped: {some(list(map(shown, names)))}"


def _lines(content: bytes, name: str, hint: str) -> Iterator[Line]:
    """Yield the non-empty lines of a JSON Lines, JSON array, or CSV file. The first character determines the format.

    In a CSV file, empty cells are treated as missing, and the case of column names does not matter.

    Raises:
        UsageError: If the contents are not UTF-8, an array is not valid JSON, or a CSV header lacks a required column.
    """
    if content.startswith(LFS):
        raise UsageError(f"{name} is a git-lfs pointer", LFS_HINT)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{name} is not UTF-8", "give a JSONL or CSV file, saved as UTF-8") from problem
    first = text.lstrip()[:1]
    if first not in ("[", "{", ""):
        yield from _csv_lines(text, name, hint)
    elif first == "[":
        try:
            rows = loads(text, once=True)
        except ValueError as problem:
            raise UsageError(f"{name} is not JSON: {problem}", hint) from problem
        for number, fields in enumerate(rows, 1):
            yield "row", number, _object(fields)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield "line", number, _object_of(line)


def _object_of(line: str) -> dict[str, Any] | ValueError:
    """Parse a line as a JSON object. If parsing fails, the error is returned instead of raised so that it can be reported later."""
    try:
        return _object(loads(line, once=True))
    except json.JSONDecodeError as problem:
        return ValueError(f"not JSON: {problem}")
    except ValueError as problem:
        return problem


def _object(fields: Any) -> dict[str, Any] | ValueError:
    return fields if isinstance(fields, dict) else ValueError("not a JSON object")


def _csv_lines(text: str, file: str, hint: str) -> Iterator[Line]:
    table = text.lstrip("\r\n")
    before = text[: len(text) - len(table)].count("\n")  # number of empty lines before the header
    head = table.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(table, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        names = reader.fieldnames = [from_cell(name.strip()).lower() for name in reader.fieldnames or ()]
        if twice := [name for name, count in Counter(names).items() if name and count > 1]:
            hint = "rename or remove one of them; upper and lower case are the same"
            raise UsageError(f"{file}: the first line names the column {shorten(twice[0], 40)} twice", hint)
        if "messages" in names and "question" not in names:
            raise UsageError(f"{file}: a table cannot contain messages", "write the rows as JSON lines")
        # The header must contain at least one name from each tuple.
        for required in (("video", "inputs"), ("question",)):
            if not set(required) & set(names):
                needed = f"the first line must name the columns, unless the lines are JSON; `{required[0]}` is missing"
                raise UsageError(f"{file}: {needed} (found: {shorten(', '.join(names), 80)})", hint)
        for row in reader:
            cells = {name: from_cell(cell) if isinstance(cell, str) else cell for name, cell in row.items() if cell}
            for name in LIST_COLUMNS:
                if name in cells:
                    cells[name] = [entry.strip() for entry in cells[name].split("|")]
            if None in row:
                cells = ValueError("more cells than the header")
            yield "line", before + reader.line_num, cells
    except csv.Error as problem:
        # `line_num` counts only completely read lines.
        yield "line", before + reader.line_num + 1, ValueError(str(problem))

"""Reads the messages of a conversation, supporting the video and image formats of various client programs."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from evoprune.language import Placed
from evoprune_serve.errors import refused
from evoprune_serve.fields import NUMBER, Fields, json_text
from evoprune_serve.sources import Address, FrameList, Source, Uploaded

MOST_MESSAGES = 1000
MOST_PARTS = 1000  # maximum number of parts in all messages combined
MOST_CHARACTERS = 2**22  # maximum text length in all messages combined
MOST_SOURCES = 64
MOST_FRAMES = 256  # maximum length of a list of frames
FORMAT = re.compile(r"[\w.+-]{1,60}")
# Fields that clients may send back as part of earlier answers. They aren't part of the conversation and must be empty, except for
# the fields in `UNREAD`, which are ignored.
UNREAD = ("reasoning_content", "parsed")
OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls", *UNREAD)
# Types of text message parts, each with additional fields to ignore.
TEXTS = {"text": (), "input_text": (), "output_text": ("annotations", "logprobs")}


def read_messages(messages: Mapping[str, Any], field: str) -> tuple[str | None, list[dict[str, str]], list[Source]]:
    """Read the messages of a request.

    If any message has text both before and after a video or image, all turns contain `Placed` text, which records the input
    positions. Otherwise, the inputs come before the text.

    Args:
        messages: The messages, keyed by their location in the request body, such as "messages[0]".
        field: The name of the request body field that contains the messages.

    Returns:
        The system prompt or None; the turns, the last of which is the question; and all videos and images, in order.

    Raises:
        ApiError: If the messages aren't a valid conversation, or contain no videos or images.
    """
    if len(messages) > MOST_MESSAGES:
        raise refused(f"there are more than {MOST_MESSAGES} messages", field)
    system: list[str] = []
    said: list[dict[str, str]] = []
    contents: list[Sequence[str | None]] = []  # each message's parts in `said`, in order
    sources: list[Source] = []
    parts = 0
    characters = 0
    for place, message in messages.items():
        fields = Fields(message, place)
        role = fields.need("role", str)
        if role == "assistant":
            for name in OF_ANSWERS:
                if fields.take(name, object) not in (None, [], {}) and name not in UNREAD:
                    fields.refuse(name, "is not supported here")
        # An answer may have no content, for example if it was truncated during reasoning.
        content = (
            fields.take("content", (str, list), "") if role == "assistant" else fields.need("content", (str, list))
        )
        fields.end()
        if isinstance(content, list):
            parts += len(content)
        if parts > MOST_PARTS:
            raise refused(f"the messages have more than {MOST_PARTS} parts", field)
        pieces, shown = _content(content, f"{place}.content")
        text = Placed(pieces)
        characters += len(text)
        if characters > MOST_CHARACTERS:
            raise refused(f"the messages have more than {MOST_CHARACTERS:,} characters of text", field)
        if role in ("system", "developer"):
            if said or shown:
                raise refused(f"{place} is a system prompt: it is text, before all other messages", place)
            system.append(str(text))
            continue
        due = ("user", "assistant")[len(said) % 2]
        if role != due:
            raise refused(f"{place}.role is {json_text(role)}, not {json_text(due)}: these alternate", f"{place}.role")
        if shown and role == "assistant":
            raise refused(f"{place} is an answer, which has no videos or images", place)
        if role == "user" and not text.strip():
            raise refused(f"{place} contains no question: it has no text", place)
        said.append({"role": role, "content": str(text)})
        contents.append(pieces)
        sources += shown
    if not said:
        raise refused(f"{field} is empty", field)
    if len(said) % 2 == 0:
        raise refused("the last message is not from the user", field)
    if not sources:
        raise refused("the messages have no video or image to ask about", field)
    if len(sources) > MOST_SOURCES:
        raise refused(f"the messages have more than {MOST_SOURCES} videos and images", field)
    if any(part is not None for parts in contents for part in parts[:-1]):
        said = [each | {"content": Placed(parts)} for each, parts in zip(said, contents, strict=True)]
    return "\n".join(system) if system else None, said, sources


def _content(content: str | list, place: str) -> tuple[list[str | None], list[Source]]:
    """Return a message's text parts, with None for each video or image, and a list of the videos and images.

    Consecutive text parts are joined with a newline. A single text part is moved to the end, after the videos and images.
    """
    if isinstance(content, str):
        return [content], []
    parts: list[str | None] = []
    texts = 0
    sources = []
    for number, part in enumerate(content):
        fields = Fields(part, f"{place}[{number}]")
        kind = fields.need("type", str)
        if kind in TEXTS:
            text = fields.need("text", str)
            if texts and parts[-1] is not None:
                parts[-1] += f"\n{text}"
            else:
                parts.append(text)
            texts += 1
            for name in TEXTS[kind]:
                fields.take(name, object)
        elif kind in SHOWN:
            sources.append(SHOWN[kind](fields))
            parts.append(None)
        else:
            fields.refuse("type", f"is {json_text(kind)}; known: {', '.join([*TEXTS, *SHOWN])}")
        fields.end()
    if texts == 1:
        parts.sort(key=lambda part: part is not None)
    return parts, sources


# Readers for video and image message parts, whose types vary between client programs.


def _image_url(fields: Fields) -> Source:
    return _address(fields, "image_url")


def _input_image(fields: Fields) -> Source:
    if fields.has("file_id"):
        return Uploaded(_without_detail(fields).need("file_id", str))
    return _address(fields, "image_url")


def _video_url(fields: Fields) -> Source:
    return _address(fields, "video_url")


def _input_video(fields: Fields) -> Source:
    if fields.has("file_id"):
        return Uploaded(fields.need("file_id", str))
    if not fields.has("input_video"):
        return _address(fields, "video_url")
    inner = Fields(fields.need("input_video", dict), fields.name_of("input_video"))
    data = inner.need("data", str)
    container = inner.take("format", str, "mp4")
    if not FORMAT.fullmatch(container):
        inner.refuse("format", "is not the name of a format, such as mp4")
    inner.end()
    if data[:5].lower() == "data:":
        return Address(data)
    return Address(f"data:video/{container};base64,{data}")


def _file(fields: Fields) -> Source:
    return _file_of(Fields(fields.need("file", dict), fields.name_of("file")))


def _file_of(fields: Fields) -> Source:
    """Return the source specified by an object, either through a file ID, a URL, or inline file data."""
    _without_detail(fields).take("filename", str)
    if fields.has("file_id"):
        source = Uploaded(fields.need("file_id", str))
    elif fields.has("file_url"):
        source = Address(fields.need("file_url", str))
    else:
        source = Address(fields.need("file_data", str))
    fields.end()
    return source


def _video(fields: Fields) -> Source:
    """Return a video given as a URL, or as a list of frames with a frame rate or timestamps."""
    given = fields.need("video", (str, list))
    if isinstance(given, str):
        return Address(given)
    if not 0 < len(given) <= MOST_FRAMES:
        fields.refuse("video", f"has {len(given)} frames: 1 to {MOST_FRAMES} are read")
    frames = []
    for number, frame in enumerate(given):
        if isinstance(frame, str):
            frames.append(Address(frame))
        else:
            frames.append(_file_of(Fields(frame, f"{fields.name_of('video')}[{number}]")))
    rate = fields.take("fps", NUMBER)
    times_s = _times(fields, len(frames))
    if (rate is None) == (times_s is None):
        fields.refuse("video", "is a list of frames, which has either fps or times_s")
    if rate is not None and not 0 < rate <= sys.float_info.max:
        fields.refuse("fps", "is not above 0")
    return FrameList(tuple(frames), rate, times_s)


def _times(fields: Fields, count: int) -> tuple[float, ...] | None:
    times = fields.take("times_s", list)
    if times is None:
        return None
    if len(times) != count or not all(map(_is_time, times)):
        fields.refuse("times_s", "is not a number for each frame")
    if not _ascend(times):
        fields.refuse("times_s", "does not ascend")
    return tuple(map(float, times))


def _is_time(value: Any) -> bool:
    """Return True if a value is a number that can be converted to a finite float."""
    return isinstance(value, NUMBER) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _ascend(times: Sequence[float]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def _address(fields: Fields, name: str) -> Address:
    """Return the URL from a request field, which is either a string or an object with a `url` field."""
    given = _without_detail(fields).need(name, (str, dict))
    if isinstance(given, str):
        return Address(given)
    inner = Fields(given, fields.name_of(name))
    url = _without_detail(inner).need("url", str)
    inner.end()
    return Address(url)


def _without_detail(fields: Fields) -> Fields:
    """Take the `detail` field and return `fields`. The field has no effect because images are always read in full detail.

    Raises:
        ApiError: If another level of detail is requested.
    """
    detail = fields.take("detail", str, "auto")
    if detail not in ("auto", "high", "original"):
        fields.refuse(
            "detail", f"is {json_text(detail)}: images are read in full detail; limit them with the server's options"
        )
    return fields


SHOWN: dict[str, Callable[[Fields], Source]] = {
    "image_url": _image_url,
    "input_image": _input_image,
    "video_url": _video_url,
    "input_video": _input_video,
    "video": _video,
    "file": _file,
    "input_file": _file_of,
}

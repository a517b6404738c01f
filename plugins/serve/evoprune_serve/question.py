"""The body of /v1/chat/completions as a question. What is not known is refused by name: an option that is ignored misleads."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from evoprune.errors import UsageError
from evoprune.methods.registry import parse_names
from evoprune.session.options import GenerationOptions, PipelineOptions, PruneOptions, SamplingOptions
from evoprune.util import brief
from evoprune.video.plan import parse_time
from evoprune_serve.errors import ApiError, refused
from evoprune_serve.sources import Address, FrameList, Source, Uploaded

MOST_MESSAGES = 1000
MOST_PARTS = 1000  # of all messages
MOST_SOURCES = 64
MOST_FRAMES = 256  # of a list
MOST_STOPS = 16
JSON_OBJECT = {"type": "object"}
NUMBER = (int, float)
T = TypeVar("T")
SETTING = re.compile(r"true|false|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)  # of a method
KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", dict: "an object", list: "a list"}
# Options that change nothing at these values, and are refused at others.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "frequency_penalty": lambda value: value == 0,
    "presence_penalty": lambda value: value == 0,
    "logit_bias": lambda value: value == {},
    "store": lambda value: value is False,
    "tools": lambda value: value == [],
    "functions": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "modalities": lambda value: value == ["text"],
    "service_tier": lambda value: value in ("auto", "default"),
    "reasoning_effort": lambda value: value == "none",
    "verbosity": lambda value: value == "medium",
    "user": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
    "prompt_cache_key": lambda value: isinstance(value, str),
    "metadata": lambda value: isinstance(value, dict),
}
# What clients send back of an earlier answer, and what is not part of the conversation.
OF_ANSWERS = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")


@dataclass(frozen=True)
class Question:
    """What is asked, apart from the videos and pictures that it is about."""

    text: str
    earlier: tuple[dict[str, str], ...]  # messages before it, of the user and the assistant in turn
    generation: GenerationOptions  # its `system` is the system prompt
    seed: int | None
    sampling: SamplingOptions
    pruning: PruneOptions
    stream: bool
    usage: bool  # whether a stream tells its usage at the end


class Fields:
    """The fields of an object, to be taken one by one; what is left in the end is refused. One that is null is not there."""

    def __init__(self, value: Any, place: str = ""):
        if not isinstance(value, dict):
            raise refused(f"{place or 'the body'} is {brief(value)}, not an object", place or None)
        self._place = place
        self._left = {name: each for name, each in value.items() if each is not None}

    def name_of(self, field: str) -> str:
        return f"{self._place}.{field}" if self._place else field

    def take(self, field: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field. Raises ApiError: it is of another type."""
        if field not in self._left:
            return default
        value = self._left.pop(field)
        wanted = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, wanted) or (isinstance(value, bool) and not {bool, object} & {*wanted}):
            words = " or ".join(KINDS[kind] for kind in wanted)
            raise refused(f"{self.name_of(field)} is {brief(value)}, not {words}", self.name_of(field), "invalid_type")
        return value

    def need(self, field: str, kinds: type | tuple[type, ...]) -> Any:
        """Return a field. Raises ApiError: it is missing, or of another type."""
        if field not in self._left:
            raise refused(f"{self.name_of(field)} is missing", self.name_of(field), "missing_required_parameter")
        return self.take(field, kinds)

    def has(self, field: str) -> bool:
        return field in self._left

    def refuse(self, field: str, why: str) -> NoReturn:
        raise refused(f"{self.name_of(field)} {why}", self.name_of(field), "unsupported_value")

    def end(self) -> None:
        """Raises ApiError: a field is left."""
        for field in self._left:
            name = self.name_of(field[:60])
            raise refused(f"{name} is not supported here", name, "unsupported_parameter")


def read_question(body: Any, usual: PipelineOptions, model: str) -> tuple[Question, tuple[Source, ...]]:
    """Return the question of a body, and the videos and pictures that it is about.

    Args:
        usual: what holds where the body says nothing.
        model: the name of the model that is served.

    Raises ApiError: anything in it that is unknown, of another type, or out of range.
    """
    fields = Fields(body)
    asked = fields.take("model", str, model)
    if asked != model:
        raise ApiError(404, f"there is no model {asked[:100]!r}, but {model!r}", param="model", code="model_not_found")
    system, turns, sources = _conversation(fields.need("messages", list))
    stream = fields.take("stream", bool, False)
    usage = _stream_options(fields, stream)
    seed = fields.take("seed", int)
    try:
        generation = _changed(usual.generation, _generation(fields, system))
        sampling = _changed(usual.sampling, _sampling(fields))
        pruning = _changed(usual.pruning, _pruning(fields))
    except UsageError as problem:
        raise refused(f"{problem.message} ({problem.hint})") from problem
    for name, neutral in NEUTRAL.items():
        value = fields.take(name, object)
        if value is not None and not neutral(value):
            fields.refuse(name, f"is {brief(value)}, which is not supported here")
    fields.end()
    *earlier, last = turns
    question = Question(last["content"], tuple(earlier), generation, seed, sampling, pruning, stream, usage)
    return question, tuple(sources)


def _changed(options: T, given: dict[str, Any]) -> T:
    """Return options with other values; themselves where there are none, since checking them takes milliseconds."""
    return replace(options, **given) if given else options


def _stream_options(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options", dict)
    if given is None:
        return False
    if not stream:
        fields.refuse("stream_options", "is of streams alone")
    inner = Fields(given, "stream_options")
    usage = inner.take("include_usage", bool, False)
    inner.take("include_obfuscation", bool)  # nothing is padded, which hides no lengths: a choice of the client
    inner.end()
    return usage


def _generation(fields: Fields, system: str | None) -> dict[str, Any]:
    """Return what a request says of `GenerationOptions`."""
    given = {}
    if system is not None:
        given["system"] = system
    tokens = [name for name in ("max_tokens", "max_completion_tokens") if fields.has(name)]
    if len(tokens) == 2:
        fields.refuse("max_tokens", "and max_completion_tokens exclude each other")
    for name in tokens:
        given["max_new_tokens"] = fields.take(name, int)
    numbers = {"temperature": NUMBER, "top_p": NUMBER, "top_k": int, "repetition_penalty": NUMBER}
    for name, kinds in numbers.items():
        if fields.has(name):
            given[name] = fields.take(name, kinds)
    if fields.has("stop"):
        stop = fields.take("stop", (str, list))
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            fields.refuse("stop", f"has more than {MOST_STOPS} texts")
        given["stop"] = stop
    think = fields.take("think", (bool, str))
    if think is not None:
        given["think"] = {True: "on", False: "off"}.get(think, think)
    top = fields.take("top_logprobs", int)
    if fields.take("logprobs", bool, False):
        given["logprobs"] = top or 0
    elif top:
        fields.refuse("top_logprobs", "needs logprobs")
    if fields.has("response_format"):
        given["schema"] = _schema(Fields(fields.take("response_format", dict), "response_format"))
    return given


def _schema(fields: Fields) -> dict[str, Any] | None:
    kind = fields.need("type", str)
    schema = None
    if kind == "json_object":
        schema = JSON_OBJECT
    elif kind == "json_schema":
        inner = Fields(fields.need("json_schema", dict), "response_format.json_schema")
        for name in ("name", "description"):
            inner.take(name, str)
        inner.take("strict", bool)  # an answer always follows its schema
        schema = inner.need("schema", dict)
        inner.end()
    elif kind != "text":
        fields.refuse("type", f"is {brief(kind)}: text, json_object and json_schema are known")
    fields.end()
    return schema


def _sampling(fields: Fields) -> dict[str, Any]:
    given = {}
    if fields.has("fps"):
        given |= {"fps": fields.take("fps", NUMBER), "frames": None}
    if fields.has("frames"):
        given |= {"frames": fields.take("frames", int), "fps": given.get("fps")}
    if fields.has("seek"):
        given["seek"] = fields.take("seek", str)
    for name in ("start", "end"):
        if fields.has(name):
            value = fields.take(name, (int, float, str))
            given[f"{name}_s"] = parse_time(value) if isinstance(value, str) else value
    return given


def _pruning(fields: Fields) -> dict[str, Any]:
    given = {}
    if fields.has("budget"):
        given["budget"] = fields.take("budget", (int, float, str))
    if fields.has("method"):
        method = fields.take("method", str)
        for name, value in (setting for each in parse_names(method) for setting in each.settings):
            if value is not None and not SETTING.fullmatch(value):  # it may name a file of this machine
                fields.refuse("method", f"sets {name[:60]}: requests set numbers, true and false alone")
        given |= {"method": method, "method_args": None}
    return given


def _conversation(messages: list) -> tuple[str | None, list[dict[str, str]], list[Source]]:
    """Return the system prompt, what was said, the question last, and all videos and pictures in their order."""
    if len(messages) > MOST_MESSAGES:
        raise refused(f"there are more than {MOST_MESSAGES} messages", "messages")
    system: list[str] = []
    said: list[dict[str, str]] = []
    sources: list[Source] = []
    parts = 0
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        fields = Fields(message, place)
        role = fields.need("role", str)
        if role == "assistant":
            for name in OF_ANSWERS:
                if fields.take(name, object) not in (None, [], {}) and name != "reasoning_content":
                    fields.refuse(name, "is not supported here")
        content = fields.need("content", (str, list))
        fields.end()
        if isinstance(content, list):
            parts += len(content)
        if parts > MOST_PARTS:
            raise refused(f"the messages have more than {MOST_PARTS} parts", "messages")
        text, shown = _content(content, f"{place}.content")
        if role in ("system", "developer"):
            if said or shown:
                raise refused(f"{place} is a system prompt: it is text, before all other messages", place)
            system.append(text)
            continue
        due = ("user", "assistant")[len(said) % 2]
        if role != due:
            raise refused(f"{place}.role is {brief(role)}, not {due!r}: these alternate", f"{place}.role")
        if shown and role == "assistant":
            raise refused(f"{place} is an answer, which has no videos or pictures", place)
        if role == "user" and not text.strip():
            raise refused(f"{place} asks nothing: it has no text", place)
        said.append({"role": role, "content": text})
        sources += shown
    if len(said) % 2 == 0:
        raise refused("the last message is not one of the user", "messages")
    if not sources:
        raise refused("the messages have no video or picture to ask about", "messages")
    if len(sources) > MOST_SOURCES:
        raise refused(f"the messages have more than {MOST_SOURCES} videos and pictures", "messages")
    return "\n".join(system) if system else None, said, sources


def _content(content: str | list, place: str) -> tuple[str, list[Source]]:
    """Return the text of a message, of several parts in lines, and its videos and pictures."""
    if isinstance(content, str):
        return content, []
    texts = []
    sources = []
    for number, part in enumerate(content):
        fields = Fields(part, f"{place}[{number}]")
        kind = fields.need("type", str)
        if kind in ("text", "input_text"):
            texts.append(fields.need("text", str))
        elif kind in SHOWN:
            sources.append(SHOWN[kind](fields))
        else:
            fields.refuse("type", f"is {brief(kind)}; known: text, input_text, {', '.join(SHOWN)}")
        fields.end()
    return "\n".join(texts), sources


# The parts of a message that show something, by type: each program has names of its own for them.


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
    inner.end()
    return Address(f"data:video/{container};base64,{data}")


def _file(fields: Fields) -> Source:
    return _file_of(Fields(fields.need("file", dict), fields.name_of("file")))


def _file_of(fields: Fields) -> Source:
    """Return the file that an object names, or holds."""
    fields.take("filename", str)
    if fields.has("file_id"):
        source = Uploaded(fields.need("file_id", str))
    else:
        source = Address(fields.need("file_data", str))
    fields.end()
    return source


def _video(fields: Fields) -> Source:
    """Return one video by its address, or as a list of pictures with a rate or times."""
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
    if rate is not None and not 0 < rate < math.inf:
        fields.refuse("fps", "is not above 0")
    return FrameList(tuple(frames), rate, times_s)


def _times(fields: Fields, count: int) -> tuple[float, ...] | None:
    times = fields.take("times_s", list)
    if times is None:
        return None
    if len(times) != count or not all(isinstance(time, NUMBER) and not isinstance(time, bool) for time in times):
        fields.refuse("times_s", "is not a number for each frame")
    if not _ascend(times):
        fields.refuse("times_s", "does not ascend")
    return tuple(map(float, times))


def _ascend(times: Sequence[float]) -> bool:
    return all(earlier < later for earlier, later in pairwise(times))


def _address(fields: Fields, name: str) -> Address:
    """Return the address in a field, which is a text, or an object with the field `url`."""
    given = _without_detail(fields).need(name, (str, dict))
    if isinstance(given, str):
        return Address(given)
    inner = Fields(given, fields.name_of(name))
    url = _without_detail(inner).need("url", str)
    inner.end()
    return Address(url)


def _without_detail(fields: Fields) -> Fields:
    """Take the field `detail`: pictures are always read in detail."""
    detail = fields.take("detail", str, "auto")
    if detail not in ("auto", "high", "original"):
        fields.refuse(
            "detail", f"is {brief(detail)}: pictures are read as they are; limit them by the options of the server"
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

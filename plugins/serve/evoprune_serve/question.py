"""Defines the question passed to the model thread, and reads the request fields shared by all API formats."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.methods import MethodText
from evoprune.session import PipelineOptions, PruneOptions
from evoprune.util import parse_time
from evoprune.video import SamplingOptions
from evoprune_serve.errors import ApiError, refused
from evoprune_serve.fields import NUMBER, Fields, characters, json_text
from evoprune_serve.messages import read_messages
from evoprune_serve.sources import Source

MOST_STOPS = 16
SPEECH = ("none", "auto", "tiny", "base", "small", "large-v3-turbo")  # `speech` values allowed in requests
MOST_BYTES = 2**21  # maximum size of all request options as JSON; a schema alone may have up to 1 MiB
JSON_OBJECT = {"type": "object"}
# Values allowed for method settings in a request.
SETTING = re.compile(r"true|false|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)
# Options of all formats not supported by the server. A request may only set them to values without effect.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "tools": lambda value: value == [],
    "tool_choice": lambda value: value in ("none", "auto"),
    "parallel_tool_calls": lambda value: isinstance(value, bool),
    "service_tier": lambda value: value in ("auto", "default"),
    "user": lambda value: isinstance(value, str),
    "safety_identifier": lambda value: isinstance(value, str),
    "prompt_cache_key": lambda value: isinstance(value, str),
    "prompt_cache_retention": lambda value: isinstance(value, str),
    "metadata": lambda value: isinstance(value, dict),
}
# Request field names, for options with a different name.
NAMES = {"start_s": "start", "end_s": "end", "logprobs": "top_logprobs"}
SCHEMA = "schema"  # the option whose value takes long to check
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question with all of its options, but without its videos and images."""

    model: str  # model name
    text: str
    earlier: tuple[dict[str, str], ...]  # earlier messages, alternating between user and assistant
    generation: GenerationOptions  # includes the system prompt, `system`
    seed: int | None
    sampling: SamplingOptions
    pruning: PruneOptions
    stream: bool
    conversation: bool = False  # whether the question belongs to a conversation, even if it is the first one
    compare: bool = False  # whether to answer without pruning, too


def read_options(body: Any, messages: str) -> Fields:
    """Return the fields of a request body after checking that its options aren't too large.

    `messages` is the name of the messages field, which is not checked.

    Raises:
        ApiError: If the body isn't an object, or fields other than the messages are too large or not valid Unicode.
    """
    fields = Fields(body)
    options = {name: value for name, value in body.items() if name != messages}
    too_large = refused(f"the options have more than {MOST_BYTES >> 20} MiB")
    if characters(options) > MOST_BYTES:  # checked first because the JSON takes more memory
        raise too_large
    try:
        size = len(json.dumps(options, ensure_ascii=False).encode())
    except UnicodeEncodeError as problem:
        raise refused("a string in the options is not valid Unicode: it contains a lone surrogate") from problem
    if size > MOST_BYTES:
        raise too_large
    return fields


def _model(fields: Fields, models: Sequence[str]) -> str:
    """Return the name of the requested model. Defaults to the first model.

    Raises:
        ApiError: If no model with this name exists.
    """
    asked = fields.take("model", str, models[0])
    if asked not in models:
        raise no_model(asked, models)
    return asked


def no_model(name: str, models: Iterable[str]) -> ApiError:
    """Return the error for a request for an unknown model."""
    quoted = partial(json.dumps, ensure_ascii=False)
    known = ", ".join(map(quoted, models))
    return ApiError(404, f"there is no model {quoted(name[:100])}, but {known}", param="model", code="model_not_found")


def read_question(
    fields: Fields,
    usual: PipelineOptions,
    models: Sequence[str],
    messages: Mapping[str, Any],
    field: str,
    generation: dict[str, Any],
    names: Mapping[str, str],
) -> tuple[Question, tuple[Source, ...]]:
    """Read the request fields shared by all API formats.

    Args:
        usual: The default values for options not included in the body.
        models: The names of the server's models.
        messages, field: See `read_messages`.
        generation: The `GenerationOptions` from fields specific to this API format. System prompts from messages are appended to
            its `system`.
        names: Request field names, for options with a different name.

    Returns:
        The question, and the videos and images it refers to.

    Raises:
        ApiError: If a value is unknown, has the wrong type, or is out of range.
    """
    model = _model(fields, models)
    system, turns, sources = read_messages(messages, field)
    generation = generation | _sampled(fields)
    prompts = [each for each in (generation.get("system"), system) if each is not None]
    if prompts:
        generation["system"] = "\n".join(prompts)
    changed = {
        "generation": _changed(usual.generation, generation, names),
        "sampling": _changed(usual.sampling, _sampling(fields), names),
        "pruning": _changed(usual.pruning, _pruning(fields), names),
    }
    *earlier, last = turns
    question = Question(
        model,
        last["content"],
        tuple(earlier),
        seed=fields.take("seed", int),
        stream=fields.take("stream", bool, False),
        **changed,
    )
    return question, tuple(sources)


def stream_options(fields: Fields, stream: bool) -> Fields:
    """Return a request's `stream_options` after taking the fields shared by all API formats.

    Raises:
        ApiError: If the request has `stream_options` but doesn't ask for streaming.
    """
    given = fields.take("stream_options", dict)
    if given is not None and not stream:
        fields.refuse("stream_options", "is only for streams")
    options = Fields(given or {}, "stream_options")
    options.take("include_obfuscation", bool)  # has no effect because this server never pads events
    return options


def _changed(options: T, given: dict[str, Any], names: Mapping[str, str]) -> T:
    """Return options with the given overrides. Without overrides, validation is skipped, which saves a few milliseconds.

    Raises:
        ApiError: If a value is invalid. The error specifies its request field.
    """
    try:
        return replace(options, **given) if given else options
    except UsageError as problem:
        alone = {name: value for name, value in given.items() if name != SCHEMA}
        for name, value in alone.items():
            with _naming(names.get(name, name), name):
                replace(options, **{name: value})
        if SCHEMA in given and _is_valid(
            options, alone
        ):  # the schema is not checked again, because this may take seconds
            with _naming(names.get(SCHEMA, SCHEMA), SCHEMA):
                raise
        raise refused(
            f"{problem.message} ({problem.hint})"
        ) from problem  # each value is valid, but their combination isn't


def _is_valid(options: Any, given: dict[str, Any]) -> bool:
    try:
        replace(options, **given)
    except UsageError:
        return False
    return True


@contextmanager
def _naming(field: str, option: str | None = None) -> Iterator[None]:
    """Convert a UsageError to an ApiError for a request field, replacing the name `option` in its message with `field`."""
    try:
        yield
    except UsageError as problem:
        text = problem.message
        if option:
            text = re.sub(rf"\b{re.escape(option)}\b", field, text)
        raise refused(f"{text} ({problem.hint})", field) from problem


def read_schema(fields: Fields, inner: str | None = None) -> dict[str, Any] | None:
    """Return the JSON schema for the answer, or None for a free-text answer.

    Args:
        fields: The fields of a request's response format.
        inner: The name of the field with the object that contains the schema, or None if the schema is next to `type`.
    """
    kind = fields.need("type", str)
    schema = None
    if kind == "json_object":
        schema = JSON_OBJECT
    elif kind == "json_schema":
        stated = fields if inner is None else Fields(fields.need(inner, dict), fields.name_of(inner))
        for name in ("name", "description"):
            stated.take(name, str)
        stated.take("strict", bool)  # has no effect because answers always follow their schema
        schema = stated.need("schema", dict)
        stated.end()
    elif kind != "text":
        fields.refuse("type", f"is {json_text(kind)}: text, json_object and json_schema are known")
    fields.end()
    return schema


def has_schema(body: Any) -> bool:
    """Return True if a request's answer follows a schema, which has to be checked."""
    if not isinstance(body, dict):
        return False
    options = body.get("options")  # in requests of `evoprune ask --via`
    if isinstance(options, dict) and (options.get("schema") or options.get("regex")):
        return True
    text = body.get("text")  # in the Responses API
    stated = body.get("response_format"), text.get("format") if isinstance(text, dict) else None
    return any(isinstance(each, dict) and each.get("type") == "json_schema" for each in stated)


def read_effort(fields: Fields, name: str) -> dict[str, str]:
    """Convert a reasoning effort to the `think` option. The only supported effort is "none", which turns thinking off.

    Raises:
        ApiError: If the effort has any other value.
    """
    effort = fields.take(name, str)
    if effort is None:
        return {}
    if effort != "none":
        fields.refuse(name, f"is {json_text(effort)}, which is not supported here: see think")
    return {"think": "off"}


def _sampled(fields: Fields) -> dict[str, Any]:
    """Return the options for token sampling, stop strings, and thinking set by a request."""
    given = {}
    numbers = {"temperature": NUMBER, "top_p": NUMBER, "top_k": int, "repetition_penalty": NUMBER}
    for name, kinds in numbers.items():
        if fields.has(name):
            given[name] = fields.take(name, kinds)
    if fields.has("stop"):
        stop = fields.take("stop", (str, list))
        if isinstance(stop, list) and len(stop) > MOST_STOPS:
            fields.refuse("stop", f"has more than {MOST_STOPS} texts")
        if isinstance(stop, list) and not all(isinstance(each, str) for each in stop):
            fields.refuse("stop", f"is {json_text(stop)}, not a string or a list of strings")
        given["stop"] = stop
    think = fields.take("think", (bool, str))
    if think is not None:
        given["think"] = {True: "on", False: "off"}.get(think, think)
    return given


def _sampling(fields: Fields) -> dict[str, Any]:
    given = {}
    if fields.has("fps"):
        given |= {"fps": fields.take("fps", NUMBER), "frames": None}
    if fields.has("frames"):
        given |= {"frames": fields.take("frames", int), "fps": given.get("fps")}
    if fields.has("seek"):
        given["seek"] = fields.take("seek", str)
    if fields.has("speech"):
        given["speech"] = fields.take("speech", str)
        if given["speech"] not in SPEECH:  # any other value would refer to a folder on this machine
            fields.refuse("speech", f"is not one of {', '.join(SPEECH)}")
    for name in ("start", "end"):
        if fields.has(name):
            value = fields.take(name, (int, float, str))
            with _naming(name):
                given[f"{name}_s"] = parse_time(value) if isinstance(value, str) else value
    return given


def file_setting(method: str) -> str | None:
    """Return the name of the first setting of a method whose value could refer to a file on this machine, or None.

    Raises:
        UsageError: If the text isn't the name of a method.
    """
    settings = (setting for each in MethodText(method).parts for setting in each.settings)
    return next((name[:60] for name, value in settings if value is not None and not SETTING.fullmatch(value)), None)


def _pruning(fields: Fields) -> dict[str, Any]:
    given = {}
    if fields.has("budget"):
        given["budget"] = fields.take("budget", (int, float, str))
    if fields.has("method"):
        method = fields.take("method", str)
        with _naming("method"):
            name = file_setting(method)
        if name is not None:
            fields.refuse("method", f"sets {name}: requests can set only numbers, true and false")
        given["method"] = method
    return given

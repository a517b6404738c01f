"""Represents a question in the form that the model's thread needs, and reads the request fields that all API formats share."""

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
from evoprune_serve.fields import NUMBER, Fields, json_text
from evoprune_serve.messages import read_messages
from evoprune_serve.sources import Source

MOST_STOPS = 16
SPEECH = ("none", "auto", "tiny", "base", "small", "large-v3-turbo")  # values of `speech` in requests
MOST_BYTES = 2**21  # maximum size of all options of a request as JSON; a schema alone may have up to 1 MiB
JSON_OBJECT = {"type": "object"}
# Values that a request may give to a setting of a method.
SETTING = re.compile(r"true|false|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)
# Options of all formats that the server does not support. A request may set them only to a value that has no effect.
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
# Names of request fields, for options whose name differs from the name of the field.
NAMES = {"start_s": "start", "end_s": "end", "logprobs": "top_logprobs"}
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question with all of its options, but without its videos and images."""

    model: str  # name of the model
    text: str
    earlier: tuple[dict[str, str], ...]  # earlier messages, which alternate between user and assistant
    generation: GenerationOptions  # includes the system prompt, `system`
    seed: int | None
    sampling: SamplingOptions
    pruning: PruneOptions
    stream: bool


def read_options(body: Any, messages: str) -> Fields:
    """Return the fields of a request body after checking that its options are not too large.

    `messages` is the name of the field that contains the messages, which is not checked.

    Raises:
        ApiError: If the body is not an object, or fields other than the messages are too large or not valid Unicode.
    """
    fields = Fields(body)
    options = {name: value for name, value in body.items() if name != messages}
    try:
        size = len(json.dumps(options, ensure_ascii=False).encode())
    except UnicodeEncodeError as problem:
        raise refused("a string in the options is not valid Unicode: it contains a lone surrogate") from problem
    if size > MOST_BYTES:
        raise refused(f"the options have more than {MOST_BYTES >> 20} MiB")
    return fields


def _model(fields: Fields, models: Sequence[str]) -> str:
    """Return the name of the model that a request asks for. The default is the first model.

    Raises:
        ApiError: If there is no model with this name.
    """
    asked = fields.take("model", str, models[0])
    if asked not in models:
        raise no_model(asked, models)
    return asked


def no_model(name: str, models: Iterable[str]) -> ApiError:
    """Return the error for a request that asks for an unknown model."""
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
    """Read the request fields that all API formats share.

    Args:
        usual: The default options, for options that the body does not contain.
        models: Names of the models that the server offers.
        messages, field: See `read_messages`.
        generation: The `GenerationOptions` from fields that only this API format has. System prompts from messages are appended to
            its `system`.
        names: Names of request fields, for options whose name differs from the name of the field.

    Returns:
        The question, and the videos and images that it refers to.

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
    """Return the `stream_options` of a request after taking the fields that all API formats share.

    Raises:
        ApiError: If the request has `stream_options` but does not ask for a stream.
    """
    given = fields.take("stream_options", dict)
    if given is not None and not stream:
        fields.refuse("stream_options", "is only for streams")
    options = Fields(given or {}, "stream_options")
    options.take("include_obfuscation", bool)  # has no effect, because this server never pads events
    return options


def _changed(options: T, given: dict[str, Any], names: Mapping[str, str]) -> T:
    """Return options with the given overrides. If there are none, validation is skipped, which saves a few milliseconds.

    Raises:
        ApiError: If a value is invalid. The error names its request field.
    """
    try:
        return replace(options, **given) if given else options
    except UsageError as problem:
        for name, value in given.items():
            field = names.get(name, name)
            with _naming(field, name):
                replace(options, **{name: value})
        raise refused(
            f"{problem.message} ({problem.hint})"
        ) from problem  # each value is valid, but not their combination


@contextmanager
def _naming(field: str, option: str | None = None) -> Iterator[None]:
    """Convert a UsageError to an ApiError about a request field, replacing the name `option` in its message with `field`."""
    try:
        yield
    except UsageError as problem:
        text = problem.message
        if option:
            text = re.sub(rf"\b{re.escape(option)}\b", field, text)
        raise refused(f"{text} ({problem.hint})", field) from problem


def read_schema(fields: Fields, inner: str | None = None) -> dict[str, Any] | None:
    """Return the JSON schema that the answer must follow, or None if the answer is free text.

    Args:
        fields: The fields of a request's response format.
        inner: The name of the field with the object that contains the schema. None if the schema is next to `type`.
    """
    kind = fields.need("type", str)
    schema = None
    if kind == "json_object":
        schema = JSON_OBJECT
    elif kind == "json_schema":
        stated = fields if inner is None else Fields(fields.need(inner, dict), fields.name_of(inner))
        for name in ("name", "description"):
            stated.take(name, str)
        stated.take("strict", bool)  # has no effect, because answers always follow their schema
        schema = stated.need("schema", dict)
        stated.end()
    elif kind != "text":
        fields.refuse("type", f"is {json_text(kind)}: text, json_object and json_schema are known")
    fields.end()
    return schema


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
    """Return the options for token sampling, stop strings and thinking that a request sets."""
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
        if given["speech"] not in SPEECH:  # any other value would name a folder on this machine
            fields.refuse("speech", f"is not one of {', '.join(SPEECH)}")
    for name in ("start", "end"):
        if fields.has(name):
            value = fields.take(name, (int, float, str))
            with _naming(name):
                given[f"{name}_s"] = parse_time(value) if isinstance(value, str) else value
    return given


def _pruning(fields: Fields) -> dict[str, Any]:
    given = {}
    if fields.has("budget"):
        given["budget"] = fields.take("budget", (int, float, str))
    if fields.has("method"):
        method = fields.take("method", str)
        with _naming("method"):
            parts = MethodText(method).parts
        for name, value in (setting for each in parts for setting in each.settings):
            if value is not None and not SETTING.fullmatch(value):  # other values could name a file on this machine
                fields.refuse("method", f"sets {name[:60]}: requests can set only numbers, true and false")
        given["method"] = method
    return given

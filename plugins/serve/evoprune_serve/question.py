"""A question as the server's model takes it, and the options that all forms of requests have for it."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from evoprune.errors import UsageError
from evoprune.methods import parse_names
from evoprune.session import GenerationOptions, PipelineOptions, PruneOptions, SamplingOptions
from evoprune.video import parse_time
from evoprune_serve.errors import ApiError, refused
from evoprune_serve.fields import NUMBER, Fields, json_text
from evoprune_serve.messages import read_messages
from evoprune_serve.sources import Source

MOST_STOPS = 16
MOST_BYTES = 2**21  # of all options of a request, as JSON: a schema has up to 1 MiB
JSON_OBJECT = {"type": "object"}
SETTING = re.compile(r"true|false|[+-]?\d+(\.\d*)?(e[+-]?\d+)?", re.IGNORECASE)  # of a method
# Options of all forms that change nothing at these values, and are refused at others.
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
# Options whose fields have other names, in all forms.
NAMES = {"start_s": "start", "end_s": "end", "logprobs": "top_logprobs"}
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What is asked, apart from the videos and pictures that it is about."""

    model: str  # its name
    text: str
    earlier: tuple[dict[str, str], ...]  # messages before it, of the user and the assistant in turn
    generation: GenerationOptions  # its `system` is the system prompt
    seed: int | None
    sampling: SamplingOptions
    pruning: PruneOptions
    stream: bool


def read_options(body: Any, messages: str) -> Fields:
    """Return the fields of a body.

    `messages`: the field that has them.

    Raises ApiError: it is no object, or what it has beside its messages is too much, or cannot be sent back.
    """
    fields = Fields(body)
    options = {name: value for name, value in body.items() if name != messages}
    try:
        size = len(json.dumps(options, ensure_ascii=False).encode())
    except UnicodeEncodeError as problem:
        raise refused("a text of the options is not Unicode: it has half of a surrogate pair") from problem
    if size > MOST_BYTES:
        raise refused(f"the options have more than {MOST_BYTES >> 20} MiB")
    return fields


def _model(fields: Fields, models: Sequence[str]) -> str:
    """Return the model that a body names, else the first. Raises ApiError: there is none of this name."""
    asked = fields.take("model", str, models[0])
    if asked not in models:
        raise no_model(asked, models)
    return asked


def no_model(name: str, models: Iterable[str]) -> ApiError:
    """Return the error of a request that names another model than there are."""
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
    """Return the question of a body and the videos and pictures that it is about: what all forms of requests have.

    Args:
        usual: what holds where the body says nothing.
        models: the names of those that are served.
        messages, field: as of `read_messages`.
        generation: what the body says of `GenerationOptions` in its own form. System prompts of messages follow its `system`.
        names: of the fields that have other names than those options.

    Raises ApiError: anything in these is unknown, of another type, or out of range.
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
    """Return the options of a stream, less those of all forms. Raises ApiError: there are some, and no stream."""
    given = fields.take("stream_options", dict)
    if given is not None and not stream:
        fields.refuse("stream_options", "is of streams alone")
    options = Fields(given or {}, "stream_options")
    options.take("include_obfuscation", bool)  # nothing is padded, which hides no lengths: a choice of the client
    return options


def _changed(options: T, given: dict[str, Any], names: Mapping[str, str]) -> T:
    """Return options with other values; themselves where there are none, since checking them takes milliseconds.

    Raises ApiError, which names the field whose value makes no sense.
    """
    try:
        return replace(options, **given) if given else options
    except UsageError as problem:
        for name, value in given.items():
            field = names.get(name, name)
            with _naming(field, name):
                replace(options, **{name: value})
        raise refused(f"{problem.message} ({problem.hint})") from problem  # they make none together


@contextmanager
def _naming(field: str, option: str | None = None) -> Iterator[None]:
    """Turns a UsageError into the ApiError of a field. `option`: what the messages call it."""
    try:
        yield
    except UsageError as problem:
        text = problem.message
        if option:
            text = re.sub(rf"\b{re.escape(option)}\b", field, text)
        raise refused(f"{text} ({problem.hint})", field) from problem


def read_schema(fields: Fields, inner: str | None = None) -> dict[str, Any] | None:
    """Return the schema that a format of answers states; None for any text.

    `inner`: the field of a format `json_schema` that has it; None where it stands beside the type.
    """
    kind = fields.need("type", str)
    schema = None
    if kind == "json_object":
        schema = JSON_OBJECT
    elif kind == "json_schema":
        stated = fields if inner is None else Fields(fields.need(inner, dict), fields.name_of(inner))
        for name in ("name", "description"):
            stated.take(name, str)
        stated.take("strict", bool)  # an answer always follows its schema
        schema = stated.need("schema", dict)
        stated.end()
    elif kind != "text":
        fields.refuse("type", f"is {json_text(kind)}: text, json_object and json_schema are known")
    fields.end()
    return schema


def read_effort(fields: Fields, name: str) -> dict[str, str]:
    """Return what an effort of reasoning says of thoughts: none means that there are none. Raises ApiError: it is another one."""
    effort = fields.take(name, str)
    if effort is None:
        return {}
    if effort != "none":
        fields.refuse(name, f"is {json_text(effort)}, which is not supported here: see think")
    return {"think": "off"}


def _sampled(fields: Fields) -> dict[str, Any]:
    """Return what a body says of how tokens are drawn, what ends an answer, and thoughts."""
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
            fields.refuse("stop", f"is {json_text(stop)}, not a text or a list of texts")
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
            parts = parse_names(method)
        for name, value in (setting for each in parts for setting in each.settings):
            if value is not None and not SETTING.fullmatch(value):  # it may name a file of this machine
                fields.refuse("method", f"sets {name[:60]}: requests set numbers, true and false alone")
        given["method"] = method
    return given

"""Suggestions for Python callers who use a wrong name: the option or function that they probably meant. Does not import torch.

`signatures.suggests` uses them for keyword arguments, and `Suggesting`, `door` and `evoprune/__init__.py` for attributes.
"""

import sys
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import lazy_loader

# For each option or argument, its names in other libraries and on the command line. If an entry has several names before the colon,
# the first name that the called function has is suggested. A name with a value is suggested as a whole.
OTHER_NAMES = {
    "max_new_tokens": "max_tokens max_completion_tokens max_output_tokens max_length max_gen_toks num_predict n_predict",
    "frames": "num_frames nframes n_frames frame_count num_video_frames num_segments",
    "max_frames": "max_num_frames max_frames_num max_video_frames",
    "fps": "video_fps sample_fps sampling_fps frames_per_second sampling_rate",
    "start_s": "start start_time start_sec start_seconds video_start",
    "end_s": "end end_time end_sec end_seconds video_end",
    "max_visual_tokens": "max_pixels video_max_pixels total_pixels max_video_tokens max_vision_tokens",
    "subtitles": "subtitle captions transcript",
    "speech": "audio use_audio_in_video transcribe asr whisper",
    "temperature": "temp sampling_temperature",
    "temperature=0": "greedy",
    "temperature=1": "do_sample",
    "repetition_penalty": "frequency_penalty presence_penalty repeat_penalty",
    "stop": "stop_sequences stop_strings stop_words stop_tokens stop_token",
    "schema": "json_schema response_format response_schema response_model output_schema guided_json structured_outputs text_format",
    "regex": "guided_regex regexp",
    "choices": "guided_choice candidates candidate_labels options answers",
    "logprobs": "top_logprobs output_logprobs return_logprobs output_scores",
    "think": "thinking enable_thinking reasoning reasoning_effort",
    "on_thoughts": "show_thoughts on_thinking",
    "system": "system_prompt system_message system_instruction instructions developer",
    "budget": "keep keep_ratio keep_rate retention retention_ratio retain_ratio ratio prune_ratio pruning_ratio pruning_rate "
    "video_pruning_rate compression compression_ratio sparsity",
    "method": "pruning pruning_method pruner strategy algorithm press",
    "seed": "random_seed random_state manual_seed",
    "device": "device_map gpu",
    "dtype": "torch_dtype precision compute_type",
    "quantize": "quantization quantization_config bits",
    "quantize='int8'": "load_in_8bit int8",
    "quantize='int4'": "load_in_4bit int4",
    "store_quantized": "no_store store",
    "offline": "local_files_only local_only",
    "threads": "num_threads n_threads cpu_threads num_workers",
    "engine": "backend model_impl",
    "model loaded": "model_name model_id model_path model_name_or_path pretrained pretrained_model_name_or_path checkpoint",
    "path inputs": "video videos video_path image images file files filename source input inputs path paths media url",
    "question query": "prompt query question text message content queries",
    "frame_rate": "array_fps input_fps native_fps",
    "times_s": "times timestamps frame_times",
    "top": "max_results top_results limit num_moments max_moments n",
    "min_score": "threshold score_threshold",
    "segment_s": "segment segment_length",
    "window_s": "window window_size chunk_s chunk_length_s",
    "memory_s": "memory",
    "folder": "path cache_dir directory dir root",
    "cache": "use_cache cache_dir",
    "progress": "callback progress_callback show_progress verbose",
}
# What to do instead of passing an option that exists nowhere here.
NOT_OPTIONS = {
    "stream": "iterate over the answer to get its pieces as they are generated",
    "streamer": "iterate over the answer to get its pieces as they are generated",
    "n": "ask once for each answer, each time with another seed and a temperature above 0",
    "num_return_sequences": "ask once for each answer, each time with another seed and a temperature above 0",
    "messages": "a conversation is a chat: qa.encode(path).chat(messages=...).ask(question)",
    "history": "a conversation is a chat: qa.encode(path).chat(messages=...).ask(question)",
    "batch_size": "evoprune.batch.answers answers questions about many videos",
    "trust_remote_code": "False is the only choice, because evoprune never runs a model's own code",
    "token": "set the environment variable HF_TOKEN",
    "use_auth_token": "set the environment variable HF_TOKEN",
}
NEAR = 0.65  # minimum similarity of a suggested attribute, as in difflib
# Options that `EvoPrune`, which wraps a Hugging Face model, has too.
WRAPPER_OPTIONS = ("budget", "method", "seed")


def unknown_keyword(name: str, known: Collection[str]) -> TypeError:
    """Return the exception for a call with an unknown keyword argument. Its message has one line.

    It suggests, in this order: the name of the same option here, a function that has the option, or a similar name. Otherwise, the
    message lists all known names.

    Args:
        name: The unknown keyword.
        known: The names of the called function's arguments.
    """
    return TypeError(f"unknown option {name!r}; {_instead(name, known) or 'known: ' + ', '.join(known)}")


def _instead(name: str, known: Collection[str]) -> str | None:
    from evoprune.keywords import OPTIONS_OF

    if target := other_name(name, known):
        return f"did you mean {target}?"
    if name in NOT_OPTIONS:
        return NOT_OPTIONS[name]
    for target in (name, *_meant(name)):
        for function, options in OPTIONS_OF.items():
            if _option(target) in options:
                wrapper = " or EvoPrune" if _option(target) in WRAPPER_OPTIONS else ""
                return f"set {target} in {function}{wrapper}"
    if near := get_close_matches(name.lower(), known, 1):
        return f"did you mean {near[0]}?"
    for function, options in OPTIONS_OF.items():
        if near := get_close_matches(name.lower(), options, 1, 0.8):
            return f"set {near[0]} in {function}"
    return None


def other_name(name: str, known: Collection[str]) -> str | None:
    """Return the known option that has this name in another library or on the command line, maybe with a value, or None."""
    return next((target for target in _meant(name) if _option(target) in known), None)


def _meant(name: str) -> list[str]:
    others = [(targets.split(), names.split()) for targets, names in OTHER_NAMES.items()]
    return [target for targets, names in others if name in names for target in targets if target != name]


def _option(target: str) -> str:
    """Return the name of the option in a suggestion: `quantize` of `quantize='int8'`."""
    return target.partition("=")[0]


def unknown_attribute(owner: str, name: str, instead: Mapping[str, str], known: Collection[str]) -> AttributeError:
    """Return the exception for a missing attribute, with a suggestion in its message if there is one.

    Args:
        owner: What lacks the attribute, as the beginning of the message.
        instead: The expressions to suggest, by the missing name.
        known: The names of the attributes that the owner has.
    """
    public = [each for each in known if not each.startswith("_") and not each.isupper()]
    # Python looks for many names that begin with an underscore, and expects them to be missing.
    lower = {each.lower(): each for each in public} | {each: each for each in public}
    near = (
        []
        if name.startswith("_")
        else get_close_matches(name, lower, 1, NEAR) or get_close_matches(name.lower(), lower, 1, NEAR)
    )
    meant = instead.get(name) or next((lower[each] for each in near), None)
    return AttributeError(f"{owner} has no attribute {name!r}" + (f"; did you mean {meant}?" if meant else ""))


def door(package: str, file: str, call: str = "") -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package, which imports the names in its stub on first use.

    `call` is the expression to suggest if the package itself is called like a function.
    """
    load, names, public = lazy_loader.attach_stub(package, file)
    if call:
        sys.modules[package].__class__ = type("module", (ModuleType,), {"__call__": not_callable(call)})

    def find(name: str) -> Any:
        if name in public:
            return load(name)
        raise unknown_attribute(f"module {package!r}", name, {}, public)

    return find, names, public


class Suggesting:
    """Base class for objects whose errors about missing attributes suggest the right expression."""

    MEANT: ClassVar[Mapping[str, str]] = {}  # the expressions to suggest, by the missing name

    if not TYPE_CHECKING:  # type checkers that see `__getattr__` would accept any attribute

        def __getattr__(self, name: str) -> Any:
            if hasattr(type(self), name):  # a property has raised an AttributeError; raise it again
                return object.__getattribute__(self, name)
            raise unknown_attribute(f"{type(self).__name__!r} object", name, self.MEANT, dir(self))


def not_callable(instead: str) -> Callable[..., NoReturn]:
    """Return a `__call__` method for objects that can't be called. Its error suggests an expression."""

    def __call__(self: object, *_: object, **__: object) -> NoReturn:  # noqa: N807
        raise TypeError(f"{type(self).__name__!r} object is not callable; did you mean {instead}?")

    return __call__


class SuggestingClass(type):
    """Metaclass for classes whose errors about missing class attributes suggest the right expression, from `MEANT`."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            raise unknown_attribute(f"class {cls.__name__!r}", name, cls.MEANT, dir(cls))

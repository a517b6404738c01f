"""The options shared by the command line, batches, evaluations, lmms-eval and Python. Imports no torch.

Values are checked when an object is made, as far as that needs neither a model nor a video.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from os import PathLike
from typing import Any, ClassVar, Self

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.language.settings import GenerationSettings
from evoprune.model.precision import LOAD_FORMATS, check_dtype, check_quantize, parse_threads, short_dtype
from evoprune.pipeline.keywords import check_types, unknown_option
from evoprune.pruning.budget import AUTO_MOST, AUTOS, DEFAULT, TUNED, parse_budget_or_name
from evoprune.video.info import NO_SUBTITLES
from evoprune.video.sampling import check_sampling

MAX_SUBTITLE_TOKENS = 2048
HELD = "to prune a model you hold: evoprune.EvoPrune(budget=0.1)(model)"


@dataclass(frozen=True)
class ModelOptions:
    """Which model is loaded, and how.

    Attributes:
        model: "demo" or "demo-scenes" for a bundled one, a folder in the hub's file layout, or a hub id `org/name`, tried in this
            order.
        revision: branch, tag or commit of a hub id.
        device: "auto" (CUDA if there is any, else the CPU) or any torch device or its name; kept as its name.
        dtype: "bf16", "fp16", "fp32", or "auto": fp32 for the demos; else bf16 on CUDA and on CPUs with bf16 instructions,
            fp32 elsewhere. torch's dtypes and their names become these.
        quantize: "none", or "int8" or "int4" to quantise the language model for decoding on a CPU, see `model.quantize`.
        load_format: "auto" reads the weights. "dummy" takes the dimensions from a folder, from a demo or from a bundled config
            and fills in seeded random weights, without any network.
        offline: use nothing but the hub's cache on this machine.
        threads: threads of the whole process on the CPU, set when the model is loaded: a number; "auto" for one by the model's
            size and the cores that this process may use, see `model.threads`; None to leave torch's number as it is.

    Raises:
        UsageError: an unknown dtype, quantisation or load format, or no number of threads.
    """

    model: str | PathLike = "demo"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str = "none"
    load_format: str = "auto"
    offline: bool = False
    threads: int | str | None = None

    def __post_init__(self):
        if hasattr(self.model, "forward"):
            raise UsageError(f"model is of class {type(self.model).__name__}, not a name", HELD)
        object.__setattr__(self, "dtype", short_dtype(self.dtype))
        if type(self.device).__name__ == "device":
            object.__setattr__(self, "device", str(self.device))
        check_types(self)
        object.__setattr__(self, "model", os.fspath(self.model))
        object.__setattr__(self, "threads", parse_threads(self.threads))
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(f"unknown load format {self.load_format!r}", f"use {' or '.join(LOAD_FORMATS)}")
        check_dtype(self.dtype)
        check_quantize(self.quantize)


@dataclass(frozen=True)
class PruneOptions:
    """How visual tokens are pruned.

    Attributes:
        budget: share of visual tokens kept, in (0, 1], or a preset's name, which becomes its share; or "auto" or "auto:inflection",
            if the method can let the content decide; or "tuned", for the method and budget that were tuned for the model.
        method: name of a pruning method, perhaps with settings: `NAME:SETTING=VALUE`.
        method_args: its settings, by name; kept as texts.
        seed: of everything random, generation included.

    Raises:
        UsageError: a bad budget, no such method, or "tuned" together with a method or its settings.
    """

    budget: float | str = DEFAULT
    method: str = methods.DEFAULT
    method_args: dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self):
        if self.budget is None:
            parse_budget_or_name(None)  # whose message names the presets
        check_types(self)
        object.__setattr__(self, "budget", parse_budget_or_name(self.budget))
        texts = {name: str(value) for name, value in (self.method_args or {}).items()}
        object.__setattr__(self, "method_args", texts)
        methods.check(self.method)
        check_tuned(self.budget, self.method, texts)

    @property
    def most(self) -> float:
        """Share of visual tokens kept, at most; not of a budget of "tuned"."""
        return AUTO_MOST if self.budget in AUTOS else self.budget


def check_tuned(budget: float | str, method: str, method_args: Mapping[str, Any] | None) -> None:
    """Raises UsageError where a method or settings of one are given beside a budget of "tuned"."""
    if budget == TUNED and (method != methods.DEFAULT or method_args):
        raise UsageError(
            f"budget {TUNED} holds the method too", "leave the method and its settings out, or give a budget"
        )


@dataclass(frozen=True)
class SamplingOptions:
    """What of a video is looked at.

    Attributes:
        fps: frames a second; None for the model's own rate. `frames`: how many in all, instead; odd numbers round up.
        start_s, end_s: the part of the video, in seconds, below 0 from the video's end; None for the end.
        max_frames: None for the model's own limit.
        max_visual_tokens: limit before pruning, kept by smaller, then fewer frames; None for 24,576, and for 4,096 where a
            real model runs on a CPU.
        decoder: "auto", "pyav" or "decord", see `video.frames.read_frames`.
        subtitles: "none", "auto" for those that are beside the video or in it, or a file, see `video.probe.read_subtitles`.
        max_subtitle_tokens: with more, lines are left out.

    Raises:
        UsageError: a number that makes no sense, or fps and frames together.
    """

    fps: float | None = None
    frames: int | None = None
    start_s: float = 0.0
    end_s: float | None = None
    max_frames: int | None = None
    max_visual_tokens: int | None = None
    decoder: str = "auto"
    subtitles: str | PathLike = NO_SUBTITLES
    max_subtitle_tokens: int = MAX_SUBTITLE_TOKENS

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "subtitles", os.fspath(self.subtitles))
        if not self.subtitles:
            raise UsageError("subtitles is empty", "none, auto or a file")
        if self.max_subtitle_tokens < 1:
            raise UsageError(f"at most {self.max_subtitle_tokens} tokens of subtitles", "1 or more; or no subtitles")
        check_sampling(**self.numbers)

    @property
    def timeless(self) -> "SamplingOptions":
        """The same without a part of the time: for pictures beside videos."""
        return replace(self, start_s=0.0, end_s=None)

    @property
    def numbers(self) -> dict[str, Any]:
        """How frames are chosen: what `video.plan.make_plan` takes."""
        others = ("decoder", "subtitles", "max_subtitle_tokens")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in others}


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated.

    Attributes:
        max_new_tokens: at most so many tokens, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it and a token is drawn.
        top_p: draw only among the most probable tokens that together reach this probability, in (0, 1].
        system: a system prompt; None for the model's own.

    Raises:
        UsageError: a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    system: str | None = None

    def __post_init__(self):
        check_types(self)
        self.settings()

    def settings(self, seed: int = 0) -> GenerationSettings:
        """The settings for decoding."""
        return GenerationSettings(self.max_new_tokens, self.temperature, self.top_p, seed)


def from_keywords(given: Mapping[str, Any], *kinds: type) -> list:
    """One object of each of `kinds`, made of the keywords that are its fields.

    Raises:
        TypeError: a keyword that is a field of none of them. UsageError: a bad value.
    """
    known = [f.name for kind in kinds for f in fields(kind)]
    if unknown := [name for name in given if name not in known]:
        raise unknown_option(unknown[0], known)
    return [kind(**{f.name: given[f.name] for f in fields(kind) if f.name in given}) for kind in kinds]


@dataclass(frozen=True)
class PipelineOptions:
    """Everything that an answer depends on, besides the video, the question and the machine."""

    model: ModelOptions
    pruning: PruneOptions
    sampling: SamplingOptions
    generation: GenerationOptions

    KINDS: ClassVar[tuple[type, ...]] = (ModelOptions, PruneOptions, SamplingOptions, GenerationOptions)

    @classmethod
    def of(cls, **options) -> Self:
        """Made of the fields of all four.

        Raises:
            UsageError: a bad value. TypeError: an unknown option.
        """
        return cls(*from_keywords(options, *cls.KINDS))

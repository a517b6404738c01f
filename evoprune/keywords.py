"""Options of the Python functions, for type checkers, editors, and error messages. `help` shows them with their defaults.

Generated from the option classes by `python -m evoprune_cli.keywords > evoprune/keywords.py`; do not edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch


class ModelKeywords(TypedDict, total=False):
    """Options for loading a model."""

    revision: str | None
    """Branch, tag or commit of a hub id."""
    device: str | torch.device
    """auto: CUDA if available, otherwise the CPU."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] | torch.dtype
    """auto: bf16 if the hardware supports it; demo models use fp32."""
    quantize: Literal["auto", "none", "int8", "int4"]
    """Quantize the model on a CPU: faster, smaller and less exact. auto: int8 for a large model, if no dtype is given;
    otherwise none. int8: 8-bit weights and products in the tower and the language model. int4: the same, with 4-bit
    weights in the language model."""
    store_quantized: bool | None
    """Keep the quantized weights on disk (at most 32 GiB) for later runs. None: if the model is large and the disk has
    room."""
    load_format: Literal["auto", "dummy"]
    """auto loads the weights. dummy makes random weights: times and counts are valid, answers are meaningless. dummy
    needs a folder with config.json and a tokenizer."""
    engine: Literal["auto", "native", "transformers"]
    """Code that runs the language model: native is evoprune's, transformers is Hugging Face's, for quantized
    checkpoints and mixtures of experts on GPUs. auto: native if it supports the model."""
    offline: bool
    """Never use the network."""
    threads: int | Literal["auto"] | None
    """CPU threads; None keeps torch's number, auto depends on the model's size."""


class PruneKeywords(TypedDict, total=False):
    """Options for pruning visual tokens."""

    budget: float | str
    """Share of visual tokens kept: 0.1, 10%, or high (0.4; accuracy 98.2%, 2.0x as fast), balanced (0.25; 97.1%, 2.7x),
    fast (0.1; 95.8%, 4.4x). Accuracy: share that the worst of the demo models keeps. Speed: of the first token,
    compared with Hugging Face at 3B dimensions. Presets keep more of a still: 0.7, 0.5 and 0.3. full prunes nothing;
    auto depends on the content, auto:inflection on the method's scores."""
    method: str
    """Pruning method (see evoprune methods). NAME:SETTING=VALUE changes its settings; reuse+NAME encodes only changed
    units; ipcv+NAME computes a third of the rows in most layers; NAME+fastv also drops tokens inside the language
    model."""
    seed: int
    """Random seed."""


class SamplingKeywords(TypedDict, total=False):
    """Options for sampling video frames."""

    fps: float | None
    """Frames per second to sample; default: the model's rate."""
    frames: int | None
    """Number of frames to sample, instead of fps; odd numbers are rounded up."""
    start_s: float
    """Start time in seconds; negative values count from the end."""
    end_s: float | None
    """End time in seconds; negative values count from the end; None for the end."""
    max_frames: int | None
    """Maximum number of frames; default: the model's limit."""
    max_visual_tokens: int | None
    """Limit before pruning: above it, frames become smaller, then fewer; default: 24576, or 4096 for real models on a
    CPU."""
    frame_rate: float
    """Frames per second of an array or a folder of frames. Video files have their own rate."""
    decoder: Literal["auto", "pyav", "decord"]
    """Library that decodes the video; auto is pyav."""
    seek: Literal["auto", "exact", "keyframes"]
    """Which frame to take from each equal part of the video. exact: the one in the middle. keyframes: the keyframe
    nearest to the middle, if the part has one, which reads many times faster. auto: keyframes if that saves seconds,
    otherwise exact."""
    subtitles: str | PathLike[str]
    """Subtitles for the prompt. auto: a file next to the video, otherwise a text track in it. FILE: SRT, WebVTT, ASS,
    or a video with a text track."""
    max_subtitle_tokens: int
    """Limit on subtitle tokens: above it, lines are left out evenly."""
    speech: str | PathLike[str]
    """Transcribe what is said and add it to the prompt like subtitles, which take precedence: a Whisper model (tiny,
    base, small or large-v3-turbo), or a folder with one for CTranslate2. auto: the video's subtitles, or base if it has
    none. Needs evoprune[speech]."""


class UntypedKeywords(TypedDict, total=False):
    """GenerationKeywords without schema."""

    max_new_tokens: int
    """Maximum length of the answer, in tokens."""
    temperature: float
    """Sampling temperature; 0 is greedy."""
    top_p: float
    """Nucleus sampling: the smallest set of tokens with this probability; 1: all."""
    top_k: int
    """Sample from the N most probable tokens; 0: from all."""
    repetition_penalty: float | None
    """Above 1, tokens of the prompt and the answer become less probable; 1: off; default: from the model's
    generation_config.json."""
    system: str | None
    """A system prompt."""
    think: Literal["off", "on"]
    """Whether the model thinks before it answers, if it supports both. max_new_tokens limits thoughts and answer
    together."""
    stop: str | Sequence[str] | None
    """One or several texts: the answer ends before the first one. Thoughts may contain them."""
    logprobs: int | None
    """Keep the log probability of each token of the answer, and of this many most probable tokens at its position; at
    most 20, 0: only of the answer's tokens."""
    regex: str | None
    """The whole answer matches this regular expression. Needs evoprune[schema]."""
    choices: str | Sequence[str] | None
    """Two or more texts: the answer is one of them, and `Answer.choices` has the probability of each."""
    choice_score: Literal["sum", "mean"]
    """Compare choices by the sum of the log probabilities of their tokens, or by the mean, which does not favor short
    choices."""


class GenerationKeywords(UntypedKeywords, total=False):
    """Options for generating an answer, such as its maximum length, sampling, thinking, and constraints on its format."""

    schema: Mapping[str, Any] | type[Any] | None
    """A JSON Schema as a dict, a dataclass or a pydantic model: the answer is JSON that follows it, and `Answer.parsed`
    is its value, an instance of the class. Needs evoprune[schema]."""


class StreamKeywords(TypedDict, total=False):
    """Options for watching a live stream, which set the window length and the size of the memory."""

    window_s: float
    """Length of the windows that the stream is encoded in, in seconds. Each has a fixed number of tokens."""
    memory_s: float
    """Seconds of the stream whose tokens fit into memory. When memory is full, the oldest windows are thinned."""
    memory_tokens: int | None
    """Size of the memory in tokens, instead of memory_s."""


class FindKeywords(TypedDict, total=False):
    """Options for finding the moments of a video that match a query."""

    top: int
    """Maximum number of moments per query, best first."""
    min_score: float | None
    """Minimum score of a moment, from 0 to 1; default: depends on the scores of all segments, at least 0.96."""
    segment_s: float | None
    """Length of the segments to ask about, in seconds; None: 8 s, longer if total_tokens is too small for that."""
    total_tokens: int
    """Maximum number of visual tokens of a whole video before pruning: long videos are sampled at a lower rate. Ignored
    with --fps."""
    prompt: str | None
    """The question about a segment, with {} for the query; default: an English question, or one that the demo model
    knows. A query that ends with ? is asked unchanged."""
    yes: str
    """How an answer begins if the segment shows the query."""
    no: str
    """How an answer begins if the segment does not show it."""


class EvoPruneKeywords(TypedDict, total=False):
    """Pruning settings for a Hugging Face model."""

    budget: float | str
    """Share of the visual tokens of each video to keep: a number in (0, 1], a percentage such as "25%", or a preset."""
    method: str
    """Name of a pruning method, NAME:SETTING=VALUE for its settings."""
    positions: Literal["host", "qwen"]
    """host: every token gets the model's own position, so that budget 1.0 reproduces the model's output. qwen: text
    after a video starts at the end of the video's time, as in the training of Qwen's models."""
    seed: int
    """Seed of methods that draw at random."""
    pack: bool | Literal["int8"]
    """On a CPU, encode faster, with packed copies of the tower's linear layers. int8: with 8-bit copies, twice as fast
    as float32 and less exact."""
    pictures: bool
    """Prune images too, each to the same share of its tokens. Otherwise they stay whole."""


class LoadKeywords(ModelKeywords, PruneKeywords, total=False):
    """The options of both."""


class ReadAheadKeywords(ModelKeywords, SamplingKeywords, total=False):
    """The options of both."""


class ReadKeywords(TypedDict, total=False):
    """Options for reading frames."""

    fps: float | None
    """Frames per second to sample; default: the model's rate."""
    frames: int | None
    """Number of frames to sample, instead of fps; odd numbers are rounded up."""
    start_s: float
    """Start time in seconds; negative values count from the end."""
    end_s: float | None
    """End time in seconds; negative values count from the end; None for the end."""
    frame_rate: float
    """Frames per second of an array or a folder of frames. Video files have their own rate."""
    decoder: Literal["auto", "pyav", "decord"]
    """Library that decodes the video; auto is pyav."""
    seek: Literal["auto", "exact", "keyframes"]
    """Which frame to take from each equal part of the video. exact: the one in the middle. keyframes: the keyframe
    nearest to the middle, if the part has one, which reads many times faster. auto: keyframes if that saves seconds,
    otherwise exact."""


class WatchKeywords(StreamKeywords, total=False):
    """StreamKeywords, and options for reading frames."""

    fps: float | None
    """Frames per second to sample; default: the model's rate."""
    max_visual_tokens: int | None
    """Limit before pruning: above it, frames become smaller, then fewer; default: 24576, or 4096 for real models on a
    CPU."""


class SearchKeywords(FindKeywords, total=False):
    """FindKeywords, and options for reading frames."""

    fps: float | None
    """Frames per second to sample; default: the model's rate."""
    start_s: float
    """Start time in seconds; negative values count from the end."""
    end_s: float | None
    """End time in seconds; negative values count from the end; None for the end."""
    speech: str | PathLike[str]
    """Transcribe what is said and add it to the prompt like subtitles, which take precedence: a Whisper model (tiny,
    base, small or large-v3-turbo), or a folder with one for CTranslate2. auto: the video's subtitles, or base if it has
    none. Needs evoprune[speech]."""


# The options of each method, for messages about options that are passed to another method.
OPTIONS_OF = {
    "VideoQA.load": (
        "progress", "ahead", "revision", "device", "dtype", "quantize", "store_quantized", "load_format", "engine",
        "offline", "threads", "budget", "method", "seed",
    ),
    "VideoQA.encode": (
        "times_s", "name", "cache", "progress", "fps", "frames", "start_s", "end_s", "max_frames", "max_visual_tokens",
        "frame_rate", "decoder", "seek", "subtitles", "max_subtitle_tokens", "speech",
    ),
    "VideoQA.ask": (
        "seed", "on_thoughts", "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "system",
        "think", "stop", "logprobs", "schema", "regex", "choices", "choice_score",
    ),
    "VideoQA.stream": (
        "system", "name", "fps", "max_visual_tokens", "window_s", "memory_s", "memory_tokens",
    ),
    "VideoQA.find": (
        "progress", "cache", "fps", "start_s", "end_s", "speech", "top", "min_score", "segment_s", "total_tokens",
        "prompt", "yes", "no",
    ),
}  # fmt: skip

"""Options shared by the command line, batches, evaluations, lmms-eval, and the Python API. Does not import torch."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from evoprune.bundled import DEMOS
from evoprune.errors import OTHER_MODELS, ModelError, UsageError, VideoError
from evoprune.language import GenerationOptions
from evoprune.methods import Budget, MethodText
from evoprune.session.gguf.folder import gguf_files, gguf_folder
from evoprune.session.published import MODEL_HINT, is_id
from evoprune.util import (
    brief,
    converted,
    did_you_mean,
    file_state,
    from_keywords,
    is_text,
    missing_hint,
    option,
    parse_time,
    shown,
)
from evoprune.video import SamplingOptions, Video

if TYPE_CHECKING:
    from evoprune.methods import PruneConfig
    from evoprune.session.local_models import LocalModel

DtypeName = Literal["bf16", "fp16", "fp32"]
Quantize = Literal["auto", "none", "int8", "int4"]
LoadFormat = Literal[
    "auto", "dummy"
]  # "auto" reads the weights from files; "dummy" creates random weights with the same shapes
Engine = Literal["auto", "native", "transformers"]
DTYPE_NAMES = "auto", *get_args(DtypeName)
QUANTIZE = get_args(Quantize)
LOAD_FORMATS = get_args(LoadFormat)
AUTO, NATIVE, TRANSFORMERS = ENGINES = get_args(Engine)
AUTO_THREADS = "auto"
MAX_THREADS = 256
# Patterns matching the files in a model folder that affect the model's answers.
MODEL_FILES = (
    "*.safetensors", "*.index.json", "*config.json", "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.*",
)  # fmt: skip


def _short_dtype(given: Any) -> Any:
    """Convert a torch dtype or dtype name to a short name, such as "bf16". Other values are returned unchanged."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    text = str(given).removeprefix("torch.")
    if type(given).__name__ == "dtype":
        given = text
    return names.get(text, given)


def _model_name(given: Any) -> Any:
    """Return a model name unchanged.

    Raises:
        UsageError: If it is a model instead.
    """
    if hasattr(given, "forward"):
        raise UsageError(f"model is a {type(given).__name__}, not a name", OTHER_MODELS)
    return given


def _device_name(given: Any) -> Any:
    """Convert a torch device to its name. Other values are returned unchanged."""
    return str(given) if type(given).__name__ == "device" else given


def _parse_threads(given: int | str | None) -> int | str | None:
    """Parse a number of threads. "auto" and None are returned unchanged.

    Raises:
        UsageError: If the value is invalid or out of range.
    """
    if given is None or given == AUTO_THREADS:
        return given
    text = str(given)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
        raise UsageError(f"{text!r} is not a number of threads", f"use {AUTO_THREADS}, or 1 to {MAX_THREADS}")
    return int(text)


@converted
@dataclass(frozen=True)
class ModelOptions:
    """Options for loading a model. Torch dtypes, torch devices, and paths are converted to strings.

    Raises:
        UsageError: If the dtype, quantization, load format, or engine is unknown, or the number of threads is invalid.
    """

    PANEL: ClassVar[str] = "Model"
    # Groups of options for front ends, which name the options that they accept.
    NAME: ClassVar[tuple[str, ...]] = ("model", "revision")
    DEVICE: ClassVar[tuple[str, ...]] = ("device", "dtype")
    QUANTIZED: ClassVar[tuple[str, ...]] = ("quantize", "store_quantized")
    RUNNING: ClassVar[tuple[str, ...]] = ("engine", "offline", "threads")
    WEIGHTS: ClassVar[tuple[str, ...]] = (*NAME, *DEVICE, *QUANTIZED, *RUNNING)
    LOADING: ClassVar[tuple[str, ...]] = (*NAME, *DEVICE, *QUANTIZED, "load_format", *RUNNING)

    model: str | PathLike[str] = option(
        "demo",
        "Hub id, local folder, GGUF file, ollama:NAME, or a bundled tiny model: demo, demo-scenes. The command models lists those "
        "on this machine.",
        "-m",
        "--model",
        env="EVOPRUNE_MODEL",
        accept=_model_name,
        convert=os.fspath,
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    device: str = option(
        "auto",
        "auto: CUDA if available, otherwise the CPU.",
        words=("auto", "cpu", "cuda[:N]"),
        also="torch.device",
        changes_answers=False,
        accept=_device_name,
    )
    dtype: Literal["auto", DtypeName] = option(
        "auto",
        "auto: bf16 if the hardware supports it; demo models use fp32.",
        also="torch.dtype",
        accept=_short_dtype,
    )
    quantize: Quantize = option(
        "auto",
        "Quantize the model on a CPU: faster, smaller and less exact. auto: int8 for a large model, if no dtype is given; "
        "otherwise none. int8: 8-bit weights and products in the tower and the language model. "
        "int4: the same, with 4-bit weights in the language model.",
    )
    store_quantized: bool | None = option(
        None,
        "Keep the quantized weights on disk (at most 32 GiB) for later runs; default: if the model is large and the disk has room.",
        "--store-quantized/--no-store",
        in_python="Keep the quantized weights on disk (at most 32 GiB) for later runs. None: if the model is large and the disk "
        "has room.",
        changes_answers=False,
    )
    load_format: LoadFormat = option(
        "auto",
        "auto loads the weights. dummy makes random weights: times and counts are valid, answers are meaningless. dummy needs a "
        "folder with config.json and a tokenizer.",
    )
    engine: Engine = option(
        AUTO,
        "Code that runs the language model: native is evoprune's, transformers is Hugging Face's, for quantized checkpoints "
        "and mixtures of experts on GPUs. auto: native if it supports the model.",
    )
    offline: bool = option(False, "Never use the network.", changes_answers=False)
    threads: int | Literal["auto"] | None = option(
        None,
        "CPU threads; auto: depends on the model's size, at most the cores that this process may use, or OMP_NUM_THREADS.",
        in_python="CPU threads; None keeps torch's number, auto depends on the model's size.",
        words=(AUTO_THREADS, "N"),
        env="EVOPRUNE_THREADS",
        unless_typed=AUTO_THREADS,
        changes_answers=False,
        convert=_parse_threads,
    )

    def __post_init__(self):
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(f"unknown load format {self.load_format!r}", f"use {' or '.join(LOAD_FORMATS)}")
        if self.engine not in ENGINES:
            hint = f"use {', '.join(ENGINES)}"
            if self.engine == "ray":
                hint = "to run on a Ray cluster: batch --on ray"
            raise UsageError(f"unknown engine {self.engine!r}", hint)
        if self.dtype not in DTYPE_NAMES:
            raise UsageError(f"unknown dtype {self.dtype!r}", f"use {', '.join(DTYPE_NAMES)}")
        if self.quantize not in QUANTIZE:
            raise UsageError(f"unknown quantization {self.quantize!r}", f"use {', '.join(QUANTIZE)}")
        # `describe` refuses other models that "auto" doesn't quantize.
        never = self.quantize == "none" or (self.quantize == "auto" and (self.dtype != "auto" or self.model in DEMOS))
        if self.store_quantized and never:
            raise UsageError("store_quantized needs quantize", "add --quantize int8 or int4")

    @staticmethod
    def on_this_machine() -> "list[LocalModel]":
        """Return the models on this machine, first those that run. Warns of folders in EVOPRUNE_MODELS that can't be read."""
        from evoprune.session.local_models import local_models

        return local_models()

    @property
    def folder(self) -> Path:
        """The folder of a bundled or local model. For a hub ID, this path usually doesn't exist.

        For GGUF files, it contains small files made from them (see `gguf_folder`).

        Raises:
            ModelError: If the model name means GGUF files that evoprune cannot use.
        """
        if self.model in DEMOS:
            return DEMOS[self.model].folder
        return gguf_folder(self.model) or Path(os.path.expanduser(self.model))

    def local_folder(self) -> Path | None:
        """Return the folder of a bundled or local model, or None if the model name is a hub ID.

        Raises:
            ModelError: If the model name is neither a usable folder nor a hub ID.
            UsageError: If a revision is specified for a local model.
        """
        name = self.model
        revision = self.revision
        if not name.strip():
            raise ModelError("the model name is empty", MODEL_HINT)
        folder = self.folder
        if name in DEMOS and not (folder / "config.json").is_file():
            hint = "reinstall evoprune, or use another model"
            raise ModelError(f"the bundled {name} model is missing: {folder}", hint)
        if os.path.isdir(folder):  # unlike Path.is_dir, this never raises an error
            if revision is not None:
                raise UsageError(f"{name} is a local model and has no revision {revision!r}", "leave the revision out")
            if not is_text(os.path.abspath(folder)):  # required by the libraries for tokenizers and weights
                hint = "rename it, or set LC_ALL to a UTF-8 locale, such as C.UTF-8"
                raise ModelError(f"the path {folder} is not valid text", hint)
            return folder
        if os.path.exists(folder):
            raise ModelError(
                f"{name} is a file, not a model",
                "give a GGUF file, or the folder that contains config.json and the weights",
            )
        if name.lower().endswith(".gguf"):
            raise ModelError(f"no such file: {shown(name)}", missing_hint(name, "check the path"))
        if not is_id(name):
            from evoprune.session.hub import near_hint
            from evoprune.session.local_models import here_hint, ollama_hint

            meant = near_hint(name) or did_you_mean(name, DEMOS)
            hint = missing_hint(name, f"{ollama_hint(name)}{here_hint()}a hub id is org/name; {MODEL_HINT}", meant)
            raise ModelError(f"{shown(name)!r} is neither a folder here nor a hub id", hint)
        return None

    @property
    def cores(self) -> int | None:
        """Maximum number of cores for reading videos, or None for all cores available to this process."""
        return self.threads if isinstance(self.threads, int) else None

    def state(self) -> dict[str, Any] | None:
        """Return the state (`file_state`) of a local model's weights, settings, tokenizer, and adapters.

        Returns None if the folder contains none of these files.
        """
        folder = self.folder
        files = gguf_files(folder) or [file for pattern in MODEL_FILES for file in folder.glob(pattern)]
        return file_state(files)


def _accepted_budget(given: Any) -> Any:
    """Return a budget as it is recorded. Values of other types are left to the type check."""
    if given is None or isinstance(given, str | Real):
        return Budget.parse(given, auto=True).recorded
    return given


@converted
@dataclass(frozen=True)
class PruneOptions:
    """Options for pruning visual tokens. Percentages are converted to numbers.

    Raises:
        UsageError: If the budget is invalid or the method is unknown.
    """

    PANEL: ClassVar[str] = "Pruning"
    PRUNING: ClassVar[tuple[str, ...]] = ("budget", "method", "seed")  # named by front ends that prune

    # The numbers in the help text come from results/frontier.md. They are the fraction of accuracy retained by the worst demo
    # model, and the time-to-first-token speedup over Hugging Face for a model with 3B dimensions in fp32.
    budget: Budget.Given = option(
        Budget.DEFAULT,
        "Share of visual tokens kept: 0.1, 10%, or high (0.4; accuracy 98.2%, 2.0x as fast), balanced (0.25; 97.1%, 2.7x), "
        "fast (0.1; 95.8%, 4.4x). "
        "Accuracy: share that the worst of the demo models keeps. Speed: of the first token, compared with Hugging Face at 3B "
        "dimensions. Presets keep more of a still: 0.7, 0.5 and 0.3. full prunes nothing; auto depends on the content, "
        "auto:inflection on the method's scores.",
        "-b",
        "--budget",
        env="EVOPRUNE_BUDGET",
        accept=_accepted_budget,
    )
    method: str = option(
        MethodText.DEFAULT,
        "Pruning method (see evoprune methods). NAME:SETTING=VALUE changes its settings; "
        "reuse+NAME encodes only changed units; ipcv+NAME computes a third of the rows in most layers; NAME+fastv also drops "
        "tokens inside the language model.",
    )
    seed: int = option(
        0,
        "Random seed.",
        metavar="<int>",
        least=0,
        most=2**63 - 1,
    )

    def __post_init__(self):
        MethodText(self.method).check()

    def config(self) -> "PruneConfig":
        """Convert these options to a `PruneConfig`. Imports torch.

        Raises:
            UsageError: See `PruneConfig.of`.
        """
        from evoprune.methods import PruneConfig

        return PruneConfig.of(Budget.of(self.budget), self.method, self.seed)

    @property
    def resizes(self) -> bool:
        """Whether the method may downscale inputs, so the frame size depends on the method's plan. Does not import torch."""
        return MethodText(self.method).may_resize


@converted
@dataclass(frozen=True)
class StreamOptions:
    """Options for watching a live stream, which set the window length and the size of the memory.

    Raises:
        UsageError: If a time span or a number of tokens isn't greater than 0.
    """

    PANEL: ClassVar[str] = "Stream"
    WATCHING: ClassVar[tuple[str, ...]] = ("window_s", "memory_s", "memory_tokens")  # named by front ends for streams

    window_s: float = option(
        8.0,
        "Length of the windows that the stream is encoded in. Each has a fixed number of tokens.",
        "--window",
        in_python="Length of the windows that the stream is encoded in, in seconds. Each has a fixed number of tokens.",
        metavar="TIME",
        typed=str,
        unless_typed="8s",
        parse=parse_time,
    )
    memory_s: float = option(
        600.0,
        "Stream time whose tokens fit into memory. When memory is full, the oldest windows are thinned.",
        "--memory",
        in_python="Seconds of the stream whose tokens fit into memory. When memory is full, the oldest windows are thinned.",
        metavar="TIME",
        typed=str,
        unless_typed="10m",
        parse=parse_time,
    )
    memory_tokens: int | None = option(None, "Size of the memory in tokens, instead of --memory.")

    def __post_init__(self):
        for name in ("window_s", "memory_s", "memory_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value:g}, not above 0", "give a number above 0")


@converted
@dataclass(frozen=True)
class FindOptions:
    """Options for finding the moments of a video that match a query.

    Raises:
        UsageError: If a value is out of range, or the word for yes or no is empty.
    """

    PANEL: ClassVar[str] = "Finding"
    # Named by front ends that find moments.
    FINDING: ClassVar[tuple[str, ...]] = ("top", "min_score", "segment_s", "total_tokens", "prompt", "yes", "no")

    top: int = option(10, "Maximum number of moments per query, best first.")
    min_score: float | None = option(
        None,
        "Minimum score of a moment, from 0 to 1; default: depends on the scores of all segments, at least 0.96.",
    )
    segment_s: float | None = option(
        None,
        "Length of the segments to ask about, such as 8s; default: 8 s, longer if --total-tokens is too small for that.",
        "--segment",
        in_python="Length of the segments to ask about, in seconds; None: 8 s, longer if total_tokens is too small for that.",
        metavar="TIME",
        typed=str,
        parse=lambda text: parse_time(text) if text else None,
    )
    total_tokens: int = option(
        2**18,
        "Maximum number of visual tokens of a whole video before pruning: long videos are sampled at a lower "
        "rate. Ignored with --fps.",
    )
    prompt: str | None = option(
        None,
        "The question about a segment, with {} for the query; default: an English question, or one that the demo model knows. A "
        "query that ends with ? is asked unchanged.",
        metavar="TEXT",
    )
    yes: str = option("yes", "How an answer begins if the segment shows the query.", metavar="WORD")
    no: str = option("no", "How an answer begins if the segment does not show it.", metavar="WORD")

    def __post_init__(self):
        for name in ("top", "total_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, not 1 or more", "give 1 or more")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise UsageError(f"min_score is {self.min_score:g}, not from 0 to 1", "give a number from 0 to 1")
        if self.segment_s is not None and not 0 < self.segment_s < math.inf:
            raise UsageError(f"segment_s is {self.segment_s:g}, not above 0", "give a number above 0")
        if self.prompt is not None and "{}" not in self.prompt:
            raise UsageError(
                f"prompt is {self.prompt!r}, without {{}} for the query",
                'put {} in place of the query: "Can you see {}?"',
            )
        if not self.yes.strip() or not self.no.strip():
            raise UsageError("the word for yes or no is empty", "for example --yes yes --no no")

    @staticmethod
    def check_queries(queries: Sequence[str]) -> list[str]:
        """Return the queries as a list.

        Raises:
            UsageError: There are no queries, or a query is not a string, is empty, or is duplicated.
        """
        if not isinstance(queries, Sequence):
            raise UsageError(f"the query is {brief(queries)}, not a string", 'for example "a red star"')
        if not queries:
            raise UsageError("no query", 'say what to find, such as "a red star"')
        for query in queries:
            if not isinstance(query, str):
                raise UsageError(f"the query is {brief(query)}, not a string", 'for example "a red star"')
            if not query.strip():
                raise UsageError("the query is empty", 'say what to find, such as "a red star"')
            if queries.count(query) > 1:
                raise UsageError(f"the query {query!r} appears twice", "give each query once")
        return list(queries)

    @staticmethod
    def check_video(info: Video, name: str) -> None:
        """Raise VideoError if the input is an image."""
        if info.is_picture:
            raise VideoError(f"{name} is an image, which has no moments", "give a video; ask asks about an image")


@dataclass(frozen=True)
class PipelineOptions:
    """All options that affect an answer. The answer also depends on the video, the question, and the machine."""

    model: ModelOptions = field(default_factory=ModelOptions)
    pruning: PruneOptions = field(default_factory=PruneOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    find: FindOptions = field(default_factory=FindOptions)

    KINDS: ClassVar[tuple[type, ...]] = (
        ModelOptions, PruneOptions, SamplingOptions, GenerationOptions, StreamOptions, FindOptions,
    )  # fmt: skip

    def __post_init__(self):
        if self.sampling.speech != "none":
            from evoprune.session.speech import check_offline

            check_offline(self.sampling.speech, self.model.offline)

    @classmethod
    def of(cls, **options) -> Self:
        """Create all option groups from a flat set of keyword arguments.

        Raises:
            UsageError: If a value is invalid.
            TypeError: If an option is unknown.
        """
        return cls(*from_keywords(options, *cls.KINDS))

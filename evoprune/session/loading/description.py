"""Describe a model before reading its weights: locate its folder, read its small files, and pick the device to run it on.

`describe` collects the results in a `ModelDescription`, which is enough to plan inputs and is later used to load the model. This
module does not import torch.
"""

import json
import os
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.backend import DeviceName, Host
from evoprune.bundled import DEMOS, Demo
from evoprune.errors import EvopruneWarning, ModelError, UsageError, first_line
from evoprune.methods import TowerShape
from evoprune.model import FAMILIES, Config, Unsupported, VisionConfig
from evoprune.session.options import AUTO_THREADS, NATIVE, TRANSFORMERS, ModelOptions, PruneOptions
from evoprune.session.published import BUNDLED_CONFIGS, MODEL_HINT, SMALL_FILES, cached_id
from evoprune.untrusted import TEXT, check_fetched, checked, read_object, section
from evoprune.util import counted, shorten
from evoprune.video import InputLimits, Plan, SamplingOptions, Video, choose_decoder

if TYPE_CHECKING:
    from evoprune.methods import MethodChain, PruneConfig

# Number of weights per thread with "auto". The demo model has 4 million weights, and the smallest Qwen has 2 billion.
WEIGHTS_PER_THREAD = 32_000_000
LARGE_MODEL = 2**28  # minimum number of parameters of a large model; see `ModelDescription.large`
ADAPTER = "adapter_config.json"
MERGE_HINT = "merge it into its base model (PEFT: merge_and_unload) and save the result"
# As in transformers, these settings select bitsandbytes even if config.json specifies a different quantization method.
BITSANDBYTES_SETTINGS = "load_in_8bit", "load_in_4bit"
CONFIG_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}  # short names of the dtypes in config.json
NORMALIZATION = ("image_mean", "image_std")
# Fixed processor settings. evoprune issues a warning if a model's processor has a different, non-null value.
FIXED_SETTINGS = {
    "do_sample_frames": True, "num_frames": None, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False, "do_pad": False, "resample": 3,
}  # fmt: skip


@dataclass(frozen=True)
class ModelDescription:
    """Everything known about a model before its weights are read. Use `describe` to create one."""

    options: ModelOptions  # model name and loading options
    device: str  # such as "cpu" or "cuda:1"; never "auto"
    folder: Path | None  # folder with the model's files, or None for a bundled config
    commit: str | None  # commit of a hub model, or None for a local model
    unreachable: str | None  # reason why no more files can be downloaded from the hub, or None if they can
    config: Config
    quantization: str | None  # quantization method of the checkpoint, such as "awq", or None
    stored_dtype: str | None  # dtype of the weights in the files ("bf16", "fp16" or "fp32"), or None if unknown
    limits: dict[str, InputLimits]  # input limits by input type ("video" or "picture")
    state: dict[str, Any] | None  # identifies the model's files: the commit, or `ModelOptions.state` for a folder

    @property
    def id(self) -> str:
        return self.options.model

    @property
    def random(self) -> bool:
        """Whether the weights are random instead of being loaded from files."""
        return self.options.load_format == "dummy"

    @cached_property
    def demo(self) -> Demo | None:
        """The matching bundled `Demo`, or None if this is not a demo model or has random weights."""
        return None if self.random else Demo.of(self.folder)

    @cached_property
    def dtype(self) -> str:
        """The dtype to load the weights in.

        "auto" means bf16 on hardware with bf16 matmul, and fp32 elsewhere. Demo models default to fp32 on all hardware. This
        property imports torch unless the options specify the dtype.
        """
        if self.options.dtype != "auto":
            return self.options.dtype
        if Demo.of(self.folder):
            return "fp32"

        from evoprune.backend import Device

        return Device(self.device).default_dtype

    @cached_property
    def quantize(self) -> str:
        """The quantization that evoprune applies to the weights: "int8", "int4", or "none".

        "auto" means int8 for a large model on a CPU, unless the user specifies a dtype: an answer takes half as long as in bf16 or
        fp32, and the weights take half of the memory or less. Quantizing the demo models to int8 costs less than half a percentage
        point of accuracy (results/int8.md). Resolving "auto" imports torch.
        """
        if self.options.quantize != "auto":
            return self.options.quantize
        if self.options.dtype != "auto" or not self.large or not self.can_be_quantized:
            return "none"
        import torch

        from evoprune.backend import Quantization

        return "int8" if "int8" in Quantization.kinds(torch.device(self.device)) else "none"

    @cached_property
    def large(self) -> bool:
        """Whether the model is large enough that speed and memory use matter more than the precision of fp32."""
        from evoprune.model import Cost

        return Cost(self.config).parameters >= LARGE_MODEL

    @property
    def max_visual_tokens(self) -> int:
        """The default maximum number of visual tokens before pruning.

        Some devices lower this limit, except for the tiny demo models.
        """
        if self.demo:
            return SamplingOptions.MAX_VISUAL_TOKENS
        return min(SamplingOptions.MAX_VISUAL_TOKENS, DeviceName(self.device).visual_token_limit)

    @property
    def tower(self) -> TowerShape:
        return TowerShape.of(self.config.vision_config, self.device)

    @property
    def native(self) -> bool:
        """Whether evoprune's own code runs the language model, instead of transformers."""
        return self.can_be_native and self.options.engine != TRANSFORMERS

    @property
    def to_be_native(self) -> str:
        """Error message hint explaining how to run the language model in evoprune instead of transformers."""
        if self.can_be_native:
            return "leave the engine out"
        return "use a checkpoint that evoprune runs itself, such as Qwen/Qwen2.5-VL-3B-Instruct"

    @property
    def can_be_native(self) -> bool:
        """Whether evoprune's own code supports the language model, so transformers isn't needed."""
        traits = self.config.vision_config.traits
        native = traits.native or (traits.native_on_host and DeviceName(self.device).runs_experts)
        return native and self.quantization is None and self.config.text_config.sliding_window is None

    @property
    def recurrent(self) -> bool:
        """Whether some layers are Gated DeltaNets, whose state includes all tokens that they have read."""
        return bool(self.config.text_config.linear_layers)

    @property
    def can_be_quantized(self) -> bool:
        """Whether evoprune can quantize the weights. False for Qwen4-Exp and already quantized checkpoints."""
        return self.quantization is None and self.config.text_config.qwen4 is None

    def check_method(self, method: "MethodChain") -> None:
        """Check that this model's language model supports a pruning method.

        Raises:
            UsageError: If the language model doesn't support the method, for example because the method has no recipe for this
                number of layers, or needs attention in every layer.
        """
        text = self.config.text_config
        method.language_work(text.num_hidden_layers, 64, 0.25, text.linear_layers)
        if method.language and not self.native:
            works = method.before.name if method.before.members else "evoprune"
            problem = f"method {method.name} acts inside the language model, which transformers runs here"
            raise UsageError(problem, f"use {works}, or {self.to_be_native}")

    def check_streams(self, method: "MethodChain") -> None:
        """Check that this model can watch a live stream using a given pruning method.

        Raises:
            UsageError: If the method cannot prune a stream, or transformers runs the language model.
        """
        if method.reads_question or method.language or method.input:
            hint = "use one that acts inside the encoder or selects tokens without the question, such as evoprune"
            raise UsageError(f"method {method.name} cannot prune a stream", hint)
        if not self.native:
            problem = f"the language model of {self.id} is run by transformers, which cannot forget the oldest tokens"
            raise UsageError(problem, self.to_be_native)

    def plan(
        self,
        info: Video,
        sampling: SamplingOptions,
        pruning: "PruneConfig | PruneOptions | None" = None,
        name: str | None = None,
    ) -> Plan:
        """Plan which video frames to sample, or which size to resize an image to, and how to encode the result.

        The plan is final, even though the model hasn't been loaded yet. Torch is imported only if the pruning method may downscale
        inputs.

        Args:
            info: The input's metadata.
            sampling: Options for sampling frames. If `max_visual_tokens` is None, the model's default applies.
            pruning: The pruning settings, or None for no pruning. If the method may downscale inputs, it determines the frame size.
            name: The input's name in reports, which defaults to its path.

        Raises:
            VideoError: If the duration is unknown, the time span is empty, or the input cannot be resized to a valid shape.
            UsageError: If a time span is specified for an image, or the decoder is unknown or not installed.
        """
        limits = self.limits[info.kind]
        decoder = choose_decoder(sampling.decoder, info)
        if sampling.max_visual_tokens is None:
            sampling = replace(sampling, max_visual_tokens=self.max_visual_tokens)
        plan = replace(
            Plan.of(info, limits, sampling),
            tower=self.tower,
            pruning=pruning,
            name=name or info.path,
            decoder=decoder,
            seek=sampling.seek,
        )
        if pruning is None or not pruning.resizes:
            return plan
        return replace(plan.shrunk(plan.encoder.grid, limits), unshrunk=plan)

    def use_threads(self) -> None:
        """Set the number of torch threads in this process, if the options specify one. Imports torch.

        With "auto", the number of threads depends on the model size and the number of available cores, unless OMP_NUM_THREADS is
        set. A warning is issued for more threads than cores.
        """
        import torch

        from evoprune.model import Cost

        wanted = self.options.threads
        if wanted == AUTO_THREADS and not os.environ.get("OMP_NUM_THREADS"):
            torch.set_num_threads(
                max(1, min(Host().available_cores(), Cost(self.config).parameters // WEIGHTS_PER_THREAD))
            )
        elif isinstance(wanted, int):
            cores = Host().available_cores()
            if wanted > cores:
                message = (
                    f"{wanted} threads on {counted(cores, 'core')} are usually slower than {counted(cores, 'thread')}"
                )
                warnings.warn(message, EvopruneWarning, stacklevel=2)
            torch.set_num_threads(wanted)

    def download_small_files(self) -> None:
        """Download a hub model's settings, tokenizer, and chat template.

        Raises:
            ModelError: See `hub.fetch`.
        """
        self.download(*SMALL_FILES)

    def download(self, *patterns: str) -> None:
        """Download additional files of a hub model from the same commit. For local models, this is a no-op.

        Raises:
            ModelError: See `hub.fetch`.
        """
        if self.commit is not None:
            from evoprune.session.hub import fetch

            revision = self.commit if self.unreachable is None else self.options.revision
            fetch(self.id, revision, patterns, self.unreachable)


def describe(options: ModelOptions, *, local: bool = False) -> ModelDescription:
    """Describe a model without reading its weights. Does not import torch.

    Missing small files are downloaded from the hub. If the model's processor has settings that evoprune ignores, a warning lists
    them.

    Args:
        local: Whether to use only local files. If a published model hasn't been downloaded, a bundled copy of its config.json is
            used instead, but its weights cannot be loaded.

    Raises:
        ModelError: If the model is missing, unsupported, or damaged, if the hub cannot be reached, or if the requested engine
            cannot run the model.
        UsageError: If a revision is specified for a model without revisions, or the weights don't support the requested
            quantization.
    """
    folder, commit, unreachable = _locate(options, local)
    path = BUNDLED_CONFIGS[options.model] if folder is None else folder / "config.json"
    if not os.path.isfile(path):
        raise _no_config(path.parent)
    content = read_json(path)
    config = _config(path, content)
    texts = content, section(content, "text_config")  # some models specify a dtype only for the language model
    dtype = next((name for text in texts if (name := text.get("dtype") or text.get("torch_dtype"))), None)
    description = ModelDescription(
        options=options,
        device=DeviceName(options.device).resolve(),
        folder=folder,
        commit=commit,
        unreachable=unreachable,
        config=config,
        quantization=_quantization(path, content),
        stored_dtype=CONFIG_DTYPES.get(str(dtype)),
        limits=_input_limits(folder, config.vision_config),
        state=options.state() if commit is None else {"commit": commit},
    )
    _check_engine(description)
    if folder is not None:
        _warn_of_unused(folder)
    return description


def _locate(options: ModelOptions, local: bool) -> tuple[Path | None, str | None, str | None]:
    """Find a model in a local folder, on the hub, or among the bundled configs. See `describe` for the arguments and errors.

    Returns:
        A tuple of the model's folder (None for a bundled config), its commit (None unless it comes from the hub), and the reason
        why no more files can be downloaded from the hub (None if they can be downloaded or aren't needed).
    """
    name = options.model
    revision = options.revision
    random = options.load_format == "dummy"
    bundled = name in BUNDLED_CONFIGS and not os.path.isdir(name)
    if random and bundled:
        if revision is not None:
            raise UsageError(f"the bundled config of {name} has no revision {revision!r}", "leave the revision out")
        return None, None, None
    if folder := options.local_folder():
        return folder, None, None
    if random:
        hint = f"random weights need a local folder, {', '.join(DEMOS)}, or {' and '.join(BUNDLED_CONFIGS)}"
        raise ModelError(f"no bundled config for {name}", hint)
    from evoprune.session import hub

    if not local:
        unreachable = hub.reach(name, revision, options.offline)
        folder = hub.fetch(name, revision, hub.SETTINGS, unreachable)
        return folder, folder.name, unreachable
    folder = hub.cached_folder(name, revision)
    if folder or (bundled and revision is None):
        return folder, None, None
    hint = hub.name_hint(name)
    if not hub.near_hint(name) and (wanted := hub.downloadable_id(name)):
        command = f"hf download {wanted} config.json preprocessor_config.json{hub.revision_flag(revision)}"
        hint += f"its small config files are enough: {command}"
    hint = hint.strip(" ;")
    raise ModelError(f"{name} is not on this machine, and inspect does not use the network", hint)


def _no_config(folder: Path) -> ModelError:
    """Return an error for a model folder that has no config.json.

    The error message mentions whether the folder contains an adapter or belongs to the local hub cache.
    """
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        what = "an adapter"
        if isinstance(base, str) and base:
            what += f" of {base[:100]}"
        return ModelError(f"{folder} contains {what}, not a model", MERGE_HINT)
    cached = next((path for path in (folder, folder.parent) if path.name.startswith("models--")), None)
    if cached is not None and (snapshots := sorted(cached.glob("snapshots/*/config.json"))):
        hint = f"use {cached_id(cached)}, or {snapshots[-1].parent}"
        return ModelError(f"{folder} is a folder in the hub's cache without a config.json", hint)
    return ModelError(
        f"{folder} contains no config.json", "give a folder in the hub's file layout, or a hub id org/name"
    )


def _config(path: Path, content: dict) -> Config:
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = " or ".join(FAMILIES)
        raise ModelError(f"{path.parent} is a model of type {reprlib.repr(kind)}, not {known}", MODEL_HINT)
    with valid(f"{path} is not a valid {kind} config"):
        try:
            return Config.parse(content)
        except Unsupported as reason:
            hint = MODEL_HINT
            if "yarn" in str(reason):
                hint = f"use a config.json without yarn; {hint}"
            raise ModelError(f"evoprune cannot run {path.parent}: {reason}", hint) from reason


def _quantization(path: Path, content: dict) -> str | None:
    """Return the quantization method specified in a config.json, or None for an unquantized checkpoint."""
    with valid(f"{path} is damaged"):
        parts = content, section(content, "text_config")
        settings = next((given for part in parts if (given := section(part, "quantization_config"))), None)
        if settings is None:
            return None
        if any(settings.get(name) is True for name in BITSANDBYTES_SETTINGS):
            return "bitsandbytes"
        if (method := settings.get("quant_method")) is not None:
            return TEXT.check(method, "quant_method")
    problem = f"the quantization_config in {path} does not name its method (quant_method)"
    raise ModelError(problem, "use a checkpoint that names it, or add it there, such as gptq")


def _check_engine(model: ModelDescription) -> None:
    """Check that a model supports the requested engine and quantization.

    Raises:
        ModelError: If the engine cannot run the language model.
        UsageError: If the weights cannot be quantized.
    """
    quantized = model.quantization and f"is quantized ({model.quantization})"
    options = model.options
    if options.engine == NATIVE and not model.native:
        why = quantized or "has layers that evoprune does not run itself"
        raise ModelError(f"{model.id} {why}", "leave the engine out: auto uses transformers")
    if options.quantize not in ("auto", "none") and not model.can_be_quantized:
        why = quantized or "has n-gram embeddings and indexers (Qwen4-Exp)"
        problem = f"quantize {options.quantize} does not work with {model.id}, which {why}"
        raise UsageError(problem, "leave quantize out, or use a checkpoint that is already quantized")
    if options.store_quantized and model.quantize == "none":
        hint = "leave out --store-quantized"
        if model.can_be_quantized:
            hint += ", or add --quantize int8 or int4"
        raise UsageError(f"there is nothing to store: quantize auto does not quantize {model.id} here", hint)


@contextmanager
def valid(problem: str) -> Iterator[None]:
    """Return a context manager that converts OSError and ValueError, raised for unreadable or invalid files, to `ModelError`."""
    try:
        yield
    except (OSError, ValueError) as reason:
        raise ModelError(f"{problem}: {first_line(reason)}", "download the file again") from reason


def read_json(path: Path) -> dict:
    """Read a JSON object from a file in a model folder. Return an empty dict if the file doesn't exist."""
    if not os.path.lexists(path):  # a dangling link raises an error instead
        return {}
    with valid(f"{path} cannot be read"):
        check_fetched(path)
        return read_object(path)


def _input_limits(folder: Path | None, vision_config: VisionConfig) -> dict[str, InputLimits]:
    """Return the input limits for videos and images, based on the processor settings and the patch sizes in config.json.

    `preprocessor_config.json` belongs to the image processor, so only its mean and standard deviation apply to videos. Its limit of
    12.8 million pixels is intended for a single image. Qwen's own code limits video frames to far fewer pixels, so those lower
    limits are the defaults for videos.
    """
    traits = vision_config.traits
    limits = InputLimits(
        **traits.video,
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
    )
    if folder is None:
        return {"video": limits, "picture": replace(limits, **traits.picture)}
    picture_fields = (*NORMALIZATION, "min_pixels", "max_pixels")
    joint = folder / "processor_config.json"  # transformers 5 saves both processors' settings here
    video = _limits(joint, "video_processor") or _limits(folder / "video_preprocessor_config.json")
    image = _limits(joint, "image_processor", picture_fields)
    image = image or _limits(folder / "preprocessor_config.json", only=picture_fields)
    normal = {name: image[name] for name in NORMALIZATION if name in image}
    return {"video": replace(limits, **(normal | video)), "picture": replace(limits, **(dict(traits.unstated) | image))}


def _warn_of_unused(folder: Path) -> None:
    """Issue a single warning listing all processor settings that evoprune ignores."""
    joint = read_json(folder / "processor_config.json")
    unused = {}
    for inner, file in (
        ("video_processor", "video_preprocessor_config.json"),
        ("image_processor", "preprocessor_config.json"),
    ):
        content = section(joint, inner) or read_json(folder / file)
        usual = FIXED_SETTINGS
        if content.get("video_processor_type") == "Qwen2VLVideoProcessor":
            # This class defaults to False, because callers are expected to sample the frames themselves.
            usual = FIXED_SETTINGS | {"do_sample_frames": False}
        unused |= {
            name: content[name]
            for name, value in usual.items()
            if content.get(name) not in (None, value, FIXED_SETTINGS[name])
        }
    if unused:
        named = ", ".join(f"{name}={shorten(json.dumps(value), 40)}" for name, value in unused.items())
        warnings.warn(f"{folder}: ignored processor settings: {named}", EvopruneWarning, stacklevel=2)


def _limits(path: Path, inner: str | None = None, only: tuple[str, ...] | None = None) -> dict:
    """Read `InputLimits` fields from a processor's settings, omitting any missing fields.

    Args:
        path: The JSON file.
        inner: Key of the nested object containing the settings, or None if they are at the top level.
        only: Names of the fields to read, or None for all fields.
    """
    content = read_json(path)
    with valid(f"{path} is damaged"):
        if inner:
            content = section(content, inner)
        size = section(content, "size")
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            content = content | {name: content.get(name) or size.get(edge)}
        if only:
            content = {name: content.get(name) for name in only}
        return checked(InputLimits, content, inner or "")

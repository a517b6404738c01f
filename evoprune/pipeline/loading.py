"""Loading a model: the bundled demo, a folder, a hub id, or true dimensions with random weights for benchmarks.

What can be wrong with a model is found before its weights are read, as far as it can be, and each has an error with a
hint. Only safetensors are read, and no code that comes with a model is ever run.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evoprune.errors import ModelError, OutOfMemory, UsageError, first_line, is_out_of_memory
from evoprune.language.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from evoprune.model.config import MODEL_TYPES, Config, VisionConfig, parse_config
from evoprune.model.linear import pack as pack_layers
from evoprune.model.linear import weights_bytes
from evoprune.model.machine import available_memory
from evoprune.model.memory import shortage
from evoprune.model.quantize import check as check_quantize
from evoprune.model.quantize import quantize as quantize_layers
from evoprune.model.weights import QwenVL, empty, name_in_memory, shared
from evoprune.pipeline import hub
from evoprune.pipeline.choices import LOAD_FORMATS
from evoprune.pipeline.hub import MODEL_HINT
from evoprune.pipeline.random_weights import random_model
from evoprune.report import ModelFacts
from evoprune.video.plan import VideoLimits

PACKAGE = Path(__file__).parents[1]
DEMO_FOLDER = PACKAGE / "demo" / "weights"
# The published dimensions (config.json of the two repositories), so that benchmarks need no network.
BUNDLED_CONFIGS = {f"Qwen/{path.stem}": path for path in sorted((PACKAGE / "model" / "configs").glob("*.json"))}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
IN_FILE = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # as safetensors call them


@dataclass
class LoadedModel:
    """A model that is ready to answer.

    Attributes:
        model: the weights, on `device` in `dtype`, and their config.
        tokenizer: with a chat template. None only where random weights have no tokenizer files beside them; their answers
            would mean nothing anyway.
        video: see `plan.VideoLimits`.
        eos_ids: token ids that end an answer.
        id: "demo", or the folder or hub id as it was asked for.
        revision: commit on the hub, None for anything local.
        dtype: "bf16", "fp16" or "fp32".
        device: torch's name of the device.
        is_demo: whether this is the bundled demo model with its trained weights.
        load_format: "auto" or "dummy" (random weights).
        quantize: "none", "int8" or "int4".
        weights_bytes: size of all weights as they are held, tied ones counted once.
        fingerprint: changes when the weights do; None where that cannot be told.
    """

    model: QwenVL
    tokenizer: Tokenizer | None
    video: VideoLimits
    eos_ids: tuple[int, ...]
    id: str
    revision: str | None
    dtype: str
    device: str
    is_demo: bool
    load_format: str
    quantize: str
    weights_bytes: int
    fingerprint: str | None = None

    def facts(self) -> ModelFacts:
        """What a report says of it."""
        return ModelFacts(self.id, self.revision, self.dtype, self.quantize, self.device, self.load_format)


def load_model(
    name: str = "demo",
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
    load_format: str = "auto",
    quantize: str = "none",
    pack: bool = True,
    to_answer: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Loads a Qwen2.5-VL or Qwen2-VL model.

    Args:
        name: "demo" for the bundled one, a folder in the hub's file layout, or a hub id `org/name`, tried in this order.
        revision: branch, tag or commit of a hub id.
        device: "auto" (CUDA if there is any, else CPU) or any torch device.
        dtype: "bf16", "fp16", "fp32", or "auto": fp32 for the demo; else bf16 on CUDA and on CPUs with bf16 instructions,
            fp32 elsewhere.
        offline: use nothing but the hub's cache on this machine.
        load_format: "auto" reads the weights, "dummy" takes the dimensions from a folder, from "demo" or from a bundled
            config (`BUNDLED_CONFIGS`) and fills in seeded random weights, without any network. `tokenizer` is None where
            there are no tokenizer files, so always with a bundled config.
        quantize: "int8" or "int4" quantises the language model for decoding, see `evoprune.model.quantize`.
        pack: on a CPU, rearrange the weights for speed if there is memory for it; they can then no longer be read.
        to_answer: refuse a model that has no tokenizer, before there are weights.
        progress: called with layers quantised and layers in all.

    Raises:
        UsageError: unknown or absent device, unknown dtype, load format or quantisation, a revision of something local.
        ModelError: the model is missing, of another kind, damaged, or out of reach.
        OutOfMemory: the weights do not fit.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"unknown load format {load_format!r}", f"use {' or '.join(LOAD_FORMATS)}")
    place = pick_device(device)
    check_quantize(quantize, place)
    dummy = load_format == "dummy"
    if dummy and name in BUNDLED_CONFIGS and not Path(name).is_dir():
        if revision is not None:
            raise UsageError(f"the bundled config of {name} has no revision {revision!r}", "leave the revision out")
        folder, commit, config = None, None, _read_config(BUNDLED_CONFIGS[name])
    else:
        folder, commit = _locate(name, revision, offline, files=None if dummy else hub.FILES)
        config = _read_config(folder / "config.json")
    is_demo = folder is not None and folder.resolve() == DEMO_FOLDER.resolve()
    dtype = pick_dtype(dtype, place, is_demo)

    tokenizer = None
    if folder is not None and (has_tokenizer(folder) or not dummy):
        tokenizer = load_tokenizer(folder)
    if to_answer and tokenizer is None:
        raise no_tokenizer(name)
    files = [] if dummy else _weight_files(folder)
    hint = "use a smaller model" + (", or bf16 weights (dtype bf16)" if dtype == "fp32" else "")
    how = (DTYPES[dtype], place)
    if short := shortage(_allocated(config, files, *how), str(place)):
        raise OutOfMemory(f"loading {name} {short} ({place})", hint, stage="load")
    try:
        model = random_model(config, *how) if dummy else _load_weights(config, files, *how)
        make_ready(model, quantize, pack=pack, progress=progress)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"the weights of {name} do not fit into memory ({place})", hint, stage="load") from problem
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        video=_video_limits(folder, config.vision_config),
        eos_ids=_eos_ids(folder, config, tokenizer),
        id=name,
        revision=commit,
        dtype=dtype,
        device=str(place),
        is_demo=is_demo and not dummy,
        load_format=load_format,
        quantize=quantize,
        weights_bytes=weights_bytes(model),
        fingerprint=_fingerprint(name, commit, folder, files),
    )


def _fingerprint(name: str, commit: str | None, folder: Path | None, files: list[Path]) -> str:
    """Of a hub's model its id and commit; of a folder the config and what the weight files are called, hold and when they changed:
    they are too large to be read once more."""
    if commit is not None and files:
        return f"{name}@{commit}"
    config = BUNDLED_CONFIGS[name] if folder is None else folder / "config.json"
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(config.read_bytes() + repr(stats).encode()).hexdigest()


def no_tokenizer(name: str) -> ModelError:
    """The error of whoever wants answers of a model that has dimensions only."""
    hint = "name a folder that holds config.json and a tokenizer; to measure speed without one: evoprune profile"
    return ModelError(f"random weights of {name} have no tokenizer, so no question can be asked", hint)


def make_ready(
    model: QwenVL, quantize: str, *, pack: bool = True, progress: Callable[[int, int], None] | None = None
) -> None:
    """Brings the linear layers of a model into the form in which they are fastest here, in place; arguments as `load_model`.

    Where memory is short, layers stay as they are in the file, and a quantised model reads prompts through its quantised
    layers, which is slower.
    """
    if model.device.type != "cpu":
        return
    linear_bytes = sum(weight.nbytes for weight in model.parameters() if weight.ndim > 1)
    available = available_memory("cpu")
    pack = pack and (available is None or available > 1.1 * linear_bytes)
    if quantize != "none":
        wide = None
        if pack and (available is None or available > 1.7 * linear_bytes):
            wide = shared(model)
            pack_layers(wide.model.language_model)
        quantize_layers(model, quantize, wide, progress)
    if pack:
        pack_layers(model)


def describe_model(
    name: str = "demo", *, revision: str | None = None, offline: bool = False
) -> tuple[Config, VideoLimits]:
    """A model's config and what it wants of a video, without its weights; for a bundled config without the hub.

    Returns:
        The config, and the limits.

    Raises:
        ModelError: as `load_model`.
    """
    if name in BUNDLED_CONFIGS and revision is None and not Path(name).is_dir():
        config = _read_config(BUNDLED_CONFIGS[name])
        return config, _video_limits(None, config.vision_config)
    folder, _ = _locate(name, revision, offline, files=hub.SETTINGS)
    config = _read_config(folder / "config.json")
    return config, _video_limits(folder, config.vision_config)


def has_cuda() -> bool:
    return torch.cuda.is_available()


def pick_device(name: str) -> torch.device:
    """The device that a name stands for; see `load_model`."""
    if name == "auto":
        name = "cuda" if has_cuda() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA asserts
        reason = first_line(problem)
        raise UsageError(
            f"device {name!r} cannot be used here: {reason}", "cpu always works, auto finds a GPU"
        ) from problem
    return device


def pick_dtype(name: str, device: torch.device, is_demo: bool) -> str:
    """The dtype, by its short name, that is meant on a device; see `load_model`."""
    if name == "auto":
        bf16 = device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16())
        return "bf16" if bf16 and not is_demo else "fp32"
    if name not in DTYPES:
        raise UsageError(f"unknown dtype {name!r}", f"use auto, {', '.join(DTYPES)}")
    return name


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; without, bf16 is slower than fp32."""
    if hasattr(torch.cpu, "get_capabilities"):  # not in the oldest torch that is supported
        found = {name for name, value in torch.cpu.get_capabilities().items() if value}
    else:
        cpuinfo = Path("/proc/cpuinfo")
        found = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    return bool(found & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})


def _locate(name: str, revision: str | None, offline: bool, *, files: list[str] | None) -> tuple[Path, str | None]:
    """The folder that holds a model, and its commit if it came from the hub, which is asked for `files` if at all."""
    folder = DEMO_FOLDER if name == "demo" else Path(os.path.expanduser(name))
    if name == "demo" and not (folder / "config.json").is_file():
        raise ModelError(
            f"the bundled demo model is missing: {folder}", "install evoprune again, or name another model"
        )
    if folder.is_dir():
        if revision is not None:
            raise UsageError(f"{name} is a local model and has no revision {revision!r}", "leave the revision out")
        return folder, None
    if folder.exists():
        raise ModelError(f"{name} is a file, not a model", "name the folder that holds config.json and the weights")
    if not hub.is_id(name):
        raise ModelError(f"{name!r} is neither a folder here nor a hub id", f"a hub id is org/name; {MODEL_HINT}")
    if files is None:
        known = " and ".join(BUNDLED_CONFIGS)
        raise ModelError(f"no bundled config for {name}", f"random weights need a local folder, demo, or {known}")
    return hub.download(name, revision, offline, files, check=_read_config)


def _read_config(path: Path) -> Config:
    """The checked config in a config.json."""
    if not path.is_file():
        raise ModelError(
            f"{path.parent} holds no config.json", "name a folder in the hub's file layout, or a hub id org/name"
        )
    content = _json(path)
    if (kind := content.get("model_type")) not in MODEL_TYPES:
        raise ModelError(f"{path.parent} is a model of type {kind!r}, not {' or '.join(MODEL_TYPES)}", MODEL_HINT)
    if "quantization_config" in content:
        raise ModelError(f"{path.parent} holds quantized weights", "take the original checkpoint in bf16, fp16 or fp32")
    try:
        return parse_config(content)
    except (ValueError, TypeError, AttributeError) as problem:  # a text where an object should be has no `get`
        raise ModelError(f"{path} is no valid {kind} config: {first_line(problem)}", "get the file again") from problem


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path} cannot be read: {first_line(problem)}", "get the file again") from problem
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", "get the file again")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, all there and whole as far as their headers tell."""
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    else:
        files = []
    if not files:
        hint = (
            "weights must be model.safetensors, or shards with model.safetensors.index.json; other formats are not read"
        )
        raise ModelError(f"{folder} holds no safetensors weights", hint)
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as problem:
            what = "damaged or incomplete" if file.is_file() else "missing"
            raise ModelError(f"weights file {file} is {what}: {first_line(problem)}", "get the file again") from problem
    return files


def _load_weights(config: Config, files: list[Path], dtype: torch.dtype, device: torch.device) -> QwenVL:
    """Weights stay memory-mapped where they can be used as they lie in the file: on the CPU, in its own dtype. What is packed
    later is copied then."""
    from safetensors import safe_open

    model = empty(config)
    wanted = {name: weight.shape for name, weight in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            for stored in content.keys():  # noqa: SIM118 (not a dict)
                name = name_in_memory(stored)
                if name not in wanted:
                    continue
                weight = content.get_tensor(stored)
                if weight.shape != wanted[name] or not weight.is_floating_point():
                    what = f"{weight.dtype} {list(weight.shape)} where config.json wants {list(wanted[name])}"
                    hint = "config.json and the weights must belong together; get the model again"
                    raise ModelError(
                        f"the weights in {file.parent} cannot be loaded: {stored} is {what}".replace("torch.", ""), hint
                    )
                found[name] = weight.to(device, dtype)
    if missing := sorted(wanted.keys() - found.keys()):
        raise ModelError(
            f"the weights in {files[0].parent} lack {len(missing)} tensors, first {missing[0]}", "get the model again"
        )
    model.load_state_dict(found, strict=False, assign=True)
    model.tie()
    return model.requires_grad_(False)


def _allocated(config: Config, files: list[Path], dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that loading takes: none for weights that stay in their file. Random ones have no file."""
    from safetensors import safe_open

    if files and device.type == "cpu":
        with safe_open(files[0], framework="pt") as content:
            stored = {content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118 (not a dict)
        if stored == {IN_FILE[dtype]}:
            return 0
    return sum(weight.numel() for weight in empty(config).parameters()) * dtype.itemsize


def _eos_ids(folder: Path | None, config: Config, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    path = folder / "generation_config.json" if folder else None
    ids = _json(path).get("eos_token_id") if path and path.is_file() else None
    if ids is None:
        ids = config.text_config.eos_token_id
    if ids is None and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _video_limits(folder: Path | None, vision_config: VisionConfig) -> VideoLimits:
    """Limits from a model folder's processor settings, patch sizes from its config: those are the shape of the weights.

    `preprocessor_config.json` is the image processor's, so only its mean and std are used. It allows 12.8 million pixels,
    meant for a single picture: 16,000 tokens, for every two frames of a video. Qwen's own code limits the frames of a video
    apart and far lower; those limits are the defaults here.
    """
    files = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
    image, video, joint = (_json(folder / name) if folder and (folder / name).is_file() else {} for name in files)
    video = joint.get("video_processor") or video  # where transformers 5 saves it
    image = joint.get("image_processor") or image
    size = video.get("size") or {}
    found = {
        "image_mean": video.get("image_mean") or image.get("image_mean"),
        "image_std": video.get("image_std") or image.get("image_std"),
        "min_pixels": video.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": video.get("max_pixels") or size.get("longest_edge"),
        **{name: video.get(name) for name in ("fps", "min_frames", "max_frames")},
    }
    limits = VideoLimits(
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
    )
    return replace(limits, **{k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if v is not None})

"""What a model's folder says: where it is, its config, its limits for video, ends of answers, files of weights."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

from evoprune.errors import ModelError, UsageError, first_line
from evoprune.language.tokenizer import Tokenizer
from evoprune.model.config import MODEL_TYPES, Config, VisionConfig, parse_config
from evoprune.pipeline.loading import hub
from evoprune.pipeline.loading.hub import MODEL_HINT
from evoprune.video.plan import VideoLimits

PACKAGE = Path(__file__).parents[2]
DEMO_FOLDER = PACKAGE / "demo" / "weights"
# The published dimensions (config.json of the two repositories), so that benchmarks need no network.
BUNDLED_CONFIGS = {f"Qwen/{path.stem}": path for path in sorted((PACKAGE / "model" / "configs").glob("*.json"))}


def describe_model(
    name: str = "demo", *, revision: str | None = None, offline: bool = False
) -> tuple[Config, VideoLimits]:
    """A model's config and its limits for video, without its weights. A bundled config needs no hub.

    Raises:
        ModelError: as `load_model`.
    """
    if name in BUNDLED_CONFIGS and revision is None and not Path(name).is_dir():
        config = read_config(BUNDLED_CONFIGS[name])
        return config, video_limits(None, config.vision_config)
    folder, _ = locate(name, revision, offline, files=hub.SETTINGS)
    config = read_config(folder / "config.json")
    return config, video_limits(folder, config.vision_config)


def locate(name: str, revision: str | None, offline: bool, *, files: list[str] | None) -> tuple[Path, str | None]:
    """The folder of a model, and its commit if it is a hub id.

    Args:
        files: patterns of what to download from the hub; None if nothing may be downloaded.
    """
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
    return hub.download(name, revision, offline, files, check=read_config)


def read_config(path: Path) -> Config:
    """Reads and checks a config.json."""
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
    except (ValueError, TypeError, AttributeError) as problem:  # AttributeError: a string where an object should be
        raise ModelError(f"{path} is no valid {kind} config: {first_line(problem)}", "get the file again") from problem


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"{path} cannot be read: {first_line(problem)}", "get the file again") from problem
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", "get the file again")
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Their headers are read, so that missing or truncated files are found here."""
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


def eos_ids(folder: Path | None, config: Config, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    path = folder / "generation_config.json" if folder else None
    ids = _json(path).get("eos_token_id") if path and path.is_file() else None
    if ids is None:
        ids = config.text_config.eos_token_id
    if ids is None and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def video_limits(folder: Path | None, vision_config: VisionConfig) -> VideoLimits:
    """Limits from a model folder's processor settings, and patch sizes from its config, which fix the shape of the weights.

    `preprocessor_config.json` belongs to the image processor: only its mean and std are used. Its limit of 12.8 million pixels is
    meant for one picture; every frame pair would get 16,000 tokens. Qwen's own code limits the frames of a video far lower, and
    those limits are the defaults here.
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


def fingerprint(name: str, commit: str | None, folder: Path | None, files: list[Path]) -> str:
    """A text that changes when the weights do. For a hub model its id and commit; for a folder a hash of the config and of the
    weight files' names, sizes and times, because hashing gigabytes takes too long."""
    if commit is not None and files:
        return f"{name}@{commit}"
    config = BUNDLED_CONFIGS[name] if folder is None else folder / "config.json"
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(config.read_bytes() + repr(stats).encode()).hexdigest()

"""What a model's folder says: its config, its limits for videos and pictures, ends of answers, files of weights."""

import hashlib
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import torch

from evoprune.bundled import DEMOS
from evoprune.errors import ModelError, first_line
from evoprune.language.tokenizer import Tokenizer
from evoprune.model.config import END_IDS, MODEL_TYPES, Config, VisionConfig, parse_config
from evoprune.model.rules import Rule, checked, section
from evoprune.model.strict_json import read_object
from evoprune.pipeline.loading.hub import MODEL_HINT
from evoprune.video.info import PICTURE, VIDEO
from evoprune.video.plan import InputLimits

PACKAGE = Path(__file__).parents[2]
DEMO_FOLDER = DEMOS["demo"].folder
# The published dimensions (config.json of the two repositories), so that benchmarks need no network.
BUNDLED_CONFIGS = {f"Qwen/{path.stem}": path for path in sorted((PACKAGE / "model" / "configs").glob("*.json"))}
NORMALISATION = ("image_mean", "image_std")
OF_PICTURES = (*NORMALISATION, "min_pixels", "max_pixels")
# Pixels of a picture: in the settings of the published models, and by Hugging Face's image processor where no settings say.
PUBLISHED = {"min_pixels": 56 * 56, "max_pixels": 12_845_056}
UNSTATED = {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
# With the rules of Windows, both kinds of slash separate. Links may lead elsewhere, as those of the hub's cache do.
INSIDE = Rule(
    "the name of a file in the same folder",
    lambda v: isinstance(v, str) and v != "" and not PureWindowsPath(v).anchor and ".." not in PureWindowsPath(v).parts,
)


def read_config(path: Path) -> Config:
    """Reads and checks a config.json."""
    if not os.path.isfile(path):
        raise ModelError(
            f"{path.parent} holds no config.json", "name a folder in the hub's file layout, or a hub id org/name"
        )
    content = _json(path)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ModelError(
            f"{path.parent} is a model of type {reprlib.repr(kind)}, not {' or '.join(MODEL_TYPES)}", MODEL_HINT
        )
    if "quantization_config" in content:
        raise ModelError(f"{path.parent} holds quantized weights", "take the original checkpoint in bf16, fp16 or fp32")
    with _valid(f"{path} is no valid {kind} config"):
        return parse_config(content)


@contextmanager
def _valid(problem: str, *more: type[Exception]) -> Iterator[None]:
    """Turns a rule that does not hold, JSON that is none, a file that cannot be read or `more` into a `ModelError`."""
    try:
        yield
    except (OSError, ValueError, *more) as reason:
        raise ModelError(f"{problem}: {first_line(reason)}", "get the file again") from reason


def _json(path: Path) -> dict:
    """The object in a JSON file of a model's folder; an empty one if there is no such file."""
    if not os.path.lexists(path):  # a link that leads nowhere is no missing file
        return {}
    with _valid(f"{path} cannot be read"):
        return read_object(path)


def stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype of the published weights, if a config.json that has been checked says so."""
    content = _json(path)
    name = content.get("dtype", content.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(name))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Their headers are read, so that missing or truncated files are found here."""
    from safetensors import SafetensorError, safe_open

    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        with _valid(f"{index} is damaged"):
            named = section(_json(index), "weight_map")
            files = [folder / name for name in sorted({INSIDE.check(v, f"weight_map.{k}") for k, v in named.items()})]
    else:
        files = []
    if not files:
        hint = (
            "weights must be model.safetensors, or shards with model.safetensors.index.json; other formats are not read"
        )
        raise ModelError(f"{folder} holds no safetensors weights", hint)
    for file in files:
        if not file.is_file():
            raise ModelError(f"weights file {file} is missing", "get the file again")
        with _valid(f"weights file {file} is damaged or incomplete", SafetensorError), safe_open(file, framework="pt"):
            pass
    return files


def eos_ids(folder: Path | None, config: Config, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    ids = None
    if folder:
        path = folder / "generation_config.json"
        with _valid(f"{path} is damaged"):
            ids = _json(path).get("eos_token_id")
            ids = None if ids is None else END_IDS.check(ids, "eos_token_id")
    if ids is None:
        ids = config.text_config.eos_token_id
    if ids is None and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    return () if ids is None else ids if isinstance(ids, tuple) else (ids,)


def input_limits(folder: Path | None, vision_config: VisionConfig) -> dict[str, InputLimits]:
    """Limits of videos and of pictures from a model folder's processor settings, and patch sizes from its config.

    `preprocessor_config.json` belongs to the image processor. Of videos only its mean and std are used: its limit of 12.8 million
    pixels is meant for one picture; every frame pair would get 16,000 tokens. Qwen's own code limits the frames of a video far
    lower, and those limits are the defaults here.
    """
    limits = InputLimits(
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
    )
    if folder is None:
        return {VIDEO: limits, PICTURE: replace(limits, **PUBLISHED)}
    joint = folder / "processor_config.json"  # where transformers 5 saves both
    video = _limits(joint, "video_processor") or _limits(folder / "video_preprocessor_config.json")
    image = _limits(joint, "image_processor", OF_PICTURES) or _limits(
        folder / "preprocessor_config.json", only=OF_PICTURES
    )
    normal = {name: image[name] for name in NORMALISATION if name in image}
    return {VIDEO: replace(limits, **(normal | video)), PICTURE: replace(limits, **(UNSTATED | image))}


def _limits(path: Path, inner: str | None = None, only: tuple[str, ...] | None = None) -> dict:
    """The fields of `InputLimits` in a processor's settings, perhaps in an object inside them, perhaps `only` some."""
    content = _json(path)
    with _valid(f"{path} is damaged"):
        content = section(content, inner) if inner else content
        size = section(content, "size")
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            content = content | {name: content.get(name) or size.get(edge)}
        if only:
            content = {name: content.get(name) for name in only}
        return checked(InputLimits, content, inner or "")


def fingerprint(name: str, commit: str | None, folder: Path | None, files: list[Path]) -> str:
    """A text that changes when the weights do. For a hub model its id and commit; for a folder a hash of the config and of the
    weight files' names, sizes and times, because hashing gigabytes takes too long."""
    if commit is not None and files:
        return f"{name}@{commit}"
    config = BUNDLED_CONFIGS[name] if folder is None else folder / "config.json"
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(config.read_bytes() + repr(stats).encode()).hexdigest()

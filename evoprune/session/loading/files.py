"""What this machine has of a model's folder, and what the small files in it say: config, limits of videos and pictures.

Imports no torch.
"""

import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING

import evoprune
from evoprune.backend.expected import visual_token_limit
from evoprune.bundled import DEMOS, demo_in
from evoprune.errors import EvopruneWarning, ModelError, UsageError, first_line
from evoprune.model.config import (
    FAMILIES,
    Config,
    Unsupported,
    VisionConfig,
    check_fetched,
    checked,
    parse_config,
    read_object,
    section,
)
from evoprune.util import did_you_mean, is_text, missing_hint, shorten
from evoprune.video.info import PICTURE, VIDEO
from evoprune.video.plan import MAX_VISUAL_TOKENS, InputLimits

if TYPE_CHECKING:
    from evoprune.session.options import ModelOptions

# The published dimensions (config.json of the repositories), so that benchmarks need no network.
BUNDLED_CONFIGS = {
    f"Qwen/{path.stem}": path for path in sorted((Path(evoprune.__file__).parent / "model" / "configs").glob("*.json"))
}
# Ids of Qwen's models that run, to name the one that was meant.
PUBLISHED = (
    *BUNDLED_CONFIGS,
    *(f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B")),
    *(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("32B", "72B")),
    *(f"Qwen/Qwen3-VL-{size}-Instruct" for size in ("32B", "235B-A22B")),
    *(f"Qwen/Qwen3-VL-{size}-Thinking" for size in ("2B", "4B", "8B", "32B", "30B-A3B", "235B-A22B")),
    *(f"Qwen/Qwen3.5-{size}" for size in ("122B-A10B", "397B-A17B")),
)
ADAPTER = "adapter_config.json"
NORMALISATION = ("image_mean", "image_std")
# What is done whatever the settings of a processor say. Other values are named, null counts as missing.
ALWAYS = {
    "do_sample_frames": True, "num_frames": None, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False, "do_pad": False, "resample": 3,
}  # fmt: skip
MODEL_HINT = (
    "evoprune runs Qwen3.5, Qwen3-VL, Qwen2.5-VL and Qwen2-VL, such as Qwen/Qwen2.5-VL-3B-Instruct, and its demos"
)
MERGE = "merge it into its base model (PEFT: merge_and_unload) and save that"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_id(name: str) -> bool:
    """Return whether a name has the form of a hub id, `org/name`."""
    return bool(_ID.fullmatch(name)) and ".." not in name and "--" not in name


def nearest_id(name: str) -> str | None:
    """Return the published id that a misspelt id of Qwen's, or one without its organization, is most like; None if it is right."""
    organization, _, word = name.lower().rpartition("/")
    if organization not in ("", "qwen") or not word:
        return None
    known = {each.lower().removeprefix("qwen/"): each for each in PUBLISHED}
    if any(name.startswith(each) for each in PUBLISHED):  # also of a variant, such as -AWQ
        return None

    def likeness(each: str) -> tuple[float, int]:
        same = sum(part(word) == part(each) for part in (_generation, _size))
        return SequenceMatcher(None, word, each).ratio() + 0.2 * same, -len(each)

    near = max([each for each in known if word in each] or known, key=likeness)
    return known[near] if word in near or likeness(near)[0] >= 0.9 else None


def _generation(word: str) -> str:
    return "".join(re.findall(r"^qwen-?([\d.]+)", word))


def _size(word: str) -> str:
    return "".join(re.findall(r"(?<![\d.])([\d.]+b)\b", word))


def near_hint(name: str) -> str:
    """Return the beginning of a hint, which names `nearest_id`; empty without one."""
    near = nearest_id(name)
    return f"did you mean {near}? " if near else ""


def local_folder(options: "ModelOptions") -> Path | None:
    """Return the folder of a local model, or None if the name is a hub id. Raises ModelError or UsageError: it is neither."""
    name = options.model
    revision = options.revision
    if not name.strip():
        raise ModelError("the name of the model is empty", MODEL_HINT)
    folder = options.folder
    if name in DEMOS and not (folder / "config.json").is_file():
        hint = "install evoprune again, or name another model"
        raise ModelError(f"the bundled {name} model is missing: {folder}", hint)
    if os.path.isdir(folder):  # unlike a path's own method, it raises nothing
        if revision is not None:
            raise UsageError(f"{name} is a local model and has no revision {revision!r}", "leave the revision out")
        if not is_text(os.path.abspath(folder)):  # as the readers of tokenizers and weights want it
            hint = "rename it, or set LC_ALL to a locale with UTF-8, such as C.UTF-8"
            raise ModelError(f"the path {folder} is not valid text", hint)
        return folder
    if os.path.exists(folder):
        raise ModelError(f"{name} is a file, not a model", "name the folder that holds config.json and the weights")
    if not is_id(name):
        meant = near_hint(name) or did_you_mean(name, DEMOS)
        hint = missing_hint(name, f"{meant}a hub id is org/name; {MODEL_HINT}")
        raise ModelError(f"{name!r} is neither a folder here nor a hub id", hint)
    return None


def is_bundled(name: str) -> bool:
    return name in BUNDLED_CONFIGS and not Path(name).is_dir()


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of a hub model in the hub's own cache, if its config is there; no network is used."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        path = hub.try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError:  # no name of the hub, for example too long
        return None
    return Path(path).parent if isinstance(path, str) else None


def read_config(path: Path) -> Config:
    if not os.path.isfile(path):
        raise _no_config(path.parent)
    content = read_json(path)
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = " or ".join(FAMILIES)
        raise ModelError(f"{path.parent} is a model of type {reprlib.repr(kind)}, not {known}", MODEL_HINT)
    with valid(f"{path} is no valid {kind} config"):
        try:
            return parse_config(content)
        except Unsupported as reason:
            hint = MODEL_HINT
            if "yarn" in str(reason):
                hint = f"take its config.json without yarn; {hint}"
            raise ModelError(f"evoprune cannot run {path.parent}: {reason}", hint) from reason


def _no_config(folder: Path) -> ModelError:
    """Return the error for a folder without a config.json, which may be an adapter's, or one of the hub's cache."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        what = "an adapter"
        if isinstance(base, str) and base:
            what += f" of {base[:100]}"
        return ModelError(f"{folder} holds {what}, not a model", MERGE)
    cached = next((path for path in (folder, folder.parent) if path.name.startswith("models--")), None)
    if cached is not None and (snapshots := sorted(cached.glob("snapshots/*/config.json"))):
        hint = f"name the model {cached_id(cached)}, or {snapshots[-1].parent}"
        return ModelError(f"{folder} is a folder of the hub's cache, and holds no config.json", hint)
    return ModelError(f"{folder} holds no config.json", "name a folder in the hub's file layout, or a hub id org/name")


def cached_id(folder: Path) -> str:
    """Return the id of the model of a folder in the hub's cache, `models--org--name`."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)


@contextmanager
def valid(problem: str) -> Iterator[None]:
    """Turns a rule that does not hold, JSON that is none, or a file that cannot be read into a `ModelError`."""
    try:
        yield
    except (OSError, ValueError) as reason:
        raise ModelError(f"{problem}: {first_line(reason)}", "get the file again") from reason


def read_json(path: Path) -> dict:
    """Return the object in a JSON file of a model's folder; an empty one if there is no such file."""
    if not os.path.lexists(path):  # a link that leads nowhere is no missing file
        return {}
    with valid(f"{path} cannot be read"):
        check_fetched(path)
        return read_object(path)


def input_limits(folder: Path | None, vision_config: VisionConfig) -> dict[str, InputLimits]:
    """Limits of videos and of pictures from a model folder's processor settings, and patch sizes from its config.

    `preprocessor_config.json` belongs to the image processor. Of videos only its mean and std are used: its limit of 12.8 million
    pixels is meant for one picture, and Qwen's own code limits the frames of a video far lower. Those limits are the defaults here.
    """
    traits = vision_config.traits
    limits = InputLimits(
        **traits.video,
        patch_size=vision_config.patch_size,
        temporal_patch_size=vision_config.temporal_patch_size,
        merge_size=vision_config.spatial_merge_size,
    )
    if folder is None:
        return {VIDEO: limits, PICTURE: replace(limits, **traits.picture)}
    of_pictures = (*NORMALISATION, "min_pixels", "max_pixels")
    joint = folder / "processor_config.json"  # where transformers 5 saves both
    video = _limits(joint, "video_processor") or _limits(folder / "video_preprocessor_config.json")
    image = _limits(joint, "image_processor", of_pictures)
    image = image or _limits(folder / "preprocessor_config.json", only=of_pictures)
    normal = {name: image[name] for name in NORMALISATION if name in image}
    return {VIDEO: replace(limits, **(normal | video)), PICTURE: replace(limits, **(dict(traits.unstated) | image))}


def warn_of_unused(folder: Path) -> None:
    """Names settings of processors that have been checked and are not followed, in one warning."""
    joint = read_json(folder / "processor_config.json")
    unused = {}
    for inner, file in (
        ("video_processor", "video_preprocessor_config.json"),
        ("image_processor", "preprocessor_config.json"),
    ):
        content = section(joint, inner) or read_json(folder / file)
        usual = ALWAYS
        if content.get("video_processor_type") == "Qwen2VLVideoProcessor":
            # Its settings have this false unless somebody changed it; whoever uses it samples frames outside.
            usual = ALWAYS | {"do_sample_frames": False}
        unused |= {
            name: content[name] for name, value in usual.items() if content.get(name) not in (None, value, ALWAYS[name])
        }
    if unused:
        named = ", ".join(f"{name}={shorten(json.dumps(value), 40)}" for name, value in unused.items())
        warnings.warn(f"{folder}: settings of the processor that are not used: {named}", EvopruneWarning, stacklevel=2)


def _limits(path: Path, inner: str | None = None, only: tuple[str, ...] | None = None) -> dict:
    """Return the fields of `InputLimits` in a processor's settings, perhaps in an object inside them, perhaps `only` some."""
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


def default_max_visual_tokens(folder: Path | None, device: str) -> int:
    """Return the limit before pruning where none is given, of a model on a device by its name.

    `folder`: of the model's files; None for a bundled config. Models as small as those of the package have no limit of the device.
    """
    if demo_in(folder):
        return MAX_VISUAL_TOKENS
    return min(MAX_VISUAL_TOKENS, visual_token_limit(device))

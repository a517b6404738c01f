"""A model's folder, perhaps from the Hugging Face hub, and what it says: config, limits of inputs, ends of answers, weights."""

import hashlib
import json
import os
import re
import reprlib
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneWarning, ModelError, ModelWarning, first_line
from evoprune.language.prompt import Tokenizer
from evoprune.model.config import (
    EXPERTS,
    MODEL_TYPES,
    Config,
    GenerationSettings,
    Rule,
    Unsupported,
    VisionConfig,
    check_fetched,
    checked,
    parse_config,
    pick,
    read_object,
    section,
)
from evoprune.session.loading.weights import MERGE
from evoprune.text import listed, shorten
from evoprune.video.info import PICTURE, VIDEO
from evoprune.video.plan import InputLimits

PACKAGE = Path(__file__).parents[2]
DEMO_FOLDER = DEMOS["demo"].folder
# The published dimensions (config.json of the two repositories), so that benchmarks need no network.
BUNDLED_CONFIGS = {f"Qwen/{path.stem}": path for path in sorted((PACKAGE / "model" / "configs").glob("*.json"))}
NORMALISATION = ("image_mean", "image_std")
# What is done whatever the settings of a processor say. Other values are named, null counts as missing.
ALWAYS = {
    "do_sample_frames": True, "num_frames": None, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "do_convert_rgb": True, "do_center_crop": False, "do_pad": False, "resample": 3,
}  # fmt: skip
# Whose settings have `do_sample_frames` false unless somebody changed it; whoever uses it samples frames outside.
SAMPLED_OUTSIDE = "Qwen2VLVideoProcessor"
OF_PICTURES = (*NORMALISATION, "min_pixels", "max_pixels")
# Settings of transformers' `generate` that change answers and are not done here, and what they are where they change nothing.
NOT_DONE = dict.fromkeys(
    ("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length",
     "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_p", "penalty_alpha",
     "no_repeat_ngram_size", "sequence_bias", "stop_strings", "suppress_tokens", "top_h"), 0
) | dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1)  # fmt: skip
# With the rules of Windows, both kinds of slash separate. Links may lead elsewhere, as those of the hub's cache do.
INSIDE = Rule(
    "the name of a file in the same folder",
    lambda v: isinstance(v, str) and v != "" and not PureWindowsPath(v).anchor and ".." not in PureWindowsPath(v).parts,
)


ADAPTER = "adapter_config.json"
NAME = 100  # characters of a name that a file gives, in a message
HUB_SECONDS = 5.0
FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]
SETTINGS = ["config.json", "*processor_config.json"]
MODEL_HINT = (
    "evoprune runs Qwen3-VL, Qwen2.5-VL and Qwen2-VL checkpoints, such as Qwen/Qwen2.5-VL-3B-Instruct, and its demos"
)

_QUANTIZED = re.compile(
    r"(^|[-_./])(awq|gptq|gguf|nvfp4|fp[48]|mlx|bnb|int[48]|[2-8]-?bit|w[48]a(8|16))($|[-_.])", re.IGNORECASE
)
_ORIGINAL = re.compile(r"qwen(2|2\.5|3)-vl-\d+b(-instruct|-thinking)?", re.IGNORECASE)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `org/name`."""
    return bool(_ID.fullmatch(name)) and ".." not in name and "--" not in name


def kind_hint(name: str) -> str:
    """The beginning of a hint: which models run, where the name does not look like one of them; else nothing."""
    if (original := original_of(name)) is not None:
        instead = original or "the original checkpoint"
        return f"its name is that of quantized weights, which evoprune does not read; take {instead}; "
    return "" if re.search(r"qwen-?(3|2[._]?5?)[-_]?vl", name, re.IGNORECASE) else f"{MODEL_HINT}; "


def original_of(name: str) -> str | None:
    """The id of the model that a name says to be a quantised form of, as far as it is known; None for any other name."""
    if not _QUANTIZED.search(name):
        return None
    found = _ORIGINAL.search(name)
    return f"Qwen/{found[0]}" if found else ""


def download(
    name: str, revision: str | None, offline: bool, files: list[str], check: Callable[[Path], Any]
) -> tuple[Path, str]:
    """A hub model's folder in the hub's own cache, downloaded as far as needed and possible, and its commit.

    `check` is called with the config's path before any of `files`, which are patterns; it raises if the model cannot run.

    Raises ModelError: no such model or revision, no access, or the hub is out of reach and the cache does not hold it.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    unreachable = "the hub may not be asked (offline)" if offline else None
    if not offline:
        # One request without retries shows whether hub and model exist; the library's own calls retry for minutes.
        url = hub.hf_hub_url(name, "config.json", revision=revision)
        try:
            _within(HUB_SECONDS, lambda: hub.get_hf_file_metadata(url, timeout=HUB_SECONDS))
        except errors.RevisionNotFoundError as problem:
            raise ModelError(f"{name} has no revision {revision!r} on the hub", "leave the revision out") from problem
        except errors.RepositoryNotFoundError as problem:  # also: private, or gated
            hint = f"check the spelling, or log in with `hf auth login` if it is private or gated; {MODEL_HINT}"
            raise ModelError(f"there is no folder {name} here, and no such model on the hub for you", hint) from problem
        except errors.EntryNotFoundError as problem:
            hint = f"{kind_hint(name) or f'{MODEL_HINT}; '}adapters must be merged first, GGUF files are not read"
            raise ModelError(f"{name} has no config.json on the hub", hint) from problem
        except Exception as problem:  # the HTTP library below differs from version to version
            unreachable = f"the hub cannot be reached ({first_line(problem)})"

    def fetch(*patterns: str) -> Path:
        local = unreachable is not None
        try:
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
        except Exception as problem:
            if local:
                at = "" if revision is None else f" --revision {revision}"
                refs = Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs"
                held = sorted(file.name for file in refs.glob("*")) if revision is not None else []
                others = f"the cache holds {listed(held)}; " if held else ""
                hint = f"{kind_hint(name)}{others}where there is a network: hf download {name}{at} --local-dir DIR; "
                hint += "then DIR is the model. The demo needs neither"
                wanted = name if revision is None else f"{name} at revision {revision}"
                raise ModelError(f"{wanted} is not in the local cache, and {unreachable}", hint) from problem
            broken = f"the download of {name} broke off: {first_line(problem)}"
            raise ModelError(broken, "run it again to go on") from problem

    # Checked before gigabytes are downloaded.
    check(fetch("config.json") / "config.json")
    folder = fetch(*files)
    return folder, folder.name


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the hub's own cache, if its config is there; no network is used."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    found = hub.try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """`work()`, or TimeoutError. HTTP timeouts leave out name resolution, which alone can take half a minute."""
    answer = Future()

    def run():
        try:
            answer.set_result(work())
        except BaseException as problem:
            answer.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def read_config(path: Path) -> Config:
    if not os.path.isfile(path):
        raise _no_config(path.parent)
    content = _json(path)
    kind = content.get("model_type")
    if kind == EXPERTS:
        raise ModelError(f"{path.parent} is a mixture of experts, which evoprune does not run", MODEL_HINT)
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = " or ".join(MODEL_TYPES)
        raise ModelError(f"{path.parent} is a model of type {reprlib.repr(kind)}, not {known}", MODEL_HINT)
    if content.get("quantization_config") is not None:
        method = section(content, "quantization_config").get("quant_method")
        how = f" ({method})" if isinstance(method, str) else ""
        hint = "take the original checkpoint in bf16, fp16 or fp32"
        raise ModelError(f"{path.parent} holds quantized weights{how}", hint)
    with _valid(f"{path} is no valid {kind} config"):
        try:
            return parse_config(content)
        except Unsupported as reason:
            hint = f"take its config.json without yarn; {MODEL_HINT}" if "yarn" in str(reason) else MODEL_HINT
            raise ModelError(f"evoprune cannot run {path.parent}: {reason}", hint) from reason


def _no_config(folder: Path) -> ModelError:
    """The error for a folder without a config.json, which may be an adapter's, or one of the hub's cache."""
    if (folder / ADAPTER).is_file():
        base = _json(folder / ADAPTER).get("base_model_name_or_path")
        of = f" of {base[:NAME]}" if isinstance(base, str) and base else ""
        return ModelError(f"{folder} holds an adapter{of}, not a model", MERGE)
    cached = next((each for each in (folder, folder.parent) if each.name.startswith("models--")), None)
    snapshots = [] if cached is None else sorted(cached.glob("snapshots/*/config.json"))
    if snapshots:
        hint = f"name the model {_cached_id(cached)}, or {snapshots[-1].parent}"
        return ModelError(f"{folder} is a folder of the hub's cache, and holds no config.json", hint)
    return ModelError(f"{folder} holds no config.json", "name a folder in the hub's file layout, or a hub id org/name")


def _cached_id(folder: Path) -> str:
    """The id of the model of a folder in the hub's cache, `models--org--name`."""
    return folder.name.removeprefix("models--").replace("--", "/", 1)


def _download_of(folder: Path) -> tuple[str, str, bool]:
    """Of a model's folder: what was downloaded, the command that goes on with it, and whether that surely broke off."""
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        name = _cached_id(folder.parents[1])
        return name, f"hf download {name}", False
    broken = any((folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"))
    return str(folder), "hf download ID --local-dir DIR", broken


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
        check_fetched(path)
        return read_object(path)


def stored_dtype(path: Path) -> torch.dtype | None:
    """The dtype of the published weights, if a config.json that has been checked says so."""
    content = _json(path)
    name = content.get("dtype") or content.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(name))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model. Their headers are read, so that missing or truncated files are found here."""
    from safetensors import SafetensorError, safe_open

    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        with _valid(f"{index} is damaged"):
            named = section(_json(index), "weight_map")
            files = [folder / name for name in sorted({INSIDE.check(v, f"weight_map.{k}") for k, v in named.items()})]
    elif not files[0].is_file():
        files = []
    name, again, broken = _download_of(folder)
    if not files and not broken:
        hint = (
            "weights must be model.safetensors, or shards with model.safetensors.index.json; other formats are not read"
        )
        hint += f". If the download was not finished: {again}" if name != str(folder) else ""
        raise ModelError(f"{folder} holds no safetensors weights", hint)
    for file in files or [folder / "model.safetensors"]:
        if not file.is_file():
            if broken or name != str(folder):
                raise ModelError(
                    f"the download of {name} is not finished: {file.name} is missing", f"to go on: {again}"
                )
            raise ModelError(f"weights file {file} is missing", "get the file again")
        check_fetched(file)
        with _valid(f"weights file {file} is damaged or incomplete", SafetensorError), safe_open(file, framework="pt"):
            pass
    return files


def read_generation(folder: Path | None) -> GenerationSettings:
    """What a model's generation_config.json says. Warns of what it asks for and nothing here does."""
    path = None if folder is None else folder / "generation_config.json"
    content = {} if path is None else _json(path)
    if asked := sorted(name for name, off in NOT_DONE.items() if content.get(name) and content[name] != off):
        warnings.warn(f"evoprune does not do what {path} asks for: {listed(asked)}", ModelWarning, stacklevel=2)
    with _valid(f"{path} is damaged"):
        return pick(GenerationSettings, content, "")


def eos_ids(
    folder: Path | None, generation: GenerationSettings, config: Config, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """The tokens that end an answer, of the first file that names some. Raises ModelError: none of them is one of the model's."""
    ids, file = generation.eos_token_id, "generation_config.json"
    if ids in (None, ()):
        ids, file = config.text_config.eos_token_id, "config.json"
    if ids in (None, ()) and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    ids = () if ids is None else ids if isinstance(ids, tuple) else (ids,)
    if never := [each for each in ids if each >= config.text_config.vocab_size]:
        said = f"eos_token_id {', '.join(map(str, never))} is no token of the model"
        if len(never) == len(ids):
            raise ModelError(f"{folder}/{file}: {said}, so no answer could end", "get the file again")
        warnings.warn(f"{folder}/{file}: {said}", ModelWarning, stacklevel=2)
    return tuple(each for each in ids if each not in never)


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
    joint = folder / "processor_config.json"  # where transformers 5 saves both
    video = _limits(joint, "video_processor") or _limits(folder / "video_preprocessor_config.json")
    image = _limits(joint, "image_processor", OF_PICTURES)
    image = image or _limits(folder / "preprocessor_config.json", only=OF_PICTURES)
    _warn_of_unused(folder)
    normal = {name: image[name] for name in NORMALISATION if name in image}
    return {VIDEO: replace(limits, **(normal | video)), PICTURE: replace(limits, **(dict(traits.unstated) | image))}


def _warn_of_unused(folder: Path) -> None:
    """Names settings of processors that have been checked and are not followed, in one warning."""
    joint, unused = _json(folder / "processor_config.json"), {}
    for inner, file in (
        ("video_processor", "video_preprocessor_config.json"),
        ("image_processor", "preprocessor_config.json"),
    ):
        content = section(joint, inner) or _json(folder / file)
        usual = ALWAYS | ({"do_sample_frames": False} if content.get("video_processor_type") == SAMPLED_OUTSIDE else {})
        unused |= {
            name: content[name] for name, value in usual.items() if content.get(name) not in (None, value, ALWAYS[name])
        }
    if unused:
        named = ", ".join(f"{name}={shorten(json.dumps(value), 40)}" for name, value in unused.items())
        warnings.warn(f"{folder}: settings of the processor that are not used: {named}", EvopruneWarning, stacklevel=3)


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

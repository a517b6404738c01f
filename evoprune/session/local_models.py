"""List the models on this machine: in the hub's cache, LM Studio, Ollama, and the folders in EVOPRUNE_MODELS.

Reads only small files and headers. Does not import torch.
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from pathlib import Path

from evoprune.backend import DeviceName
from evoprune.errors import ModelError, ModelWarning, first_line
from evoprune.model import FAMILIES, Config
from evoprune.session.gguf.files import (
    OLLAMA,
    OLLAMA_PART,
    find_files,
    ollama_files,
    ollama_models,
    reported,
    settings_of,
    text_files,
    title_of,
)
from evoprune.session.gguf.names import local_path
from evoprune.untrusted import read_object, section
from evoprune.util import size, some

HUB, LM_STUDIO, OLLAMA_STORE, FOLDER = PLACES = "hub", "lmstudio", "ollama", "folder"
LM_STUDIO_FOLDERS = "~/.lmstudio/models", "~/.cache/lm-studio/models"
MAX_MODELS = 2000  # maximum number of models to list
MAX_ENTRIES = 10_000  # maximum number of entries to read in a folder
LEVELS = 3  # maximum depth of models below a folder
CONFIG = "config.json"
# Bytes per weight of the dtypes in config.json.
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
INT4_BYTES = 4.5 / 8  # size of a 4-bit weight, including its share of the block's scale
VISION_NAMES = re.compile(r"qwen-?(2([._]?5)?|3)[-_.]?vl|qwen-?3[._]?[5-9]", re.IGNORECASE)
HINTED = 3  # maximum number of models to name in a hint


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine."""

    name: str  # name to give to `-m`
    place: str  # one of `PLACES`
    series: str | None = None  # name of the series, such as "Qwen2.5-VL", or None if evoprune does not run the model
    parameters: int | None = None  # None if unknown
    disk_bytes: int | None = None  # total size of the weight files
    needed_bytes: int | None = None  # estimated memory that the weights need with the default options
    problem: str | None = None  # reason why the model does not run here, or None if it does


def local_models() -> list[LocalModel]:
    """Return the models on this machine. Models that run here come first. Warns of unreadable folders in EVOPRUNE_MODELS."""
    unreadable = [
        str(path) for path in _own_folders() if not (os.path.isdir(path) and os.access(path, os.R_OK | os.X_OK))
    ]
    if unreadable:
        text = f"EVOPRUNE_MODELS names a folder that does not exist or cannot be read: {some(unreadable)}"
        warnings.warn(text, ModelWarning, stacklevel=3)
    found = list(islice(_described(), MAX_MODELS))
    return sorted(found, key=lambda model: (model.problem is not None, model.series is None))


def here_hint() -> str:
    """Return a hint that names some models on this machine that evoprune may run, or an empty string if there aren't any."""
    names = (name for name, _, _ in _places() if VISION_NAMES.search(name))
    found = list(islice(dict.fromkeys(names), HINTED + 1))
    return f"on this machine: {some(found)}; " if found else ""


def ollama_hint(name: str) -> str:
    """Return a hint for a model name that lacks the prefix of Ollama's models, or an empty string."""
    parts = name.split("/")
    written_so = ":" in name or (name == name.lower() and VISION_NAMES.search(name))
    if not (written_so and len(parts) <= 3 and all(map(OLLAMA_PART.fullmatch, parts))):
        return ""
    return f"a model of Ollama is {OLLAMA}{name}; evoprune models lists the models on this machine; "


def _described() -> Iterator[LocalModel]:
    for name, place, path in _places():
        try:
            if place == OLLAMA_STORE or path.is_file():
                yield _gguf(name, place, ollama_files(path, name) if place == OLLAMA_STORE else find_files(name))
            else:
                yield _folder(name, place, path)
        except ModelError as problem:
            yield LocalModel(name, place, problem=problem.message)
        except (OSError, ValueError) as problem:
            yield LocalModel(name, place, problem=first_line(problem))


def _places() -> Iterator[tuple[str, str, Path]]:
    """Yield each model's name, place, and path: a folder with config.json, a GGUF file, or a manifest of Ollama."""
    yield from _in_hub_cache()
    for folder in map(os.path.expanduser, LM_STUDIO_FOLDERS):
        yield from ((name, LM_STUDIO, path) for name, path in _below(Path(folder), LEVELS))
    yield from ((f"{OLLAMA}{name}", OLLAMA_STORE, path) for name, path in ollama_models().items())
    for folder in _own_folders():
        yield from ((name, FOLDER, path) for name, path in _below(folder, LEVELS))


def _own_folders() -> list[Path]:
    """Return the folders in EVOPRUNE_MODELS."""
    given = os.environ.get("EVOPRUNE_MODELS", "").split(os.pathsep)
    return [Path(os.path.expanduser(folder)) for folder in given if folder]


def _below(folder: Path, levels: int) -> Iterator[tuple[str, Path]]:
    """Yield the name and the path of each model in a folder and in the folders below it."""
    if (folder / CONFIG).is_file() and any(folder.glob("*.safetensors")):
        yield str(folder), folder
        return
    entries = _entries(folder)
    if any(path.suffix.lower() == ".gguf" for path in entries):
        try:
            yield from ((str(path), path) for path in text_files(folder))
        except ModelError:  # the folder has too many files
            return
    if levels:
        for path in entries:
            if path.is_dir() and not path.name.startswith("."):
                yield from _below(path, levels - 1)


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as found:
            return sorted(Path(entry.path) for entry in islice(found, MAX_ENTRIES))
    except OSError:  # missing, or of another user
        return []


def _in_hub_cache() -> Iterator[tuple[str, str, Path]]:
    from huggingface_hub import constants

    for model in _entries(Path(constants.HF_HUB_CACHE)):
        if not model.name.startswith("models--"):
            continue
        snapshots = _entries(model / "snapshots")
        try:
            commit = (model / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            commit = ""
        folder = next((path for path in snapshots if path.name == commit), snapshots[-1] if snapshots else None)
        if folder is None:
            continue
        name = model.name.removeprefix("models--").replace("--", "/", 1)
        if (folder / CONFIG).is_file() and not any(folder.glob("*.gguf")):
            # Many other kinds of models are in this cache, too.
            if VISION_NAMES.search(name) or _model_type(folder) in FAMILIES:
                yield name, HUB, folder
        else:
            found = list(_below(folder, 1))
            whole = len(found) == 1 and found[0][1].parent == local_path(name)  # so the ID alone means this model
            yield from ((name if whole else file, HUB, path) for file, path in found)


def _model_type(folder: Path) -> str | None:
    try:
        return read_object(folder / CONFIG).get("model_type")
    except (OSError, ValueError):
        return None


def _gguf(name: str, place: str, files: list[Path]) -> LocalModel:
    title = title_of(name, files)
    settings = settings_of(files, title, vocabulary=False)
    with reported(title):
        config = Config.parse(settings.config())
    total = sum(prod(tensor.shape) for tensor in settings.tensors.values())
    return _checked(name, place, config, total, _sizes(files))


def _folder(name: str, place: str, folder: Path) -> LocalModel:
    content = read_object(folder / CONFIG)
    kind = content.get("model_type")
    files = list(folder.glob("*.safetensors"))
    disk = _sizes(files)
    if not isinstance(kind, str) or kind not in FAMILIES:
        return LocalModel(name, place, disk_bytes=disk, problem=f"it is a model of type {str(kind)[:40]}")
    config = Config.parse(content)
    text = section(content, "text_config")
    dtype = next(
        (each for part in (content, text) for key in ("dtype", "torch_dtype") if (each := part.get(key))), None
    )
    quantized = section(content, "quantization_config") or section(text, "quantization_config")
    parameters = None if quantized or str(dtype) not in DTYPE_BYTES else disk // DTYPE_BYTES[str(dtype)]
    if not files:
        return LocalModel(name, place, config.vision_config.traits.series[-1], problem="its weights are not here")
    return _checked(name, place, config, parameters, disk)


def _checked(name: str, place: str, config: Config, parameters: int | None, disk: int) -> LocalModel:
    """Return a model that evoprune runs, after checking that the weights fit into memory.

    Args:
        parameters: Number of weights, or None if the weight files are already quantized, and are kept as they are.
        disk: Total size of the weight files in bytes.
    """
    available = DeviceName("auto").available_memory()  # None for a device other than the CPU
    quantizes = parameters is not None and available is not None and config.text_config.qwen4 is None
    needed = disk if parameters is None else 2 * parameters
    if quantizes:
        needed = _quantized_bytes(config, parameters, 1)
    problem = None
    if available is not None and needed > available:
        problem = f"its weights need about {size(needed)} of memory, of which {size(available)} are available"
        if quantizes and (fewer := _quantized_bytes(config, parameters, INT4_BYTES)) < available:
            problem += f"; --quantize int4 needs about {size(fewer)}"
    return LocalModel(name, place, config.vision_config.traits.series[-1], parameters, disk, needed, problem)


def _quantized_bytes(config: Config, parameters: int, bytes_each: float) -> int:
    """Return the size of a model's weights on a CPU, where linear layers are quantized, and few rows of the embeddings are read."""
    text = config.text_config
    embeddings = 0 if config.tie_word_embeddings else text.vocab_size * text.hidden_size
    return int(bytes_each * (parameters - embeddings))


def _sizes(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)

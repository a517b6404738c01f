"""Find a model's GGUF files: a file or folder of llama.cpp or LM Studio, or a model in Ollama's store. Does not import torch."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from evoprune.errors import ModelError, first_line
from evoprune.files import FileIdentity
from evoprune.model import Unsupported
from evoprune.session.gguf.names import MAX_FILES, OLLAMA, in_folder, local_path
from evoprune.session.gguf.reader import KINDS, Header, UnsupportedKind, read_header
from evoprune.session.gguf.settings import ARCHITECTURES, PROJECTOR, GgufSettings
from evoprune.untrusted import read_object
from evoprune.util import listed, some

# Where Ollama stores models without OLLAMA_MODELS: for a user, and for the service that its installer sets up on Linux.
OLLAMA_STORES = "~/.ollama/models", "/usr/share/ollama/.ollama/models"
OLLAMA_HOST, OLLAMA_OWNER = "registry.ollama.ai", "library"
MAX_LAYERS = 100  # maximum number of layers in an Ollama manifest
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
OLLAMA_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,200}")
LAYER_TYPE = "application/vnd.ollama.image."
# Words in file names that do not tell models apart: the precision, and words for the kind of file.
PRECISION = re.compile(r"[-_.]?(mmproj|model|vision|bf16|fp?16|fp?32|q\d\w*|iq\d\w*)(?=[-_.]|$)", re.IGNORECASE)
EXACT = "F32", "BF16", "F16"  # types of projectors, the best ones first
KINDS_HINT = f"use a file such as Q4_K_M, Q8_0 or F16; evoprune reads {listed([kind.name for kind in KINDS.values()])}"
PAIR_HINT = (
    "a model needs its projector (mmproj-*.gguf), which is published in the same place; put it into the same folder"
)


def find_files(name: str) -> list[Path]:
    """Return the GGUF files of a model for which `names_gguf` is True: the text file or all its parts, then the projector.

    Raises:
        ModelError: If files are missing or damaged, or the name is ambiguous.
    """
    if name.startswith(OLLAMA):
        return _from_ollama(name.removeprefix(OLLAMA))
    path = local_path(name)
    if path.is_dir():
        path = _text_file(path)
    parts = _parts(path)
    headers = [header_of(part, vocabulary=False) for part in parts]
    architecture = str(headers[0].fields.get("general.architecture"))
    if architecture == PROJECTOR:
        others = text_files(path.parent)
        hint = f"use {others[0]}" if len(others) == 1 else "use the file of the language model"
        raise ModelError(f"{path} is a projector, not a model", hint)
    has_tower = any(name.startswith("v.") for header in headers for name in header.tensors)
    if has_tower or architecture not in ARCHITECTURES:  # other architectures are reported when the settings are read
        return parts
    return [*parts, _projector(parts[0], headers)]


def header_of(path: Path, vocabulary: bool = True) -> Header:
    """Read the header of a GGUF file. For the arguments, see `read_header`.

    Raises:
        ModelError: If the file cannot be read, is damaged, or has weights of a type that evoprune does not read.
    """
    try:
        return read_header(path) if vocabulary else _short_header(path, FileIdentity.of(path))
    except UnsupportedKind as problem:
        raise ModelError(
            f"{path} has weights of the type {problem}, which evoprune does not read", KINDS_HINT
        ) from None
    except OSError as problem:
        hint = "check that the file is there, and that you may read it"
        raise ModelError(f"{path} cannot be read: {problem.strerror or first_line(problem)}", hint) from problem
    except (ValueError, OverflowError) as problem:
        hint = "download the file again"
        raise ModelError(f"{path} is damaged or incomplete: {first_line(problem)}", hint) from problem


def title_of(name: str, files: Sequence[Path]) -> str:
    """Return the name of a model for messages, given the name that the user specified and the model's files."""
    return name if name.startswith(OLLAMA) else " with ".join(map(str, [files[0], *files[len(_parts(files[0])) :]]))


@lru_cache(maxsize=256)
def _short_header(path: Path, state: FileIdentity) -> Header:
    """Read a header without the vocabulary. Finding a model reads the headers of a folder several times."""
    return read_header(path, vocabulary=False)


def settings_of(files: Sequence[Path], title: str, vocabulary: bool = True) -> GgufSettings:
    """Read the headers of a model's files. For the arguments, see `find_files`, `title_of`, and `read_header`.

    Raises:
        ModelError: If a file is damaged, or evoprune does not run the model.
    """
    headers = [header_of(file, vocabulary) for file in files]
    with reported(title):
        _check_parts([header for header in headers if header.fields.get("general.architecture") != PROJECTOR])
        return GgufSettings(headers)


@contextmanager
def reported(title: str) -> Iterator[None]:
    """Return a context manager that converts exceptions raised for a model's files to `ModelError`.

    Args:
        title: The name of the model for messages; see `title_of`.
    """
    try:
        yield
    except Unsupported as problem:
        hint = f"evoprune runs GGUF files of the kinds {listed(sorted(ARCHITECTURES), 'and')}"
        raise ModelError(f"evoprune cannot run {title}: {problem}", hint) from problem
    except ValueError as problem:
        hint = "use the text file and the projector of the same model; or download them again"
        raise ModelError(f"evoprune cannot run {title}: {first_line(problem)}", hint) from problem
    except OSError as problem:
        raise ModelError(
            f"{title} cannot be read: {first_line(problem)}", "check that the files are there"
        ) from problem


def text_files(folder: Path) -> list[Path]:
    """Return the GGUF files in a folder that contain a language model, without the later parts of split files."""
    files = [path for path in in_folder(folder) if not ((part := PART.fullmatch(path.name)) and int(part[2]) > 1)]
    return [path for path in files if not _is_projector(path)]


def _is_projector(path: Path) -> bool:
    if "mmproj" in path.name.lower():
        return True
    try:
        return header_of(path, vocabulary=False).fields.get("general.architecture") == PROJECTOR
    except ModelError:
        return False


def _text_file(folder: Path) -> Path:
    found = text_files(folder)
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(
            f"{folder} contains only projectors, no language model", "download the model's other GGUF file"
        )
    names = some([path.name for path in found])
    raise ModelError(f"{folder} contains several models: {names}", f"use one of them, such as {found[0]}")


def _parts(path: Path) -> list[Path]:
    """Return all parts of a split file, or just the file itself if it isn't split."""
    match = PART.fullmatch(path.name)
    if not match or not 1 <= int(match[2]) <= int(match[3]) <= MAX_FILES:
        return [path]
    suffix = path.name[len(match[1]) + len("-00001-of-00001") :]
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}{suffix}") for number in range(1, int(match[3]) + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        names = some(missing)
        problem = f"{path} is part of a model in {len(parts)} files, of which {len(missing)} are missing: {names}"
        raise ModelError(problem, "download the missing files into the same folder")
    return parts


def _check_parts(headers: list[Header]) -> None:
    """Raise ValueError if files are not the parts of a single model, in order."""
    count = len(headers)
    stated = [header.fields.get("split.count", 1) for header in headers]
    if any(number not in (0, count) for number in stated) or (count > 1 and 0 in stated):
        raise ValueError(f"it has {count} files, but its metadata says {str(stated[0])[:40]}")
    if [header.fields.get("split.no", 0) for header in headers] != list(range(count)):
        raise ValueError("its parts are in the wrong order")
    total = headers[0].fields.get("split.tensors.count")
    if count > 1 and total != sum(len(header.tensors) for header in headers):
        raise ValueError("its parts do not have as many tensors as its metadata says")


def _projector(path: Path, headers: list[Header]) -> Path:
    """Return the projector that belongs to a text file in the same folder: its sizes fit, and its name if several sizes fit."""
    found = [each for each in in_folder(path.parent) if each != path and _is_projector(each)]
    if not found:
        raise ModelError(f"{path} is only a language model: there is no projector next to it", PAIR_HINT)
    fitting: dict[Path, Header] = {}
    reasons = []
    for each in found:
        try:
            header = header_of(each, vocabulary=False)
            GgufSettings([*headers, header]).check_sizes()
            fitting[each] = header
        except ModelError as problem:
            reasons.append(problem.message)
        except ValueError as problem:
            reasons.append(f"{each.name}: {first_line(problem)}")
    if not fitting:
        raise ModelError(f"no projector next to {path} fits: {some(reasons, '; ')}", PAIR_HINT)
    stems = {each: PRECISION.sub("", each.stem).strip("-_.").lower() for each in fitting}
    if len(set(stems.values())) > 1:
        named = [each for each, stem in stems.items() if stem and stem in path.stem.lower()]
        longest = max((len(stems[each]) for each in named), default=0)
        fitting = {each: fitting[each] for each in named if len(stems[each]) == longest}
        if not fitting:
            names = listed([each.name for each in stems])
            hint = "put the model and its projector into a folder of their own"
            raise ModelError(f"several projectors next to {path} fit: {names}", hint)

    def precision(each: Path) -> int:
        kinds = [tensor.kind.name for tensor in fitting[each].tensors.values() if len(tensor.shape) == 2]
        most = max(set(kinds), key=kinds.count, default="")
        return EXACT.index(most) if most in EXACT else len(EXACT)

    return min(fitting, key=precision)


def ollama_stores() -> list[Path]:
    """Return the folders in which Ollama may have stored models."""
    given = os.environ.get("OLLAMA_MODELS")
    return [Path(os.path.expanduser(store)) for store in ([given] if given else OLLAMA_STORES)]


def ollama_models() -> dict[str, Path]:
    """Return the manifest of each model in Ollama's stores, by the name to use after `OLLAMA`."""
    found: dict[str, Path] = {}
    for store in ollama_stores():
        manifests = store / "manifests"
        try:
            paths = sorted(manifests.glob("*/*/*/*"))[:MAX_FILES]
        except OSError:  # the store of another user
            continue
        for path in paths:
            host, owner, model, tag = path.relative_to(manifests).parts
            short = [part for part, usual in ((host, OLLAMA_HOST), (owner, OLLAMA_OWNER)) if part != usual]
            if host != OLLAMA_HOST:
                short = [host, owner]
            found.setdefault("/".join([*short, model]) + f":{tag}", path)
    return found


def _from_ollama(name: str) -> list[Path]:
    model, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    parts = model.split("/")
    parts = [OLLAMA_HOST, OLLAMA_OWNER][: max(0, 3 - len(parts))] + parts
    if len(parts) != 3 or not all(OLLAMA_PART.fullmatch(part) and ".." not in part for part in (*parts, tag)):
        raise ModelError(
            f"{OLLAMA}{name[:200]} is not the name of an Ollama model",
            "use ollama:NAME or ollama:NAME:TAG, as in `ollama list`",
        )
    places = [store / "manifests" / Path(*parts) / tag for store in ollama_stores()]
    manifest = next((path for path in places if os.path.lexists(path)), None)
    if manifest is None:
        known = [f"{OLLAMA}{each}" for each in ollama_models()]
        stores = listed([str(store) for store in ollama_stores()], "or")
        hint = f"ollama pull {name}"
        if known:
            hint = f"on this machine: {some(known)}; to download: {hint}"
        raise ModelError(f"Ollama has no model {name} in {stores}", hint)
    return ollama_files(manifest, f"{OLLAMA}{name}")


def ollama_files(manifest: Path, name: str) -> list[Path]:
    """Return the GGUF files that a manifest in Ollama's store names: the text file, then the projector if there is one.

    Raises:
        ModelError: If the manifest is damaged, a file is missing, or the model has an adapter.
    """
    hint = f"download the model again: ollama pull {name.removeprefix(OLLAMA)}"
    blobs: dict[str, list[Path]] = {}
    try:
        layers = read_object(manifest).get("layers")
        if (
            not isinstance(layers, list)
            or len(layers) > MAX_LAYERS
            or not all(isinstance(each, dict) for each in layers)
        ):
            raise ValueError("it has no list of layers")
        for layer in layers:
            kind, digest = layer.get("mediaType"), layer.get("digest")
            if not isinstance(kind, str) or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                raise ValueError("a layer has no type or no valid digest")
            folder = manifest.parents[4] / "blobs"
            blobs.setdefault(kind.removeprefix(LAYER_TYPE), []).append(folder / digest.replace(":", "-"))
    except (OSError, ValueError) as problem:
        raise ModelError(f"the manifest {manifest} of {name} is damaged: {first_line(problem)}", hint) from problem
    if "adapter" in blobs:
        raise ModelError(f"{name} has an adapter, which evoprune does not apply", "use the model without the adapter")
    files = [*blobs.get("model", []), *blobs.get("projector", [])]
    if not blobs.get("model"):
        raise ModelError(f"{name} has no file of a language model in the GGUF format", "use a Qwen VL model")
    if len(files) > 2:
        raise ModelError(f"{name} has {len(files)} weight files, not one or two", "use a Qwen VL model")
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"the file {missing[0]} of {name} is missing or cannot be read", hint)
    return files

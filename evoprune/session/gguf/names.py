"""Tell whether a model name means GGUF files. Imported by every command, so it imports nothing else of this package."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from evoprune.errors import ModelError, first_line

MAGIC = b"GGUF"
OLLAMA = "ollama:"  # prefix of the names of Ollama's models
SUFFIX = ".gguf"
# IDs of repositories with GGUF files on the hub, and the names of their commits.
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*gguf[\w.-]*", re.IGNORECASE | re.ASCII)
COMMIT = re.compile(r"\w[\w-]*", re.ASCII)
MAX_FILES = 1000  # maximum number of GGUF files in a folder, and of the parts of a model


def names_gguf(name: str) -> bool:
    """Return True if a model name means GGUF files: a name in Ollama's store, a GGUF file, or a folder or repository of them."""
    if name.startswith(OLLAMA):
        return True
    path = str(local_path(name))
    if path.lower().endswith(SUFFIX) and os.path.lexists(path) and not os.path.isdir(path):
        return True  # even if it is a link to nowhere
    if os.path.isfile(path):
        return is_gguf(Path(path))
    return os.path.isdir(path) and not _is_folder_of_another_kind(Path(path)) and any(in_folder(Path(path)))


def local_path(name: str) -> Path:
    """Return the path of a model: a file, a folder, or the folder of a repository of GGUF files in the hub's cache."""
    path = os.path.expanduser(name)
    if REPOSITORY.fullmatch(name) and not os.path.exists(path):
        from huggingface_hub import constants

        cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        try:
            commit = (cached / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # it isn't in the cache
            return Path(path)
        if COMMIT.fullmatch(commit) and (cached / "snapshots" / commit).is_dir():
            return cached / "snapshots" / commit
    return Path(path)


def _is_folder_of_another_kind(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def is_gguf(path: Path) -> bool:
    """Return True if a file begins like a GGUF file. Return False if it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading from a pipe could block forever
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def in_folder(folder: Path) -> Iterator[Path]:
    """Yield the GGUF files in a folder, in alphabetical order."""
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower().endswith(SUFFIX))
    except OSError as problem:
        raise ModelError(f"{folder} cannot be read: {first_line(problem)}", "check its permissions") from problem
    if len(found) > MAX_FILES:
        raise ModelError(f"{folder} contains {len(found):,} GGUF files", "give one of them")
    return iter(found)

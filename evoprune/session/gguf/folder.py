"""Store the small files of a GGUF model as a folder in the cache folder. Does not import torch.

The folder's name depends on the state of the GGUF files and on the code that converts them, so its contents never change.
"""

import atexit
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from evoprune.errors import ModelError, first_line
from evoprune.files import cache_folder
from evoprune.model import Config
from evoprune.session.gguf.names import names_gguf
from evoprune.untrusted import TEXT, Rule, read_object
from evoprune.util import file_stats

INDEX = "gguf.json"  # names the GGUF files, in a folder of their small files
MAX_FOLDERS = 16  # maximum number of folders to keep
LIST = Rule.list_of(TEXT)
P = ParamSpec("P")
Loaded = TypeVar("Loaded")


def gguf_folder(name: str) -> Path | None:
    """Return a folder with the small files of a GGUF model, or None if the name doesn't mean GGUF files.

    Raises:
        ModelError: If files are missing or damaged, the name is ambiguous, or evoprune does not run the model.
    """
    if not names_gguf(name):
        return None

    from evoprune.session.gguf.files import find_files, reported, settings_of, title_of

    files = [Path(os.path.abspath(file)) for file in find_files(name)]
    folder = _folders() / _key(files)
    if (folder / INDEX).is_file():
        with suppress(OSError):  # fails if the folder is read-only
            os.utime(folder)
        return folder
    title = title_of(name, files)
    settings = settings_of(files, title)
    with reported(title):
        contents = settings.small_files()
        Config.parse(contents["config.json"])
    contents[INDEX] = {"title": title, "files": list(map(str, files)), "assumed": settings.assumed}
    try:
        _write(folder, contents)
    except OSError:  # for example, the cache folder is read-only
        folder = _temporary() / folder.name
        _write(folder, contents)
    return folder


@cache
def _temporary() -> Path:
    """Return a folder that is deleted when this process exits."""
    from evoprune.video import temporary_folder

    kept = ExitStack()
    atexit.register(kept.close)
    return Path(kept.enter_context(temporary_folder("evoprune-gguf-")))


def _parents() -> list[Path]:
    """Return the folders that contain folders of small files. `_temporary` is not created for this."""
    return [_folders(), *([_temporary()] if _temporary.cache_info().currsize else ())]


def _folders() -> Path:
    return cache_folder() / "gguf"


def _key(files: list[Path]) -> str:
    """Return the name of the folder for files in their current state. It begins with the name of the text file."""
    state = hashlib.sha256(repr([_own_code(), file_stats(files)]).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', files[0].stem)[:80]}-{state[:16]}"


@cache
def _own_code() -> str:
    """Return a hash of the `file_stats` of the source files in this package."""
    return hashlib.sha256(repr(file_stats(sorted(Path(__file__).parent.glob("*.py")))).encode()).hexdigest()


def _write(folder: Path, contents: dict[str, dict | str]) -> None:
    """Write a folder atomically, and delete the least recently used folders if there are too many.

    Raises:
        OSError: If the folder cannot be written.
    """
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = folder.with_name(f"tmp{secrets.token_hex(8)}")
    try:
        unfinished.mkdir(mode=0o700)
        for name, content in contents.items():
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (unfinished / name).write_text(text, encoding="utf-8")
        with suppress(OSError):  # another process wrote the same folder first
            unfinished.rename(folder)
        if not (folder / INDEX).is_file():
            raise OSError(f"{folder} is not a folder of evoprune")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    others = [other for other in folder.parent.iterdir() if other != folder and (other / INDEX).is_file()]
    for other in sorted(others, key=lambda each: each.stat().st_mtime, reverse=True)[MAX_FOLDERS - 1 :]:
        shutil.rmtree(other, ignore_errors=True)


@dataclass(frozen=True)
class GgufFolders:
    """The folders that `gguf_folder` wrote."""

    folder: Path  # contains these folders

    def clear(self) -> None:
        """Delete all of these folders. Raises OSError if a file cannot be deleted."""
        for folder in self.folder.glob("*/"):
            if (folder / INDEX).is_file():
                shutil.rmtree(folder)


def gguf_files(folder: Path | None) -> list[Path]:
    """Return the GGUF files of a model folder, or an empty list if it is a folder of another kind.

    Raises:
        ModelError: If the folder is damaged.
    """
    return [Path(file) for file in _index(folder).get("files", ())]


def gguf_facts(folder: Path | None) -> dict[str, str | list[str] | None]:
    """Return the entries about files in the record of a model: its folder or its GGUF files, and the assumed settings."""
    files = gguf_files(folder)
    shown = None if folder is None or files else str(folder)
    return {"folder": shown, "files": list(map(str, files)), "assumed": list(_index(folder).get("assumed", ()))}


def gguf_title(folder: Path | None) -> str:
    """Return the name of a model's GGUF files for messages, or an empty string if it is a folder of another kind."""
    return _index(folder).get("title", "")


def naming_files(load: Callable[P, Loaded]) -> Callable[P, Loaded]:
    """Decorate `load_model` so that errors name a model's GGUF files instead of the folder with their small files."""

    @wraps(load)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Loaded:
        try:
            loaded = load(*args, **kwargs)
        except ModelError as problem:
            problem.message = _with_titles(problem.message)
            raise
        if loaded.tokenizer is not None:
            loaded.tokenizer.template_file = _with_titles(loaded.tokenizer.template_file)
        return loaded

    return wrapper


def _with_titles(text: str) -> str:
    """Replace the paths of small files, which users don't know, with the names of the GGUF files."""
    for folder in (each for parent in _parents() for each in parent.glob("*")):
        inside = rf"{re.escape(str(folder))}([/\\][\w.]+)?"
        text = re.sub(inside, lambda _, folder=folder: gguf_title(folder), text)
    return text


def _index(folder: Path | None) -> dict:
    if folder is None or not (folder / INDEX).is_file() or folder.parent not in _parents():
        return {}
    try:
        index = read_object(folder / INDEX)
        lists = {name: LIST.check(index.get(name), name) for name in ("files", "assumed")}
        return lists | {"title": TEXT.check(index.get("title"), "title")}
    except (OSError, ValueError) as problem:
        raise ModelError(f"{folder} is damaged: {first_line(problem)}", "delete this folder") from problem

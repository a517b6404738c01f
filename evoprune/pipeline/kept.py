"""What is kept for a model, for each user: files named by the fingerprint of its weights (`loading.fingerprint`).

So a file belongs to those weights wherever they lie. No torch.
"""

import json
import os
import re
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Generic, TypeVar

from evoprune.errors import EvopruneError, UsageError, first_line
from evoprune.model.strict_json import read_object

T = TypeVar("T")


def folder() -> Path:
    """EVOPRUNE_CONFIG_DIR, or `evoprune` where this user's settings are."""
    if named := os.environ.get("EVOPRUNE_CONFIG_DIR"):
        return Path(os.path.expanduser(named))
    return Path(os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config")) / "evoprune"


@dataclass(frozen=True)
class Shelf(Generic[T]):
    """The files of one kind.

    Attributes:
        name: of their folder.
        schema: the name of their format, with its version.
        kind: the dataclass that a file holds, of plain values. It refuses what cannot be: UsageError or ValueError.
        what: what a file is called in messages.
        again: the command that makes a new one.
    """

    name: str
    schema: str
    kind: type[T]
    what: str
    again: str

    def find(self, fingerprint: str) -> T | None:
        """What is kept for these weights; None for nothing.

        Raises:
            UsageError: its file is damaged or cannot be read.
        """
        path = self.path(fingerprint)
        try:
            content = read_object(path)
            if content.get("schema") != self.schema:
                raise ValueError(f"its schema is not {self.schema}")
            names = [field.name for field in fields(self.kind)]
            if missing := [name for name in names if name not in content]:
                raise ValueError(f"it has no {missing[0]}")
            return self.kind(**{name: content[name] for name in names})
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise _cannot("read", path, problem) from problem
        except (ValueError, EvopruneError) as problem:
            hint = f"remove it: evoprune inspect --forget-tuned {fingerprint[:12]}; or tune again: {self.again}"
            raise UsageError(f"the {self.what} {path} is damaged: {first_line(problem)}", hint) from problem

    def every(self) -> list[tuple[str, T | UsageError]]:
        """All fingerprints with a file, and what it holds; of a damaged one the error. The newest come first."""
        folder = self.path("").parent
        names = [path.stem for path in folder.glob("*.json") if re.fullmatch("[0-9a-f]{64}", path.stem)]
        found: list[tuple[str, T | UsageError]] = []
        for name in sorted(names):
            try:
                if kept := self.find(name):
                    found.append((name, kept))
            except UsageError as problem:
                found.append((name, problem))
        return sorted(found, key=lambda pair: getattr(pair[1], "created_utc", ""), reverse=True)

    def save(self, fingerprint: str, kept: T) -> Path:
        """Writes a file completely or not at all, in the place of an earlier one for the same weights; returns its path.

        Raises:
            UsageError: it cannot be written.
        """
        path = self.path(fingerprint)
        try:
            write(path, json.dumps({"schema": self.schema} | asdict(kept), indent=1) + "\n")
        except OSError as problem:
            raise _cannot("write", path, problem) from problem
        return path

    def remove(self, fingerprint: str) -> None:
        """Deletes a file.

        Raises:
            UsageError: there is none, or it cannot be deleted.
        """
        path = self.path(fingerprint)
        try:
            path.unlink()
        except OSError as problem:
            raise _cannot("remove", path, problem) from problem

    def path(self, fingerprint: str) -> Path:
        """Where the file for these weights is, or would be."""
        return folder() / self.name / f"{fingerprint}.json"


def write(path: Path, text: str) -> None:
    """Writes a file atomically, in a folder that only this user may read.

    Raises:
        OSError: it cannot be written.
    """
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _cannot(do: str, path: Path, problem: OSError) -> UsageError:
    hint = "make room or give rights there, or name another folder in EVOPRUNE_CONFIG_DIR"
    return UsageError(f"cannot {do} {path}: {problem.strerror}", hint)

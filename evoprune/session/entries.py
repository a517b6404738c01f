"""Files that are kept between runs, each named by a hash of everything that its content depends on.

They never fail a run: an entry that cannot be written is skipped.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import evoprune
from evoprune.errors import UsageError
from evoprune.keywords import brief, check_type

SUFFIX = ".safetensors"
HOUR = 3600.0
UNFINISHED = ".tmp"  # what the names of files end with while they are written


def cache_folder() -> Path:
    """EVOPRUNE_CACHE_DIR, or `evoprune` where this user's caches are."""
    standard = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "evoprune")
    return Path(os.path.expanduser(os.environ.get("EVOPRUNE_CACHE_DIR") or standard))


def write_file(path: Path, content: Callable[[BinaryIO], None]) -> None:
    """Writes a file completely or not at all. Raises OSError, and what `content` does."""
    handle, temporary = tempfile.mkstemp(suffix=UNFINISHED, dir=path.parent)
    try:
        with open(handle, "wb") as file:
            content(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@cache
def own_code() -> str:
    """A hash of this package's files, which change during development while the version does not."""
    files = sorted(Path(evoprune.__file__).parent.rglob("*.py"))
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


@dataclass(frozen=True)
class Entries:
    """A folder of such files; several processes may use it at a time."""

    folder: Path  # made when something is stored
    limit_bytes: int  # of all entries together; the least recently used are deleted

    def __post_init__(self):
        """Raises UsageError: `folder` is no path, or `limit_bytes` no number."""
        try:
            object.__setattr__(self, "folder", Path(self.folder))
            named = b"\0" not in os.fsencode(self.folder)
        except (TypeError, UnicodeEncodeError):
            named = False
        if not named:
            raise UsageError(f"the folder of a cache is {brief(self.folder)}, not a path", "give the path of a folder")
        object.__setattr__(self, "limit_bytes", check_type("limit_bytes", self.limit_bytes, int))

    def write(self, key: str, content: Callable[[BinaryIO], None]) -> bool:
        """Writes an entry, and deletes old ones beyond the limit; False where the system refuses. Raises what `content` does."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self.path(key), content)
        except OSError:
            return False
        self._make_room()
        return True

    def size(self) -> tuple[int, int]:
        """How many entries, and their bytes."""
        sizes = [stat.st_size for path, stat in self._files() if path.suffix == SUFFIX]
        return len(sizes), sum(sizes)

    def clear(self) -> int:
        """Deletes all entries, and nothing else in the folder; how many. Raises OSError if one cannot be deleted."""
        entries, _ = self.size()
        for path, _ in self._files():
            path.unlink(missing_ok=True)
        return entries

    def path(self, key: str) -> Path:
        """The file of an entry, which may not be there."""
        return self.folder / f"{key}{SUFFIX}"

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Regular files of this cache, entries and unfinished ones; another process may delete them at any time."""
        for ending in (f"{'[0-9a-f]' * 64}{SUFFIX}", f"tmp*{UNFINISHED}"):
            for path in self.folder.glob(ending):
                with suppress(OSError):
                    if path.is_file():
                        yield path, path.stat()

    def _make_room(self) -> None:
        """Deletes the least recently used entries beyond the limit, and unfinished files that a killed process left."""
        total = 0
        for path, stat in sorted(self._files(), key=lambda file: file[1].st_mtime, reverse=True):
            total += stat.st_size
            unfinished = path.suffix == UNFINISHED
            if total > self.limit_bytes if not unfinished else time.time() - stat.st_mtime > HOUR:
                with suppress(OSError):
                    path.unlink()

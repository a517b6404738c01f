"""Restricts an agent to files inside the folders allowed by the user."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from evoprune.errors import UsageError
from evoprune.video import Folder


class Folders:
    """Folders that an agent may read files from, including subfolders.

    Raises:
        UsageError: If a path isn't a folder.
    """

    def __init__(self, paths: Sequence[str]):
        self._folders = []
        for path in paths:
            folder = Path(path).expanduser()
            if not folder.is_dir():
                raise UsageError(f"--allow-dir {path} is no folder", "name one that exists")
            self._folders.append(folder.resolve())

    def __str__(self) -> str:
        return " or ".join(printable(folder) for folder in self._folders)

    def find(self, path: str) -> str:
        """Find a file or a folder of frames that the agent is allowed to read, and return its real path.

        Args:
            path: The path given by the agent, either absolute or relative to one of the folders.

        Raises:
            UsageError: If the folders don't contain the file, or if its path leads outside them through a symbolic link.
        """
        problem = UsageError(f"{path} is no file below an allowed folder", f"give the path of a file below {self}")
        try:
            given = Path(path).expanduser()
            for folder in self._folders:
                real = (folder / given).resolve()  # if `given` is absolute, the result doesn't depend on the folder
                if self._has(real) and real.exists():
                    break
            else:
                raise problem
            if not all(self._has(file.resolve()) for file in _read_with(real)):
                raise problem
        except (OSError, RuntimeError, ValueError) as unusable:  # also an unknown home folder or a symlink loop
            raise problem from unusable
        return str(real)

    def _has(self, real: Path) -> bool:
        return any(real.is_relative_to(folder) for folder in self._folders)


def _read_with(real: Path) -> Iterator[Path]:
    """Yield all files that may be read for a path: the images in a folder, and the subtitles next to it."""
    if real.is_dir():
        yield from real.iterdir()
    for found in Folder.subtitles_beside(str(real), os.listdir):
        yield from map(Path, found)


def printable(path: Path) -> str:
    """Convert a path to valid Unicode, as required in MCP messages."""
    return str(path).encode("utf-8", "backslashreplace").decode()

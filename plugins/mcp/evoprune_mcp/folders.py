"""Restricts an agent to files inside the folders allowed by the user."""

import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from evoprune.errors import EvopruneError, UsageError
from evoprune.files import in_natural_order, open_below
from evoprune.util import is_text, missing_hint
from evoprune.video import Folder, temporary_folder

PREFIX = "evoprune-mcp-"
MEDIA = Folder.VIDEOS + Folder.IMAGES + Folder.PHOTOS
MOST_LISTED = 500  # maximum number of files in a list
MOST_SEEN = 100_000  # maximum number of files and folders to look at for a list
MOST_IMAGES = 20  # a folder with more images is listed as a single folder of frames


@dataclass
class Listed:
    """A file or a folder of frames. `kind` is "video", "image", or "folder of frames", which has no `size_bytes`."""

    path: str
    kind: str
    size_bytes: int | None


@dataclass
class Listing:
    """Files in natural order. If `more` is true, others were left out because there are too many."""

    files: list[Listed]
    more: bool


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
                raise UsageError(f"--allow-dir {path} is not a folder", missing_hint(path, "give a folder that exists"))
            self._folders.append(folder.resolve())

    def __str__(self) -> str:
        return " or ".join(printable(folder) for folder in self._folders)

    @contextmanager
    def opened(self, paths: Sequence[str], subtitles: bool = True) -> Iterator[list[str]]:
        """Open files or folders of frames that the agent is allowed to read, and yield paths to read them by.

        On Linux, each file is opened only once, without following symbolic links that may have been replaced since they were
        checked. The yielded paths lie in a private folder, and lead to the open files. They exist only within the context. Errors
        raised within the context contain the real paths instead.

        Args:
            paths: The paths given by the agent, either absolute or relative to one of the folders.
            subtitles: Whether to also open the subtitle files next to each file.

        Raises:
            UsageError: If the folders don't contain a file, if its path leads outside them through a symbolic link, or if it can't
                be opened.
        """
        with ExitStack() as files:
            found = [self._open(path, subtitles, files) for path in paths]
            if sys.platform != "linux":
                yield [str(real) for real, _ in found]
                return
            try:
                # This folder is removed before the files are closed, because other files may get their descriptors.
                with temporary_folder(PREFIX) as private:
                    yield [_linked(Path(private, str(number)), *each) for number, each in enumerate(found)]
            except EvopruneError as problem:
                problem.message = real_paths(problem.message)
                problem.hint = problem.hint and real_paths(problem.hint)
                raise

    def listed(self, folder: str | None = None) -> Listing:
        """List the videos, images, and folders of frames that the agent is allowed to read, without opening them.

        Hidden files and symbolic links are left out.

        Args:
            folder: Where to look, including subfolders: a path given by the agent, or None for all folders.

        Raises:
            UsageError: If `folder` isn't one of the folders or inside them.
        """
        found: list[Listed] = []
        seen = 0
        for top in self._folders if folder is None else [self._resolved(folder)]:
            for inside, sizes in self._walk(top):
                shown = inside if len(self._folders) > 1 else inside.relative_to(self._folders[0])
                seen += 1 + len(sizes)
                images = {name for name in sizes if name.lower().endswith(Folder.IMAGES)}
                if len(images) > MOST_IMAGES:
                    found.append(Listed(str(shown), "folder of frames", None))
                    sizes = {name: size for name, size in sizes.items() if name not in images}
                for name in in_natural_order(sizes):
                    kind = "video" if name.lower().endswith(Folder.VIDEOS) else "image"
                    found.append(Listed(str(shown / name), kind, sizes[name]))
                if len(found) > MOST_LISTED or seen > MOST_SEEN:
                    return Listing(found[:MOST_LISTED], True)
        return Listing(found, False)

    def _walk(self, top: Path) -> Iterator[tuple[Path, dict[str, int]]]:
        """Yield a folder and its subfolders in natural order, each with the sizes of its videos and images in bytes."""
        with ExitStack() as files:
            walk: Iterator = os.walk(top)
            if hasattr(os, "fwalk"):  # doesn't follow symbolic links, even if a folder is replaced with a link
                walk = os.fwalk(dir_fd=self._descriptor(top, files, is_folder=True))
            for folder, folders, names, *descriptor in walk:
                folders[:] = in_natural_order(name for name in folders if name[0] != ".")
                sizes = {}
                for name in names:
                    if name.lower().endswith(MEDIA) and name[0] != "." and is_text(name):
                        with suppress(OSError):  # deleted, or in a folder without permission
                            place = {"dir_fd": descriptor[0]} if descriptor else {}
                            status = os.lstat(name if descriptor else os.path.join(folder, name), **place)
                            if stat.S_ISREG(status.st_mode):
                                sizes[name] = status.st_size
                yield top / folder, sizes

    def _resolved(self, path: str) -> Path:
        """Return the real path of a file or a folder given by the agent.

        Raises:
            UsageError: If the folders don't contain it.
        """
        with self._refused(path):
            given = Path(path).expanduser()
            for folder in self._folders:
                real = (folder / given).resolve()  # if `given` is absolute, the result doesn't depend on the folder
                if self._folder_of(real) and real.exists():
                    return real
            raise FileNotFoundError(path)

    @contextmanager
    def _refused(self, path: str) -> Iterator[None]:
        """Report errors about a path given by the agent. Files that are outside the folders are described like missing files."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as problem:  # also an unknown home folder or a symlink loop
            number = getattr(problem, "errno", None)
            if number in (errno.EMFILE, errno.ENFILE):
                raise UsageError(f"{path} has too many files", "increase the limit: ulimit -n") from problem
            if number == errno.EACCES:
                raise UsageError(f"{path} cannot be read: permission denied", "change its permissions") from problem
            message = f"{path} is no file below an allowed folder"
            raise UsageError(message, f"give the path of a file below {self}; list_videos finds them") from problem

    def _open(self, path: str, subtitles: bool, files: ExitStack) -> tuple[Path, dict[Path, int]]:
        """Open a file or the images in a folder, and the subtitle files next to it.

        Args:
            files: Closes the open files.

        Returns:
            The real path, and the descriptors of the open files by path.
        """
        real = self._resolved(path)
        with self._refused(path):
            more: list[Path] = []
            opened = {}
            if real.is_dir():
                names = os.listdir(self._descriptor(real, files, is_folder=True))
                more += [real / name for name in names if name.lower().endswith(Folder.IMAGES)]
            else:
                opened[real] = self._descriptor(real, files)
            if subtitles:
                more += [Path(name) for found in Folder.subtitles_beside(str(real), os.listdir) for name in found]
            for file in more:
                with suppress(FileNotFoundError):  # a broken link, or not a regular file, is not read
                    opened[file] = self._descriptor(file, files)
        return real, opened

    def _descriptor(self, path: Path, files: ExitStack, is_folder: bool = False) -> int:
        """Open a file or a folder. A symbolic link is followed if it leads to another place in the folders.

        Raises:
            OSError, ValueError: If the file isn't inside the folders, or can't be opened.
        """
        real = path.resolve()
        folder = self._folder_of(real)
        if folder is None:
            raise ValueError(f"{path} is not inside the folders")
        descriptor = open_below(folder, real, is_folder)
        files.callback(os.close, descriptor)
        return descriptor

    def _folder_of(self, real: Path) -> Path | None:
        return next((folder for folder in self._folders if real.is_relative_to(folder)), None)


def _linked(private: Path, real: Path, opened: dict[Path, int]) -> str:
    """Create links to open files in a private folder, and return the path that stands for `real`.

    The path of a link ends with the absolute path of the file itself, so `real_paths` can restore it.
    """
    link = private.joinpath(*real.parts[1:])
    link.parent.mkdir(parents=True)
    if real not in opened:
        link.mkdir()
    for path, descriptor in opened.items():
        private.joinpath(*path.parts[1:]).symlink_to(f"/proc/{os.getpid()}/fd/{descriptor}")
    return str(link)


def allow_open_files() -> None:
    """Let this process open as many files as the system permits, because all images in a folder of frames are open together."""
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def real_paths(text: str) -> str:
    """Replace the paths yielded by `Folders.opened` in a text with the real paths of the files."""
    private = re.escape(os.path.join(tempfile.gettempdir(), PREFIX))
    return re.sub(private + r"[^/\s]+/\d+(?=/)", "", text)


def printable(path: Path) -> str:
    """Convert a path to valid Unicode, as required in MCP messages."""
    return str(path).encode("utf-8", "backslashreplace").decode()

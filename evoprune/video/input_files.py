"""Finds all files that belong to an input, such as the images in a folder or the subtitle files next to a video."""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from evoprune.files import FileMemo, in_natural_order
from evoprune.util import file_state
from evoprune.video.info import Video
from evoprune.video.reader_table import FRAMES, READERS

SUBTITLES = (".srt", ".vtt", ".ass", ".ssa")  # subtitle file extensions, in order of preference
# Matches a language tag before a subtitle file extension, such as .en or .pt-BR.
LANGUAGE = re.compile(r"\.[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*")


class Folder:
    """The videos and images directly inside a folder, identified by their file extensions.

    Everything else is silently skipped, including hidden files, broken symbolic links, and subfolders (even if their names end with
    a video extension).

    Attributes:
        files: Paths of all videos, images, and photos, in natural order (clip2 before clip10), including the folder. Photos are
            images in formats that are not supported as video frames (`PHOTOS`).
        has_links: Whether any of these files is a symbolic link, whose target may change without changing the folder.

    Raises:
        OSError: The folder does not exist or cannot be read. Callers convert this error to a user-facing `VideoError` or
            `UsageError`.
        ValueError: The path contains a null byte.
    """

    IMAGES: ClassVar[tuple[str, ...]] = FRAMES
    PHOTOS: ClassVar[tuple[str, ...]] = tuple(
        extension
        for reader in READERS
        if reader.kind == "picture"
        for extension in reader.extensions
        if extension not in FRAMES
    )
    VIDEOS: ClassVar[tuple[str, ...]] = tuple(
        extension for reader in READERS if reader.kind == "video" for extension in reader.extensions
    )

    def __init__(self, path: str):
        with os.scandir(path) as entries:
            seen = [
                e
                for e in entries
                if e.name.lower().endswith(self.VIDEOS + self.IMAGES + self.PHOTOS) and e.name[0] != "."
            ]
            names = [e.name for e in seen if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)]
            self.has_links = any(e.is_symlink() for e in seen)
        self.files = [os.path.join(path, name) for name in in_natural_order(names)]

    @staticmethod
    def is_at(path: str | os.PathLike[str]) -> bool:
        """Return True if an input is a folder, whose images are read as one video. All other inputs are files.

        This is the only place that decides it: readers, caches, and batches call this function.
        """
        return os.path.isdir(path)

    @property
    def images(self) -> list[str]:
        """The paths in `files` that have an image extension (`IMAGES`), in the same order."""
        return [path for path in self.files if path.lower().endswith(self.IMAGES)]

    @property
    def videos(self) -> list[str]:
        """The paths in `files` that have a video extension (`VIDEOS`), in the same order."""
        return [path for path in self.files if path.lower().endswith(self.VIDEOS)]

    @classmethod
    def images_in(cls, path: str) -> list[str]:
        """Return the `images` of a folder. The folder is listed again only if its entries have changed. Raises the same errors."""

        def listed() -> tuple[list[str], bool]:
            inside = cls(path)
            return inside.images, inside.has_links

        return _images.get(path, listed, lambda found: not found[1])[0]

    @classmethod
    def files_read(cls, info: Video, times_s: Sequence[float]) -> list[str]:
        """Return the paths of the files that determine an input's frames at the given times, unless images are damaged.

        For a folder of images, these are the first image, which determines the frame size, and all images from the first time to
        the last. A damaged image is replaced with a neighbor, which may be missing from the list.

        Args:
            times_s: Times in seconds, in ascending order.

        Raises:
            OSError, ValueError: See `Folder`.
        """
        if not info.is_folder:
            return [info.path]
        images = cls.images_in(info.path)
        first, last = (image_number(info, time_s, len(images)) for time_s in (times_s[0], times_s[-1]))
        return [*images[:1], *images[max(0, first) : last + 1]]

    @staticmethod
    def subtitles_beside(path: str, listdir: Callable[[str], list[str]]) -> tuple[list[str], list[str]]:
        """Find the subtitle files next to a video.

        Args:
            listdir: Function that lists a folder: either `os.listdir` or a caching variant.

        Returns:
            Two lists of paths. The first list contains subtitle files with the same name as the video, in order of preference. The
            second list contains subtitle files with a language tag after the video's name, such as film.en.srt.

        Raises:
            OSError: The folder cannot be read.
        """
        path = os.path.normpath(path)
        folder, name = os.path.split(path)
        stem = name if Folder.is_at(path) else os.path.splitext(name)[0]
        exact = {}
        others = []
        for file in listdir(folder or "."):
            front, ending = os.path.splitext(file)
            if not file.startswith(stem) or ending.lower() not in SUBTITLES:
                continue
            if front == stem:
                exact[ending.lower()] = os.path.join(folder, file)
            elif LANGUAGE.fullmatch(front[len(stem) :]):
                others.append(os.path.join(folder, file))
        return [exact[ending] for ending in SUBTITLES if ending in exact], others


_images: FileMemo[tuple[list[str], bool]] = FileMemo(4)  # a folder's `images` and `has_links`


def image_number(info: Video, time_s: float, count: int) -> int:
    """Return the index of the image on screen at a given time in a folder of `count` images."""
    return int(min(max((time_s + info.tolerance_s) * info.fps, 0), count - 1))


def input_state(
    path: str, subtitles: str = "none", listdir: Callable[[str], list[str]] = os.listdir
) -> dict[str, Any] | None:
    """Return the state of all files that an input depends on (see `file_state`), without reading the files.

    These files are the video, the still image, or the images in the folder, plus any subtitle files.

    Args:
        subtitles: Path of a subtitle file, "none", or "auto" for all subtitle files next to the input.
        listdir: See `Folder.subtitles_beside`.

    Returns:
        The state, or None if any file is missing or cannot be read.
    """
    try:
        own = Folder(path).images if Folder.is_at(path) else [path]
        if subtitles == "auto":
            own += [file for found in Folder.subtitles_beside(path, listdir) for file in found]
        elif subtitles != "none":
            own.append(subtitles)
        return file_state(own)
    except (OSError, ValueError):
        return None

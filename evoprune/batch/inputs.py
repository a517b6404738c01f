"""The videos that a batch names: files, folders of images, and folders of videos, which stand for their videos."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from evoprune.errors import EvopruneError, UsageError
from evoprune.text import counted, missing_hint, shown, some
from evoprune.video.info import IMAGES, VIDEOS, files


class Wrong:
    """Collects what is wrong with the videos and rows of a batch, each with the hint that helps, for one error."""

    def __init__(self):
        self._found: list[tuple[str, str]] = []

    def add(self, message: str, hint: str) -> None:
        self._found.append((message, hint))

    @contextmanager
    def noting(self, place: str, hint: str) -> Iterator[None]:
        """Adds what a block raises, with the `place` before it; `hint` is for what has none of its own."""
        try:
            yield
        except (ValueError, EvopruneError) as problem:
            self.add(f"{place}{getattr(problem, 'message', problem)}", getattr(problem, "hint", None) or hint)

    def check(self, videos: Mapping[str, str], name: str = "") -> None:
        """Raises UsageError if anything was added, with missing `videos` (path: its place). `name`: of the file, said once."""
        if not self._found:
            return
        for path, place in videos.items():
            if not os.path.exists(path):
                usual = "paths in a file of rows are relative to it" if name else "check the path"
                self.add(f"{place}no such file: {shown(path)}", missing_hint(path, usual))
        first, *others = (message for message, _ in self._found)
        messages = [first, *(message.removeprefix(f"{name}, ") for message in others)]
        raise UsageError(some(messages, "; "), some(list(dict.fromkeys(hint for _, hint in self._found)), "; "))


def in_folders(videos: Iterable[str], wrong: Wrong) -> Iterator[str]:
    """The videos, with those in a folder of videos instead of the folder, in natural order of names; a folder of images is one.

    Among more videos than images, the images are left out, as thumbnails are. `wrong` collects folders that are unclear.
    """
    for video in videos:
        if not os.path.isdir(video):
            yield video
            continue
        try:
            images, found = files(video, IMAGES), files(video, VIDEOS)
        except OSError as problem:
            hint = "check the path, and whether you may read it"
            wrong.add(f"cannot read the folder {video}: {problem.strerror}", hint)
            continue
        if len(found) > len(images) or (images and not found):
            yield from found or [video]
        elif images:
            pattern = os.path.join(video, "*" + os.path.splitext(found[0])[1])
            hint = f"name the videos ({pattern}), or move the images to a folder of their own"
            wrong.add(
                f"the folder {video} holds {counted(len(images), 'image')} and {counted(len(found), 'video')}", hint
            )
        else:
            hint = f"folders inside it are not searched; files that count end in {', '.join((*VIDEOS, *IMAGES))}"
            wrong.add(f"neither videos nor images in the folder {video}", hint)


def left_out(video: str) -> str:
    """What a folder of videos holds besides them, as a line; empty where that is nothing. Hidden files do not count."""
    if not os.path.isdir(video) or not (videos := files(video, VIDEOS)) or len(videos) <= len(files(video, IMAGES)):
        return ""
    with os.scandir(video) as entries:
        others = [entry.is_dir() for entry in entries if entry.name[0] != "." and entry.path not in videos]
    counts = {"folder": sum(others), "other file": len(others) - sum(others)}
    skipped = [counted(count, noun) for noun, count in counts.items() if count]
    return f"{video}: {counted(len(videos), 'video')}; left out: {', '.join(skipped)}" if skipped else ""

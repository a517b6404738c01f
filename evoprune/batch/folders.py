"""Videos that are named on a command line: files, folders of images, and folders of videos, which stand for their videos."""

import os
from collections.abc import Iterable, Iterator

from evoprune.batch.wrong import Wrong
from evoprune.text import counted
from evoprune.video.listing import IMAGES, VIDEOS, files


def in_folders(videos: Iterable[str], wrong: Wrong) -> Iterator[str]:
    """The videos, with those in a folder of videos instead of the folder, in natural order of names.

    A folder of images is one video. Among more videos than images, the images are left out, as thumbnails are. Folders inside a
    folder are not searched.

    Args:
        wrong: collects folders that hold both, or neither, or that cannot be read.
    """
    for video in videos:
        if not os.path.isdir(video):
            yield video
            continue
        try:
            images, found = files(video, IMAGES), files(video, VIDEOS)
        except OSError as problem:
            wrong.add(
                f"cannot read the folder {video}: {problem.strerror}", "check the path, and whether you may read it"
            )
            continue
        if len(found) <= len(images) and bool(images) == bool(found):
            wrong.add(*_unclear(video, images, found))
        else:
            yield from found or [video]


def left_out(video: str) -> str:
    """What a folder of videos holds besides them, as a line; empty where that is nothing. Hidden files do not count."""
    if not os.path.isdir(video) or not (videos := files(video, VIDEOS)) or len(videos) <= len(files(video, IMAGES)):
        return ""
    with os.scandir(video) as entries:
        others = [entry.is_dir() for entry in entries if entry.name[0] != "." and entry.path not in videos]
    counts = {"folder": sum(others), "other file": len(others) - sum(others)}
    skipped = [counted(count, noun) for noun, count in counts.items() if count]
    return f"{video}: {counted(len(videos), 'video')}; left out: {', '.join(skipped)}" if skipped else ""


def _unclear(folder: str, images: list[str], videos: list[str]) -> tuple[str, str]:
    """Why a folder is neither one video nor several, and a hint."""
    if images:
        pattern = os.path.join(folder, "*" + os.path.splitext(videos[0])[1])
        return (
            f"the folder {folder} holds {counted(len(images), 'image')} and {counted(len(videos), 'video')}",
            f"name the videos ({pattern}), or move the images to a folder of their own",
        )
    return (
        f"neither videos nor images in the folder {folder}",
        f"folders inside it are not searched; files that count end in {', '.join((*VIDEOS, *IMAGES))}",
    )

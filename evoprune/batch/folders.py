"""Videos that are named on a command line: files, folders of images, and folders of videos, which stand for their videos."""

import os
from collections.abc import Iterable, Iterator

from evoprune.batch.wrong import Wrong
from evoprune.text import counted
from evoprune.video.listing import IMAGES, VIDEOS, files


def in_folders(videos: Iterable[str], wrong: Wrong) -> Iterator[str]:
    """The videos, with those in a folder of videos instead of the folder, in natural order of names.

    A folder of images is one video. Folders inside a folder are not searched.

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
        if bool(images) == bool(found):
            wrong.add(*_unclear(video, len(images), len(found)))
        else:
            yield from found or [video]


def _unclear(folder: str, images: int, videos: int) -> tuple[str, str]:
    """Why a folder is neither one video nor several, and a hint."""
    if images:
        return (
            f"the folder {folder} holds {counted(images, 'image')} and {counted(videos, 'video')}",
            "images are the frames of one video: name the files of the videos, or move the images to a folder of their own",
        )
    return (
        f"neither videos nor images in the folder {folder}",
        f"folders inside it are not searched; files that count end in {', '.join((*VIDEOS, *IMAGES))}",
    )

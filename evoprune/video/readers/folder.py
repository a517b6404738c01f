"""Reads a folder of images as a video, in natural order (frame2 before frame10). images.py decodes the images."""

import os
import re
from collections.abc import Iterator, Sequence

from evoprune.errors import VideoError
from evoprune.files import FileMemo
from evoprune.util import counted
from evoprune.video.info import FOLDER, FrameTimes, Video
from evoprune.video.input_files import Folder
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.images import MAX_BYTES, ImageSequence

FRACTION = re.compile(r"[0-9]\.([0-9]+)")

_listed: FileMemo[tuple[list[str], bool]] = FileMemo(1)  # the result of `_list` for the folder read most recently


def claims(path: str) -> bool:
    return Folder.is_at(path)


def probe(path: str, fps: float) -> Video:
    """Return the metadata of a folder of images. See `ImageSequence.probe`. Also raises the errors of `list_images`."""
    return _images(path).probe(FOLDER, fps)


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Yield the image on screen at each requested time. See `ImageSequence.read`."""
    return _images(info.path).read(info, times_s, damaged)


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """Decode all images. See `ImageSequence.intervals`."""
    return _images(info.path).intervals(info, damaged)


def frame_times(info: Video) -> FrameTimes:
    """Return the times of all images."""
    return _images(info.path).frame_times(info)


def _images(folder: str) -> ImageSequence:
    paths = list_images(folder)
    return ImageSequence(folder, "folder", paths, lambda number: _content(paths[number]))


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else b""


def list_images(folder: str) -> list[str]:
    """Return the paths of the images in a folder, in display order.

    Raises:
        VideoError: The folder cannot be read, contains no images, or contains file names with an ambiguous order. Names with
            fractions of different lengths are ambiguous, because they may be decimals (0.25 before 0.5) or separate numbers (1.9
            before 1.10).
    """
    try:
        return _listed.get(folder, lambda: _list(folder), lambda found: not found[1])[0]
    except (OSError, ValueError) as error:
        raise VideoError(f"cannot read the folder {folder}: {ffmpeg.reason(error)}", "check the path") from error


def _list(folder: str) -> tuple[list[str], bool]:
    """Return a folder's images, and whether it contains symbolic links. For errors, see `list_images`."""
    inside = Folder(folder)
    images = inside.images
    if not images:
        hint = f"files that count as images: {', '.join(Folder.IMAGES)}; evoprune batch takes folders of videos"
        message = f"no images in the folder {folder}"
        if inside.videos:
            message += f", but {counted(len(inside.videos), 'video')}"
            hint = f"give the path of a video, such as {inside.videos[0]}; evoprune batch takes folders of videos"
        raise VideoError(message, hint)
    names = [os.path.basename(os.path.splitext(image)[0]) for image in images]
    if len({len(fraction) for name in names for fraction in FRACTION.findall(name)}) > 1:
        hint = "use the same number of decimals in all names, such as 0.25 and 0.50, or whole numbers"
        raise VideoError(f"the numbers in the file names in {folder} have no clear order", hint)
    return images, inside.has_links

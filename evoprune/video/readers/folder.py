"""Reads a folder of images as a video. The images are treated as video frames, in natural order (frame2 before frame10)."""

import io
import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import av
from av.video.frame import VideoFrame

from evoprune.errors import LFS, LFS_HINT, UsageError, VideoError
from evoprune.files import FileMemo
from evoprune.util import counted
from evoprune.video.info import FOLDER, Video
from evoprune.video.input_files import Folder, image_number
from evoprune.video.readers import colour, ffmpeg

FRACTION = re.compile(r"[0-9]\.([0-9]+)")
MAX_BYTES = 2**29  # larger image files are treated as damaged


class _Image(NamedTuple):
    """Properties of an image. The width and height are those after rotation."""

    codec: str
    pix_fmt: str
    width: int
    height: int
    hdr_format: str | None


_described: FileMemo[_Image | None] = FileMemo(64)  # the results of `_describe` for the first images of recent folders
_listed: FileMemo[tuple[list[str], bool]] = FileMemo(1)  # the result of `_list` for the folder read most recently


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


def probe(folder: str, fps: float) -> Video:
    """Return the metadata of a folder of images treated as a video. The first decodable image determines the frame size.

    Args:
        fps: Number of images per second of video.

    Raises:
        UsageError: `fps` is not finite and positive.
        VideoError: No image can be decoded, or `list_images` raised VideoError.
    """
    if not 0 < fps < math.inf:
        raise UsageError(f"{fps} images per second is not a valid frame rate", "give a number above 0")
    images = list_images(folder)
    described = (_described.get(image, lambda image=image: _describe(image)) for image in images)
    first = next(filter(None, described), None)
    if first is None:
        from evoprune.video.readers.picture import check_size

        with open(images[0], "rb") as image:
            if image.read(len(LFS)) == LFS:
                raise VideoError(f"{images[0]} is a git-lfs pointer", LFS_HINT)
        # Check the size, because FFmpeg reports the same error for oversized and damaged images.
        check_size(images[0])
        raise VideoError(f"no image in the folder {folder} can be decoded", "the files are damaged or not images")
    return Video(
        path=folder,
        duration_s=len(images) / fps,
        width=first.width,
        height=first.height,
        rotation_deg=0,  # each image is rotated according to its own EXIF data
        codec=first.codec,
        pix_fmt=first.pix_fmt,
        container=FOLDER,
        fps=fps,
        variable_rate=False,
        frames_total=len(images),
        hdr=first.hdr_format is not None,
        hdr_format=first.hdr_format,
    )


def _describe(path: str) -> _Image | None:
    """Return an image's properties, or None if it is damaged or too large."""
    decoded = decode_image(path)
    if decoded is None:
        return None
    codec, frame, (rotation, _) = decoded
    width, height = ffmpeg.turned_size((frame.width, frame.height), rotation)
    return _Image(codec, frame.format.name, width, height, colour.hdr_format(frame))


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Yield the image on screen at each requested time. See the docstring of the `readers` package.

    Only the required images are opened, one at a time. A damaged image is replaced with the previous image or, if there is none,
    with the first decodable image. `damaged` is called with the index of each damaged image.
    """
    images = list_images(info.path)
    converter = colour.Converter(info.path)
    # `done` is the index of the last opened image, and `current` is the index of the image on screen.
    done = -1
    current = -1
    rgb = None
    for time in times_s:
        wanted = image_number(info, time, len(images))
        later = range(wanted + 1, len(images)) if rgb is None else ()
        for i in chain(range(wanted, done, -1), later):
            if decoded := decode_image(images[i]):
                _, frame, turn = decoded
                width, height = ffmpeg.turned_size((frame.width, frame.height), turn[0])
                if info.fitted(width, height) != (info.width, info.height):
                    shapes = f"{images[i]} is {width}x{height}, the first is {info.width}x{info.height}"
                    hint = (
                        "a folder is one video, with frames of one shape; to ask about images, list them: a.jpg b.jpg"
                    )
                    raise VideoError(f"images of different shapes: {shapes}", hint)
                current = i
                rgb = ffmpeg.to_rgb(frame, info.width, info.height, *turn, converter)
                break
            damaged(i)
        done = max(done, wanted, current)
        if rgb is None:
            raise VideoError(f"no image in the folder {info.path} can be decoded", "the files are damaged")
        yield ffmpeg.Shown(current / info.fps, rgb)


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """Decode all images. Yields the timestamp and duration in seconds, and True because every image is treated as a keyframe."""
    for i, image in enumerate(list_images(info.path)):
        if decode_image(image) is None:
            damaged(i)
        else:
            yield i / info.fps, 1 / info.fps, True


def decode_image(path: str) -> tuple[str, VideoFrame, tuple[int, bool]] | None:
    """Decode an image. Returns the codec, pixels, and orientation (see `ffmpeg.orientation`), or None if damaged or too large."""
    try:
        content = b""
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= MAX_BYTES:
                content = file.read()
        with ffmpeg.open_bytes(io.BytesIO(content), max_pixels=ffmpeg.MAX_PIXELS) as container:
            stream = ffmpeg.video_stream(container, path, max_pixels=ffmpeg.MAX_PIXELS)
            # Without "explode", FFmpeg would decode a truncated JPEG to an image with a gray lower part.
            stream.codec_context.options = stream.codec_context.options | {"err_detect": "explode"}
            frame = next(ffmpeg.decoded_frames(stream, ffmpeg.packets(container, stream)), None)
            if frame is None:
                return None
            return stream.codec_context.codec.canonical_name, frame, ffmpeg.orientation(frame)
    except (av.error.FFmpegError, OSError, ValueError, VideoError):
        return None

"""A folder of images as a video: each image is a frame, in natural order of names (frame2 before frame10)."""

import io
import math
import os
from collections.abc import Iterator, Sequence

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from evoprune.errors import UsageError, VideoError
from evoprune.video.info import FOLDER_FPS, VideoInfo
from evoprune.video.listing import IMAGES, files
from evoprune.video.readers.container import TOLERANCE_S, Damage, first_frame, ignore_damage, open_bytes, video_stream
from evoprune.video.readers.exif import exif_orientation
from evoprune.video.readers.picture_size import check_picture_size
from evoprune.video.readers.pixels import orientation, to_rgb

CONTAINER = "folder"
# Larger files count as damaged.
MAX_BYTES = 2**29
SAME_SHAPE = 0.02  # by which the ratios of width and height of a video's images may differ, relative


def list_images(folder: str) -> list[str]:
    """Paths of the images in a folder, in display order. Hidden files are left out.

    Raises:
        VideoError: the folder cannot be read, or has no image.
    """
    try:
        images = files(folder, IMAGES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"cannot read the folder {folder}: {reason}", "check the path") from error
    if not images:
        hint = f"files that count as images: {', '.join(IMAGES)}; for a folder of videos: evoprune batch {folder}"
        raise VideoError(f"no images in the folder {folder}", hint)
    return images


def probe_folder(folder: str, fps: float = FOLDER_FPS) -> VideoInfo:
    """Metadata of a folder as a video. Opens images up to the first that can be decoded; it sets the size.

    Raises:
        UsageError: `fps` is not above 0.
        VideoError: no images, or none that can be decoded.
    """
    if not 0 < fps < math.inf:
        raise UsageError(f"{fps} images per second make no video", "give a number above 0")
    images = list_images(folder)
    for image in images:
        decoded = decode_image(image)
        if decoded is not None:
            break
    else:
        check_picture_size(images[0])
        raise VideoError(f"no image in the folder {folder} can be decoded", "the files are damaged, or no images")
    codec, frame, (rotation, _) = decoded
    size = frame.width, frame.height
    width, height = size if rotation % 180 == 0 else size[::-1]
    return VideoInfo(
        path=folder,
        duration_s=len(images) / fps,
        width=width,
        height=height,
        rotation_deg=0,  # each image is turned by its own EXIF data
        codec=codec,
        pix_fmt=frame.format.name,
        container=CONTAINER,
        fps=fps,
        variable_rate=False,
        frames_total=len(images),
        start_s=0.0,
        tags={},
    )


def read(
    info: VideoInfo, times_s: Sequence[float], damaged: Damage = ignore_damage
) -> Iterator[tuple[float, np.ndarray]]:
    """The image on screen at each time: its own time in seconds from the first image, and uint8 `[H, W, 3]` as displayed.

    Opens only the images that are needed, one at a time. A damaged image is replaced by the one before it, at the beginning
    by the first that can be decoded. `times_s` ascend. `damaged` is called with the index of each damaged image.

    Raises:
        VideoError: the folder cannot be read (any more), or none of its images can be decoded.
    """
    images, reformatter = list_images(info.path), VideoReformatter()
    last = len(images) - 1
    done, current, rgb = -1, -1, None  # `done`: the last image that was opened; `current`: the one on screen
    for time in times_s:
        wanted = int(min(max((time + TOLERANCE_S) * info.fps, 0), last))
        candidates = [*range(wanted, done, -1), *(range(wanted + 1, last + 1) if rgb is None else ())]
        for i in candidates:
            decoded = decode_image(images[i])
            if decoded is not None:
                _, frame, turn = decoded
                _check_shape(images[i], frame, turn[0], info)
                current, rgb = i, to_rgb(frame, info.width, info.height, *turn, reformatter)
                break
            damaged(i)
        done = max(done, wanted, current)
        if rgb is None:
            raise VideoError(f"no image in the folder {info.path} can be decoded", "the files are damaged")
        yield current / info.fps, rgb


def _check_shape(image: str, frame: VideoFrame, rotation: int, info: VideoInfo) -> None:
    """Raises VideoError if an image has another shape than the first, to which it would be stretched."""
    width, height = (frame.width, frame.height) if rotation % 180 == 0 else (frame.height, frame.width)
    if abs(width * info.height - height * info.width) > SAME_SHAPE * width * info.height:
        message = f"images of different shapes: {image} has {width}x{height}, the first {info.width}x{info.height}"
        hint = "a folder is a video, whose frames have one shape; pictures are asked about one by one: a.jpg b.jpg"
        raise VideoError(message, hint)


def decode_image(path: str) -> tuple[str, VideoFrame, tuple[int, bool]] | None:
    """An image's codec, stored pixels and orientation (see `pixels.orientation`); None if it is damaged or too large."""
    try:
        with open(path, "rb") as file:
            content = file.read() if os.fstat(file.fileno()).st_size <= MAX_BYTES else b""
        with open_bytes(io.BytesIO(content)) as container:
            stream = video_stream(container, path)
            # Without it, half a JPEG decodes to a picture with a grey bottom.
            stream.codec_context.options = stream.codec_context.options | {"err_detect": "explode"}
            frame = first_frame(container, stream)
            if frame is None:
                return None
            return stream.codec_context.codec.canonical_name, frame, exif_orientation(content) or orientation(frame)
    except (av.error.FFmpegError, OSError, ValueError, VideoError):
        return None

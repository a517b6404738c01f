"""Reads still images using Pillow and resizes them in the same way as Hugging Face's image processors.

An image is rotated according to its EXIF data, as in `transformers.image_utils.load_image`. Transparent areas become white, as in
`transformers.image_transforms.convert_to_rgb` since 5.21. Unlike transformers, which clips 16-bit gray levels, this module keeps
their upper 8 bits.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, features

from evoprune.errors import VideoError
from evoprune.util import install_hint, overlapping
from evoprune.video.info import PICTURE, FrameTimes, Video
from evoprune.video.readers import ffmpeg
from evoprune.video.signatures import head_of, is_sequence, picture_format

MAX_BYTES = 2**29  # larger files are rejected before they are read
CONVERT_HINT = "convert it to JPEG or PNG"
ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")  # formats with animations that are treated as videos


def claims(path: str) -> bool:
    """Return True if a file is a still image. The file must have an image signature.

    Animations and JPEG sequences are not still images, because they are treated as videos.
    """
    head = head_of(path)
    name = picture_format(head)
    if name == "AVIF" and not features.check("avif"):
        return not is_sequence(head)
    if name not in (*ANIMATIONS, "JPEG"):
        return True
    try:
        with _header(path, name) as image:
            if name in ANIMATIONS:
                return not getattr(image, "is_animated", False)
            if image.format != "JPEG":  # Pillow calls JPEGs with additional images "MPO"
                return True
        with ffmpeg.open_video(path) as container:
            return container.format.name != "mjpeg"
    except Exception:  # the file is damaged, which the reader will report
        return name != "GIF"


@overlapping
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


@contextmanager
def _header(path: str, name: str | None, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    try:
        with _without_warnings(), _opened(content or path, name) as image:
            if image.width * image.height > ffmpeg.MAX_PIXELS:
                raise too_large(path)
            yield image
    except Image.DecompressionBombError:
        raise too_large(path) from None


def _opened(file: str | BinaryIO, name: str | None) -> Image.Image:
    if name != "HEIC":
        return Image.open(file, formats=[name])
    try:
        from pillow_heif import HeifImageFile
    except ImportError as error:
        raise VideoError(
            f"{file} is in HEIC, which needs pillow-heif", f"{install_hint('heic')}, or {CONVERT_HINT}"
        ) from error
    return HeifImageFile(file)  # don't register it with Pillow, because evoprune may be running inside another program


def check_size(content: bytes, path: str) -> None:
    """Raise VideoError if a file's content is an image with more than `MAX_PIXELS` pixels. Other content passes the check."""
    try:
        with _header(path, picture_format(content), io.BytesIO(content)):
            pass
    except Exception as problem:
        if isinstance(problem, VideoError):  # any other error means it isn't an image
            raise


def too_large(path: str) -> VideoError:
    message = f"the image {path} is too large: evoprune reads at most {ffmpeg.MAX_PIXELS // 10**6} megapixels"
    return VideoError(message, "make it smaller; the model sees at most a few megapixels of it")


def probe(path: str, fps: float) -> Video:
    """Read a still image's metadata from its header. See the docstring of the `readers` package."""
    with opened(path) as image:
        rotation, mirrored = orientation(image)
        size = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # in recent versions of Pillow, `size` is already rotated
            size = image.tag_v2[TiffImagePlugin.IMAGEWIDTH], image.tag_v2[TiffImagePlugin.IMAGELENGTH]
        width, height = ffmpeg.turned_size(size, rotation)
        comment = image.info.get("comment", "")
        tags = {}
        with suppress(UnicodeDecodeError):
            if isinstance(comment, bytes):
                comment = comment.decode()
            if 0 < len(comment) <= ffmpeg.TAG_CHARACTERS:
                tags["comment"] = comment
        return Video(
            path=path,
            duration_s=None,
            width=width,
            height=height,
            rotation_deg=rotation,
            codec=(image.format or "").lower().replace("mpo", "jpeg").replace("heif", "heic"),
            pix_fmt=image.mode,
            container=PICTURE,
            frames_total=1,
            tags=tags,
            mirrored=mirrored,
        )


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Yield a still image once for each requested time, resized to the size in `info`. Raises the same errors as `probe`."""
    with opened(info.path) as image:
        image.load()
        # An image in a HEIC may be larger than specified in the header.
        if image.width * image.height > ffmpeg.MAX_PIXELS:
            raise too_large(info.path)
        upright = image if image.format == "HEIF" else ImageOps.exif_transpose(image)
        rgb = converted(upright, info.path)
    if rgb.size != (info.width, info.height):
        rgb = rgb.resize((info.width, info.height), Image.Resampling.BICUBIC)
    pixels = np.asarray(rgb)
    for _ in times_s:
        yield ffmpeg.Shown(0.0, pixels)


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """Raise VideoError, because an image has only one frame."""
    raise VideoError(f"{info.path} is an image, which has nothing to scan", "leave out --scan")


def frame_times(info: Video) -> FrameTimes:
    """Return the time of an image's only frame."""
    return FrameTimes([0.0], 1)


def orientation(image: Image.Image) -> tuple[int, bool]:
    """Return the rotation and flip specified by an image's EXIF data, in the same format as `ffmpeg.orientation`.

    The EXIF orientation of a HEIC is ignored, as required by ISO 23008-12.
    """
    if image.format == "HEIF":  # libheif has already rotated the image as specified by the file's own properties
        return 0, False
    return ffmpeg.ORIENTATIONS.get(image.getexif().get(ffmpeg.ORIENTATION_TAG), (0, False))


@contextmanager
def opened(path: str, *, animated: bool = False) -> Iterator[Image.Image]:
    """Open an image using Pillow, reading only the header.

    Raises:
        VideoError: The file cannot be read, is too large, requires a missing package, has more than one page, or is an animation
            while `animated` is False.
    """
    name = picture_format(head_of(path))
    if name is None:
        raise VideoError(f"{path} is no longer an image", CONVERT_HINT)
    if name == "AVIF" and not features.check("avif"):
        raise VideoError(f"{path} is in AVIF, which this version of Pillow does not support", CONVERT_HINT)
    try:
        if os.stat(path).st_size > MAX_BYTES:
            raise too_large(path)
        with _header(path, name) as image:
            ffmpeg.alive()
            ffmpeg.picture_size(image.width * image.height)
            tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
            if 50706 in tags or tags.get(254, 0) & 1:  # the file is a DNG, or its first image is only a reduced preview
                raise VideoError(f"{path} is a camera raw file, of which only the preview could be read", CONVERT_HINT)
            # Don't count the images, because counting a TIFF's pages would require reading the entire file.
            several = getattr(image, "is_animated", False)
            if several and image.format == "TIFF":
                raise VideoError(f"{path} has several pages", "save one page as a JPEG or PNG")
            # If an MPO or HEIC contains multiple images, Pillow opens the actual photo, which is the first or primary image.
            if several and not animated and image.format not in ("MPO", "HEIF"):
                raise VideoError(f"{path} is an animation", "save it as a GIF or MP4, or one frame of it as a PNG")
            yield image
    except (VideoError, MemoryError):
        raise
    except Exception as problem:  # a damaged file may raise any exception
        hint = f"is it complete? supported image formats: {', '.join(ffmpeg.PICTURES)}"
        raise VideoError(f"cannot read the image {path}: {str(problem) or type(problem).__name__}", hint) from problem


def converted(image: Image.Image, path: str) -> Image.Image:
    """Convert an image to 8-bit RGB with a white background. Raises VideoError for unsupported pixel types."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() > 65535:
            raise VideoError(f"{path} has more than 16 bits per channel, which is not supported", CONVERT_HINT)
        if transparent is not None:
            levels = np.where(levels == transparent, 65535, levels)
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise VideoError(f"{path} has floating-point pixels, which are not supported", CONVERT_HINT)
    if "A" in image.getbands() or "a" in image.getbands() or transparent is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")

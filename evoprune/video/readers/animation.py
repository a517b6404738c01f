"""Reads animations that FFmpeg renders differently from browsers: animated WebP, and animated AVIF with transparency.

Pillow decodes the frames in order. Transparent areas become white, as in still images.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import numpy as np
from PIL import Image

from evoprune.errors import VideoError
from evoprune.video.info import ANIMATIONS, FrameTimes, Video
from evoprune.video.readers import ffmpeg, picture, probing, pyav
from evoprune.video.signatures import head_of, picture_format

WEBP, AVIF = ANIMATIONS.values()
SHORTEST_S = 0.01  # browsers display frames with this duration or less for `INSTEAD_S` instead
INSTEAD_S = 0.1
CHUNK_BYTES = 8  # size of a WebP chunk header, which contains the chunk's type and length


def claims(path: str) -> bool:
    """Return True if a file is an animation supported by this module. Callers must first rule out still images."""
    name = picture_format(head_of(path))
    if name not in ANIMATIONS:
        return False
    if name == "WEBP":
        return True
    try:
        with picture.opened(path, animated=True) as image:
            return "A" in image.getbands()
    except VideoError:
        return False


def probe(path: str, fps: float) -> Video:
    """Read an animation's metadata, without decoding any frames of a WebP. See the docstring of the `readers` package."""
    with picture.opened(path, animated=True) as image:
        width, height = image.size
        if width * height > ffmpeg.MAX_VIDEO_PIXELS:
            hint = f"the limit is {ffmpeg.MAX_VIDEO_PIXELS // 10**6} megapixels for each frame"
            raise VideoError(f"{path} states a frame size of {width:,} x {height:,} pixels", hint)
        if image.format == "AVIF":
            return replace(probing.probe(path), container=AVIF, pix_fmt=image.mode, other_tracks=0)
        rotation, mirrored = picture.orientation(image)
    lengths = _lengths(path)
    duration = sum(lengths)
    probing.check_decodable(path, width * height, len(lengths))
    width, height = ffmpeg.turned_size((width, height), rotation)
    return Video(
        path=path,
        duration_s=duration,
        width=width,
        height=height,
        rotation_deg=rotation,
        codec=WEBP,
        pix_fmt=image.mode,
        container=WEBP,
        fps=len(lengths) / duration,
        variable_rate=max(lengths) - min(lengths) > probing.RATE_JITTER_S,
        frames_total=len(lengths),
        mirrored=mirrored,
    )


def frame_times(info: Video) -> FrameTimes:
    """Return the display times of all frames in an animation."""
    return FrameTimes(_begins(info), info.frames_total or 0)


def _begins(info: Video) -> list[float]:
    if info.container == AVIF:
        return pyav.frame_times(replace(info, container=ffmpeg.MOV)).times_s
    return list(accumulate(_lengths(info.path), initial=0.0))[:-1]


def read(info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
    """Yield the frame on screen at each requested time. See the docstring of the `readers` package."""
    begins = _begins(info)
    size = ffmpeg.turned_size((info.width, info.height), info.rotation_deg)
    with picture.opened(info.path, animated=True) as image:
        done = shown = -1  # if a frame is damaged, the previous frame stays on screen
        rgb = None
        for time in times_s:
            wanted = max(0, bisect_right(begins, time + info.tolerance_s) - 1)
            while done < wanted or (rgb is None and done < len(begins) - 1):
                done += 1
                if (frame := _decoded(image, done, damaged)) is not None:
                    shown, rgb = done, frame
            if rgb is None:
                raise ffmpeg.nothing_decoded(info.path)
            if isinstance(rgb, Image.Image):
                pixels = picture.converted(rgb, info.path)
                if pixels.size != size:
                    pixels = pixels.resize(size, Image.Resampling.BICUBIC)
                rgb = ffmpeg.rotated(np.asarray(pixels), info.rotation_deg, info.mirrored)
            yield ffmpeg.Shown(begins[shown], rgb)


def intervals(info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
    """Decode all frames. See the docstring of the `readers` package. Only the first frame is treated as a keyframe."""
    begins = _begins(info)
    with picture.opened(info.path, animated=True) as image:
        for number, (begin, end) in enumerate(zip(begins, [*begins[1:], info.length_s], strict=True)):
            if _decoded(image, number, damaged) is not None:
                yield begin, end - begin, number == 0


def _decoded(image: Image.Image, number: int, damaged: ffmpeg.Damage) -> Image.Image | None:
    """Decode a frame and return a copy, or None if the frame is damaged. Frames must be requested in order."""
    ffmpeg.alive()
    try:
        image.seek(number)
        image.load()
        return image.copy()
    except MemoryError:
        raise
    except Exception:  # a damaged file may raise any exception
        damaged(number)
        return None


def _lengths(path: str) -> list[float]:
    """Read an animated WebP's frame durations in seconds from its chunk headers. Raises VideoError if there are no frames."""
    lengths = []
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        at = 12  # the first chunk follows "RIFF", a length, and "WEBP"
        while at + CHUNK_BYTES <= size and len(lengths) < probing.MAX_PACKETS:
            file.seek(at)
            head = file.read(CHUNK_BYTES + 16)
            length = int.from_bytes(head[4:8], "little")
            if head[:4] == b"ANMF" and len(head) == CHUNK_BYTES + 16:
                seconds = int.from_bytes(head[20:23], "little") / 1000
                lengths.append(seconds if seconds > SHORTEST_S else INSTEAD_S)
            at += CHUNK_BYTES + length + length % 2
    if not lengths:
        raise ffmpeg.nothing_decoded(path)
    return lengths

"""Treats a sequence of images as the frames of a video."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import av
from av.video.frame import VideoFrame

from evoprune.errors import LFS, LFS_HINT, UsageError, VideoError
from evoprune.files import FileMemo
from evoprune.video.info import FrameTimes, Video
from evoprune.video.input_files import image_number
from evoprune.video.readers import colour, ffmpeg

MAX_BYTES = 2**29  # larger image files are treated as damaged


class _Image(NamedTuple):
    """Properties of an image. The width and height are those after rotation."""

    codec: str
    pix_fmt: str
    width: int
    height: int
    hdr_format: str | None


_described: FileMemo[_Image | None] = FileMemo(64)  # the results of `_describe` for the first images of recent folders


@dataclass(frozen=True)
class ImageSequence:
    """Images in display order, of which each is on screen equally long.

    A damaged image is replaced with the previous image or, if there isn't one, with the first decodable image.
    """

    path: str  # path of the input
    noun: str  # kind of input, for messages, such as "folder"
    names: Sequence[str]  # name of each image for messages; the path if the image is a file
    content: Callable[
        [int], bytes
    ]  # returns the bytes of an image, by index; if it raises OSError, the image is damaged

    def probe(self, container: str, fps: float) -> Video:
        """Return the metadata of the video. The first decodable image determines the frame size.

        Args:
            container: Value of `Video.container`.
            fps: Number of images per second of video.

        Raises:
            UsageError: `fps` is not finite and positive.
            VideoError: No image can be decoded.
        """
        if not 0 < fps < math.inf:
            raise UsageError(f"{fps} images per second is not a valid frame rate", "give a number above 0")
        described = (_described.get(name, partial(self._describe, i)) for i, name in enumerate(self.names))
        first = next(filter(None, described), None)
        if first is None:
            from evoprune.video.readers.picture import check_size  # imports Pillow

            name = self.names[0]
            content = self.content(0)
            if content.startswith(LFS):
                raise VideoError(f"{name} is a git-lfs pointer", LFS_HINT)
            # Check the size, because FFmpeg reports the same error for oversized and damaged images.
            check_size(content, name)
            raise VideoError(
                f"no image in the {self.noun} {self.path} can be decoded", "the files are damaged or not images"
            )
        return Video(
            path=self.path,
            duration_s=len(self.names) / fps,
            width=first.width,
            height=first.height,
            rotation_deg=0,  # each image is rotated according to its own EXIF data
            codec=first.codec,
            pix_fmt=first.pix_fmt,
            container=container,
            fps=fps,
            variable_rate=False,
            frames_total=len(self.names),
            hdr=first.hdr_format is not None,
            hdr_format=first.hdr_format,
        )

    def read(self, info: Video, times_s: Sequence[float], damaged: ffmpeg.Damage) -> ffmpeg.Frames:
        """Yield the image on screen at each requested time. See the docstring of the `readers` package.

        Only the required images are opened, one at a time. `damaged` is called with the index of each damaged image.
        """
        converter = colour.Converter(info.path)
        # `done` is the index of the last opened image, and `current` is the index of the image on screen.
        done = -1
        current = -1
        rgb = None
        count = len(self.names)
        for time in times_s:
            wanted = image_number(info, time, count)
            later = range(wanted + 1, count) if rgb is None else ()
            for i in chain(range(wanted, done, -1), later):
                if decoded := self._decoded(i):
                    _, frame, turn = decoded
                    width, height = ffmpeg.turned_size((frame.width, frame.height), turn[0])
                    if info.fitted(width, height) != (info.width, info.height):
                        shapes = f"{self.names[i]} is {width}x{height}, the first is {info.width}x{info.height}"
                        one = f"a {self.noun} is one video, with frames of one shape"
                        hint = f"{one}; to ask about images, list them: a.jpg b.jpg"
                        raise VideoError(f"images of different shapes: {shapes}", hint)
                    current = i
                    rgb = ffmpeg.to_rgb(frame, info.width, info.height, *turn, converter)
                    break
                damaged(i)
            done = max(done, wanted, current)
            if rgb is None:
                raise VideoError(f"no image in the {self.noun} {self.path} can be decoded", "the files are damaged")
            yield ffmpeg.Shown(current / info.fps, rgb)

    def intervals(self, info: Video, damaged: ffmpeg.Damage) -> Iterator[tuple[float, float, bool]]:
        """Decode all images. See the docstring of the `readers` package. Every image is treated as a keyframe."""
        for i in range(len(self.names)):
            if self._decoded(i) is None:
                damaged(i)
            else:
                yield i / info.fps, 1 / info.fps, True

    def frame_times(self, info: Video) -> FrameTimes:
        """Return the times of all images, whether damaged or not."""
        return FrameTimes([i / info.fps for i in range(len(self.names))], len(self.names))

    def _describe(self, number: int) -> _Image | None:
        """Return an image's properties, or None if it is damaged or too large."""
        decoded = self._decoded(number)
        if decoded is None:
            return None
        codec, frame, (rotation, _) = decoded
        width, height = ffmpeg.turned_size((frame.width, frame.height), rotation)
        return _Image(codec, frame.format.name, width, height, colour.hdr_format(frame))

    def _decoded(self, number: int) -> tuple[str, VideoFrame, tuple[int, bool]] | None:
        try:
            content = self.content(number)
        except OSError:
            return None
        return decode_image(content, self.names[number])


def decode_image(content: bytes, name: str) -> tuple[str, VideoFrame, tuple[int, bool]] | None:
    """Decode an image. Returns the codec, pixels, and orientation (see `ffmpeg.orientation`), or None if damaged or too large."""
    try:
        with ffmpeg.open_bytes(io.BytesIO(content), max_pixels=ffmpeg.MAX_PIXELS) as container:
            stream = ffmpeg.video_stream(container, name, max_pixels=ffmpeg.MAX_PIXELS)
            # Without "explode", FFmpeg would decode a truncated JPEG to an image with a gray lower part.
            stream.codec_context.options = stream.codec_context.options | {"err_detect": "explode"}
            frame = next(ffmpeg.decoded_frames(stream, ffmpeg.packets(container, stream)), None)
            if frame is None:
                return None
            return stream.codec_context.codec.canonical_name, frame, ffmpeg.orientation(frame)
    except (av.error.FFmpegError, OSError, ValueError, VideoError):
        return None

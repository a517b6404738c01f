"""Opening video files: FFmpeg gets the bytes of the one file that was named, and nothing else."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video import heartbeat
from evoprune.video.info import Damage, ignored

# Frame rate of a stream that states none; FFmpeg assumes the same.
FALLBACK_FPS = 25.0
# Containers that store when each frame is shown, so that times are the same after a jump; others are read through.
MOV = "mov,mp4,m4a,3gp,3g2,mj2"
SEEKABLE = (MOV, "matroska,webm", "mpegts")
# Larger pictures are refused: 16K video, and photographs of 100 megapixels, are below.
MAX_PIXELS = 2**27
# Containers in which packet follows packet, and that look for the next one silently where something is damaged.
DENSE = ("matroska,webm", "flv")
# There may be so many bytes between two packets, and twice the first one's size (what belongs to it, such as transparency).
HEADERS = 2**12
# A frame counts as shown this much before its time: Matroska rounds times to milliseconds, half of one up or down.
TOLERANCE_S = 0.0006


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what PyAV and the file system raise about the file into `VideoError`.

    That FFmpeg has no memory is the file's fault (a damaged one may ask for any amount); that numpy has none is not.
    """
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(
            f"cannot read {path}: {reason}", "is it a complete video file, and not a playlist? try to play it"
        ) from error


@contextmanager
def open_video(path: str) -> Iterator[InputContainer]:
    """Open a file for reading, and close it after use.

    Raises:
        VideoError: a URL, no such file, not a file, or an empty one. PyAV raises its own errors: see `reading`.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        if "://" in path:
            raise VideoError(f"{path} is a URL, not a file", "download it first, e.g. with yt-dlp") from None
        if os.path.islink(path):
            raise VideoError(f"{path} is a link to a file that is not there", "check where it leads") from None
        raise VideoError(f"no such file: {path or repr(path)}", "check the path") from None
    except OSError as error:
        raise VideoError(
            f"cannot read {path}: {error.strerror}", "check the path, and whether you may read it"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise VideoError(f"{path} is {kind}", "give a video file; - reads one from standard input")
    if not found.st_size:
        raise VideoError(f"{path} is empty", "was it copied or downloaded to its end?")
    with open(path, "rb", buffering=0) as file, open_bytes(file) as container:
        if container.format.name == "tty":  # FFmpeg draws text files as a terminal would
            raise VideoError(f"{path} is a text file", "give a video file")
        yield container


# Tags that are no text are no reason to refuse a video. PyAV 19 sees to that by itself.
_TAGS = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def open_bytes(file: BinaryIO) -> InputContainer:
    """Open what a seekable binary file holds; PyAV raises its own errors."""
    # By bytes, because a name can be more than a name to FFmpeg: what stands before a colon is taken for a protocol,
    # %d for a pattern. The whitelist that allows nothing keeps playlists in the file from reaching other files, or the
    # network.
    options = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
    return av.open(_Nameless(file), options=options, **_TAGS)


class _Nameless:
    """All of a binary file that FFmpeg may know: not where it lies."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """The stream to show.

    Raises:
        VideoError: the file has no video, only a cover picture, or one that this build of FFmpeg cannot decode; or its
            pictures are too large.
    """
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not moving:
        found = "only a cover picture" if container.streams.video else "no video stream"
        raise VideoError(f"{path} has {found}", "give a file with moving pictures")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise VideoError(
            f"there is no decoder for the video in {path}",
            "convert it to H.264, e.g. with ffmpeg, unless it is damaged",
        )
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise VideoError(
            f"{path} says that its pictures have {width:,} x {height:,} pixels",
            f"at most {MAX_PIXELS // 10**6} megapixels can be read; is it damaged?",
        )
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # what a frame says may be something else
    heartbeat.pixels(width * height)
    return stream


def nothing_decoded(path: str) -> VideoError:
    """The error where no frame of a file can be decoded."""
    hint = f"it is damaged, incomplete, or its pictures are larger than {MAX_PIXELS // 10**6} megapixels"
    return VideoError(f"no frame of {path} can be decoded", hint)


def packets(container: InputContainer, stream: VideoStream, damaged: Damage = ignored) -> Iterator[Packet | None]:
    """Packets up to the end; where the file breaks off, a last None makes the decoder hand out what it still holds.

    `damaged` is told where bytes were passed over in search of the next packet, as far as containers let that be seen.
    """
    dense = container.format.name in DENSE
    end, slack = None, 0
    try:
        for count, packet in enumerate(container.demux() if dense else container.demux(stream)):
            if count > container.size:  # more packets than bytes: the index goes round in circles
                raise av.error.InvalidDataError(0, "endless")
            if dense and packet.pos is not None:
                if end is not None and packet.pos - end > slack:
                    damaged(-packet.pos)
                end, slack = max(end or 0, packet.pos) + packet.size, HEADERS + 2 * packet.size
            if packet.stream.index == stream.index:  # in the packet itself, the one at the end has none
                yield packet
    # The latter where damage looks like a new stream, for which PyAV (18) has no place.
    except (av.error.FFmpegError, IndexError):
        yield None


def first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """The first frame that can be decoded."""
    for packet in packets(container, stream):
        try:
            frames = stream.decode(packet)
        except av.error.FFmpegError:  # a damaged packet: the next may be whole
            continue
        if frames:
            return frames[0]
    return None


def frame_time(frame: VideoFrame, stream: VideoStream) -> float | None:
    """When a frame is shown, in the file's own time; None where the file does not say (raw streams)."""
    # AVI stores decoding times only. What FFmpeg makes of them for presentation is wrong as soon as frames are stored
    # out of order, whereas the decoding times are right up to a constant.
    stamp = frame.dts if stream.container.format.name == "avi" else frame.pts
    return None if stamp is None else float(stamp * stream.time_base)

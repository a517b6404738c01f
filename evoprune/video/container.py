"""Opening video files: FFmpeg gets the bytes of the one file that was named, and nothing else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from evoprune.errors import VideoError
from evoprune.video import watch

# Frame rate of a stream that states none; FFmpeg assumes the same.
FALLBACK_FPS = 25.0
# Containers that store when each frame is shown, so that times are the same after a jump; others are read through.
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts")
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
    if "://" in path and not os.path.exists(path):
        raise VideoError(f"{path} is a URL, not a file", "download it first, e.g. with yt-dlp")
    if not os.path.exists(path):
        raise VideoError(f"no such file: {path or repr(path)}", "check the path")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise VideoError(f"{path} is {kind}", "give a video file; - reads one from standard input")
    if os.path.getsize(path) == 0:
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
    return av.open(_Nameless(file), options={"protocol_whitelist": "none"}, **_TAGS)


class _Nameless:
    """All of a binary file that FFmpeg may know: not where it lies."""

    def __init__(self, file: BinaryIO):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def video_stream(container: InputContainer, path: str) -> VideoStream:
    """The stream to show.

    Raises:
        VideoError: the file has no video, only a cover picture, or one that this build of FFmpeg cannot decode.
    """
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not moving:
        found = "only a cover picture" if container.streams.video else "no video stream"
        raise VideoError(f"{path} has {found}", "give a file with moving pictures")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise VideoError(f"there is no decoder for the video in {path}", "convert it to H.264, e.g. with ffmpeg")
    watch.pixels(stream.codec_context.width * stream.codec_context.height)
    return stream


def first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """The first frame that can be decoded."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
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

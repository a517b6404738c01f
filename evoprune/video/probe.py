"""What a video file holds, found out without decoding more than its first frame."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from evoprune.errors import VideoError

# Frame rate of a stream that states none; FFmpeg assumes the same.
FALLBACK_FPS = 25.0
# The video's end is read off the packets of its last seconds. So many, because the frame shown last is not always the
# one stored last.
TAIL_S = 3.0
# Frame intervals that differ by less are rounded (Matroska counts milliseconds), not variable.
RATE_JITTER_S = 0.0025


@dataclass(frozen=True)
class VideoInfo:
    """Facts about a video file.

    Attributes:
        path: as it was given.
        duration_s: seconds from the first frame to the end of the last one; None if unknown.
        width, height: pixels as displayed, after rotation (the shape of a pixel is not taken into account).
        rotation_deg: how far stored frames are turned clockwise for display: 0, 90, 180 or 270.
        codec: such as `h264`.
        pix_fmt: such as `yuv420p`.
        container: FFmpeg's name of the format, such as `matroska,webm`.
        fps: average frames per second; None if unknown.
        variable_rate: None if only a scan of the whole file could tell.
        frames_total: None if only a scan of the whole file could tell.
        start_s: the file's own time of the first frame; all other times in this package count from there.
        tags: the container's metadata.
        mirrored: stored frames are flipped left to right before they are turned.
    """

    path: str
    duration_s: float | None
    width: int
    height: int
    rotation_deg: int
    codec: str
    pix_fmt: str | None
    container: str
    fps: float | None
    variable_rate: bool | None
    frames_total: int | None
    start_s: float
    tags: dict[str, str]
    mirrored: bool = False


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Read the facts about a video file.

    Decodes the first frame and reads the packets of the last seconds; a file that cannot be entered near its end is
    read through once, without decoding.

    Raises:
        VideoError: no such file, not a video, no video stream, or one of which nothing can be decoded.
    """
    path = os.fspath(path)
    with reading(path), open_video(path) as container:
        stream = video_stream(container, path)
        first = _first_frame(container, stream)
        if first is None:
            raise VideoError(f"no frame of {path} can be decoded", "the file is damaged or incomplete")
        rotation, mirrored = _orientation(first)
        size = first.width, first.height
        width, height = size if rotation % 180 == 0 else size[::-1]
        rate = stream.average_rate or stream.guessed_rate
        return VideoInfo(
            path=path,
            duration_s=_duration(path, container, stream, first),
            width=width,
            height=height,
            rotation_deg=rotation,
            codec=stream.codec_context.codec.canonical_name,
            pix_fmt=stream.codec_context.pix_fmt or first.format.name,
            container=container.format.name,
            fps=float(rate) if rate else None,
            variable_rate=_variable_rate(stream),
            frames_total=stream.frames or None,
            start_s=frame_time(first, stream) or 0.0,
            tags=dict(container.metadata),
            mirrored=mirrored,
        )


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what PyAV and the file system raise about the file into `VideoError`."""
    try:
        yield
    except (av.error.FFmpegError, OSError, ValueError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(f"cannot read {path}: {reason}", "is it a complete video file? try to play it") from error


def open_video(path: str) -> InputContainer:
    """Open a file for reading; close it after use (it is a context manager).

    Raises:
        VideoError: a URL, no such file, not a file, or an empty one. PyAV raises its own errors: see `reading`.
    """
    if "://" in path:
        raise VideoError(f"{path} is a URL, not a file", "download it first, e.g. with yt-dlp")
    if not os.path.exists(path):
        raise VideoError(f"no such file: {path}", "check the path")
    if not os.path.isfile(path):
        kind = "a folder" if os.path.isdir(path) else "not a regular file"
        raise VideoError(f"{path} is {kind}", "give a video file")
    if os.path.getsize(path) == 0:
        raise VideoError(f"{path} is empty", "was it copied or downloaded to its end?")
    # An absolute path, because FFmpeg takes what stands before a colon for a protocol.
    container = av.open(os.path.abspath(path), metadata_errors="replace")
    if container.format.name == "tty":  # FFmpeg draws text files as a terminal would
        container.close()
        raise VideoError(f"{path} is a text file", "give a video file")
    return container


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
    return stream


def frame_time(frame: VideoFrame, stream: VideoStream) -> float | None:
    """When a frame is shown, in the file's own time; None where the file does not say (raw streams)."""
    # AVI stores decoding times only. What FFmpeg makes of them for presentation is wrong as soon as frames are stored
    # out of order, whereas the decoding times are right up to a constant.
    stamp = frame.dts if stream.container.format.name == "avi" else frame.pts
    return None if stamp is None else float(stamp * stream.time_base)


def _first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:  # a damaged packet: the next may be whole
            continue
        if frames:
            return frames[0]
    return None


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Clockwise rotation in degrees and whether a left-right flip comes before it, from the display matrix."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    # Row vectors times the matrix, y downwards: the image's x axis goes to (a, b), its y axis to (c, d).
    a, b, _, c, d = (int(x) for x in np.frombuffer(matrix, np.int32, count=5))
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360, mirrored


def _duration(path: str, container: InputContainer, stream: VideoStream, first: VideoFrame) -> float | None:
    # The header's word is not taken where packets have times: it counts audio too, may count from zero instead of from
    # the first frame, and does not know that the file was cut off.
    step = 1 / float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
    start = frame_time(first, stream)
    if start is None or container.format.name == "avi":
        return step * (stream.frames or sum(1 for _ in _all_packets(path)))
    end = _end(_tail_packets(container, stream), step)
    if end is None:
        end = _end(_all_packets(path), step)
    return None if end is None else end - start


def _end(packets: Iterable[Packet], step: float) -> float | None:
    """When the last of these packets stops being shown; `step` stands in for durations that are not stored."""
    shown = (p for p in packets if p.pts is not None and not p.is_discard)
    ends = (float(p.pts * p.time_base) + (float((p.duration or 0) * p.time_base) or step) for p in shown)
    return max(ends, default=None)


def _tail_packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Packets of the last seconds; none if the file cannot be entered there."""
    if container.duration is None:
        return
    end = ((container.start_time or 0) + container.duration) / av.time_base
    try:
        container.seek(math.floor((end - TAIL_S) / stream.time_base), stream=stream)
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _all_packets(path: str) -> Iterator[Packet]:
    """All packets of the stream that hold something, up to where the file breaks off."""
    with open_video(path) as container:
        try:
            yield from (p for p in container.demux(video_stream(container, path)) if p.size)
        except av.error.FFmpegError:
            return


def _variable_rate(stream: VideoStream) -> bool | None:
    if stream.frames < 3 or len(stream.index_entries) != stream.frames:
        return None  # only MP4 and its relatives list every frame up front
    steps = np.diff([entry.timestamp for entry in stream.index_entries])
    return bool(np.ptp(steps) * stream.time_base > RATE_JITTER_S)

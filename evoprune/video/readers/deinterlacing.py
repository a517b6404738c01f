"""Deinterlaces frames with FFmpeg's `bwdif` filter, one requested frame at a time.

The filter uses the frame and both of its neighbors. The result depends only on these three frames, not on the number of threads or
the position at which decoding started. For the first frame of a video, or if the previous frame is unknown, missing rows are
interpolated from the frame's own rows.
"""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial

from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame

FILTER = "bwdif", "mode=send_frame:parity=auto:deint=interlaced"


def deinterlaced(frame: VideoFrame, before: VideoFrame | None = None, after: VideoFrame | None = None) -> VideoFrame:
    """Deinterlace a frame if it is interlaced. Progressive frames and frames below 3x4 pixels are returned unchanged.

    Args:
        before, after: The frames displayed before and after this frame, or None if unknown. A frame of a different size or pixel
            format is ignored.
    """
    if not frame.interlaced_frame:
        return frame
    before, after = (each if each is not None and _shape(each) == _shape(frame) else None for each in (before, after))
    graph = Graph()
    graph.threads = 1
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base or Fraction(1)
    )
    try:
        graph.link_nodes(source, graph.add(*FILTER), graph.add("buffersink")).configure()
        # The filter interpolates its first frame from that frame's own rows, but only if another frame follows.
        for each in (frame, after or frame) if before is None else (before, frame, after):
            graph.push(each)  # None marks the end of the video
        if before is not None:
            graph.pull()
        return graph.pull()
    except MemoryError as error:  # FFmpeg's subclass of MemoryError would be mistaken for damage to the file
        raise MemoryError(str(error)) from error
    except FFmpegError:
        return frame


def _shape(frame: VideoFrame) -> tuple[int, int, str]:
    return frame.width, frame.height, frame.format.name


def deinterlacing(frames: Iterator[tuple[float, VideoFrame]]) -> Iterator[tuple[float, Callable[[], VideoFrame]]]:
    """Yield each frame's timestamp along with a function that deinterlaces the frame, for readers that need only some frames.

    Because deinterlacing requires the next frame, an interlaced frame is yielded only after the next frame has arrived. Progressive
    frames are yielded immediately.
    """
    before = None
    waiting = None
    for time_s, frame in frames:
        if waiting:
            yield waiting[0], partial(deinterlaced, waiting[1], before, frame)
            before = waiting[1]
            waiting = None
        if frame.interlaced_frame:
            waiting = time_s, frame
        else:
            yield time_s, partial(deinterlaced, frame)
            before = frame
    if waiting:
        yield waiting[0], partial(deinterlaced, waiting[1], before)

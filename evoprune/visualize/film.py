"""Pictures as files: PNG, GIF and MP4, written by PyAV."""

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 `[H, W, 3]`, as PNG."""
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = picture.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1)
    packets = [*encoder.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *encoder.encode(None)]
    return b"".join(map(bytes, packets))


def mp4(pictures: Iterable[np.ndarray], seconds: float) -> bytes:
    """Pictures, all of one size with even sides, each shown for so many seconds, as H.264 in MP4."""
    step = Fraction(seconds).limit_denominator(1000)
    frames = (frame.reformat(format="yuv420p") for frame in _frames(pictures))
    return _muxed("mp4", "libx264", "yuv420p", frames, step, {"crf": "18", "preset": "veryfast"})


def gif(pictures: Iterable[np.ndarray], seconds: float) -> bytes:
    """Pictures, all of one size, each shown for so many seconds, as an endless GIF with colours made for them."""
    step = Fraction(max(2, round(seconds * 100)), 100)  # players slow down what is faster
    return _muxed("gif", "gif", "pal8", _few_colours(_frames(pictures)), step, {})


def _frames(pictures: Iterable[np.ndarray]) -> Iterator[av.VideoFrame]:
    for number, picture in enumerate(pictures):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = number, Fraction(1)
        yield frame


def _few_colours(frames: Iterator[av.VideoFrame]) -> Iterator[av.VideoFrame]:
    """The frames in 256 colours that suit them all; they are held until the last one is known."""
    graph, made = av.filter.Graph(), None
    for frame in frames:
        if made is None:
            made = graph.add_buffer(width=frame.width, height=frame.height, format="rgb24", time_base=Fraction(1))
            split, colours = graph.add("split"), graph.add("palettegen")
            use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
            made.link_to(split)
            split.link_to(use, 0, 0)
            split.link_to(colours, 1, 0)
            colours.link_to(use, 0, 1)
            use.link_to(sink)
            graph.configure()
        made.push(frame)
    made.push(None)
    while True:
        try:
            yield graph.pull()
        except (av.error.EOFError, av.error.BlockingIOError):
            return


def _muxed(container: str, codec: str, pix_fmt: str, frames: Iterator[av.VideoFrame], step: Fraction, options) -> bytes:
    """A file of frames, each `step` seconds after the one before."""
    file, stream = io.BytesIO(), None
    with av.open(file, "w", format=container) as out:
        for number, frame in enumerate(frames):
            if stream is None:
                stream = out.add_stream(codec, rate=1 / step, options=options)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pix_fmt
                stream.codec_context.time_base = step
            frame.pts, frame.time_base = number, step
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()

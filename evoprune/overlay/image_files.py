"""Pictures as the bytes of a file: PNG and GIF by Pillow, MP4 by PyAV. The same pictures give the same bytes."""

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

MADE_BY = "evoprune overlay"  # in the metadata of each file


def png(picture: Image.Image) -> bytes:
    """An RGB picture as PNG with a palette of 256 colours: frames with grain take a third of the bytes of full colour."""
    file, facts = io.BytesIO(), PngInfo()
    facts.add_text("Software", MADE_BY)
    reduced = picture.quantize(palette=shared_palette([picture]), dither=Image.Dither.NONE)
    reduced.save(file, "PNG", optimize=True, pnginfo=facts)
    return file.getvalue()


def gif(pictures: Iterable[Image.Image], seconds: float, palette: Image.Image) -> bytes:
    """At least one RGB picture, all of one size, as a GIF that repeats for ever.

    Each takes so many seconds, rounded to hundredths; at least 0.02, because players slow down what is faster.
    """
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    file, milliseconds = io.BytesIO(), 10 * max(2, round(seconds * 100))
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, comment=MADE_BY)
    return file.getvalue()


def shared_palette(pictures: Iterable[Image.Image]) -> Image.Image:
    """An image whose palette of 256 colours suits RGB pictures of one size: a colour of their own for each would flicker."""
    column = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    return column.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)


def mp4(pictures: Iterable[Image.Image], seconds: float) -> bytes:
    """RGB pictures of one size as H.264 in MP4. Width and height are even; each picture is shown for so many seconds."""
    file, stream, step = io.BytesIO(), None, Fraction(seconds).limit_denominator(1000)
    with av.open(file, "w", format="mp4") as out:
        out.metadata["comment"] = MADE_BY
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = out.add_stream("libx264", rate=1 / step, options={"crf": "18", "preset": "veryfast"})
                stream.width, stream.height = picture.size
                stream.pix_fmt, stream.codec_context.time_base = "yuv420p", step
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p")
            frame.pts, frame.time_base = number, step
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()

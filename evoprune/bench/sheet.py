"""Contact sheets, which show the best frame of each moment found in a video, with the moment's timestamp, query, and score."""

from collections.abc import Sequence
from operator import attrgetter

from PIL import Image

from evoprune.bench.overlay import FAINT, GAP, MIN_WIDTH, columns, framed, joined, png, text_picture, text_size, wrap
from evoprune.moments import Moment
from evoprune.util import clock
from evoprune.video import Video, read_chunks

MADE_BY = "evoprune contact sheet"  # stored in each file's metadata
PANEL = (320, 320)  # maximum width and height of a frame, in pixels


def contact_sheet(info: Video, moments: Sequence[Moment], title: str) -> bytes:
    """Draw the best frames of one or more moments in chronological order, and return the sheet as PNG bytes.

    To save memory, frames are read one at a time, and each frame is downscaled before the next one is read.

    See `read_chunks` for exceptions.
    """
    ordered = sorted(moments, key=attrgetter("best_s"))
    pictures = []
    for chunk in read_chunks(info, [moment.best_s for moment in ordered]):
        for rgb in chunk.pixels:
            picture = Image.fromarray(rgb)
            picture.thumbnail(PANEL)
            pictures.append(picture)
    width = max(picture.width for picture in pictures)
    across = columns(len(pictures), width / pictures[0].height)
    whole = max(MIN_WIDTH, across * (width + GAP) - GAP)
    size = text_size(whole)
    captions = [f"{clock(moment.best_s)}: {moment.query} ({moment.score:.2f})" for moment in ordered]
    lines = max(len(wrap(caption, width, size)) for caption in captions)
    panels = [
        joined([picture, text_picture(caption, width, size, FAINT, lines)], GAP // 4)
        for picture, caption in zip(pictures, captions, strict=True)
    ]
    rows = [joined(panels[at : at + across], GAP, across=True) for at in range(0, len(panels), across)]
    return png(framed([text_picture(title, whole, size), *rows]), MADE_BY)

"""Whether a file is a picture that is too large to be read, which FFmpeg does not distinguish from a damaged one."""

import warnings

from evoprune.errors import VideoError
from evoprune.video.readers.container import MAX_PIXELS

KINDS = ("PNG", "JPEG", "WEBP", "BMP")


def check_picture_size(path: str) -> None:
    """Raises VideoError if the file is a picture of more than `MAX_PIXELS`. Reads no more than its header."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path, formats=KINDS) as picture:
            pixels = picture.width * picture.height
    except Image.DecompressionBombError:  # Pillow's own limit is higher
        pixels = MAX_PIXELS + 1
    except (OSError, ValueError, SyntaxError):  # not such a picture
        return
    if pixels > MAX_PIXELS:
        raise too_large(path)


def too_large(path: str) -> VideoError:
    """The error for a picture with more pixels or bytes than are read."""
    return VideoError(
        f"the picture {path} is too large: evoprune reads at most {MAX_PIXELS // 10**6} megapixels",
        "make it smaller; the model sees no more than a few megapixels of it",
    )

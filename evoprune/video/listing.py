"""What a folder holds, by the endings of its files: images, which are the frames of one video, or videos. No FFmpeg."""

import os
import re

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
VIDEOS = (
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".mxf", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
)  # fmt: skip


def files(folder: str, endings: tuple[str, ...]) -> list[str]:
    """Paths of the files with these endings in a folder, in natural order, without hidden ones. Raises OSError, ValueError."""
    with os.scandir(folder) as entries:
        seen = [e for e in entries if e.name.lower().endswith(endings) and e.name[0] != "."]
        names = [e.name for e in seen if e.is_file(follow_symlinks=False) or os.path.isfile(e.path)]
    return [os.path.join(folder, name) for name in sorted(names, key=natural)]


def natural(name: str) -> tuple[list[str | int], str]:
    """A sort key: runs of digits by their value; equal values, such as 1 and 01, by the characters."""
    pieces = re.split("([0-9]+)", name.casefold())
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)], name

"""The table of readers. Imports no decoders, because the main process needs the file extensions.

Only the worker process imports the modules in `readers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from evoprune.video.info import ANIMATIONS, FOLDER, PICTURE, Kind, Video
from evoprune.video.signatures import head_of, picture_format

FRAMES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # extensions of images that a folder of images may contain
PACKAGES = {"pyav": "av"}  # Python packages of decoders with a different name


@dataclass(frozen=True)
class Reader:
    """A kind of input, and the module that reads it. For the module's functions, see the docstring of the `readers` package."""

    module: str  # module in `readers`
    noun: str  # kind of input, for messages
    containers: tuple[str, ...]  # the values of `Video.container` for these inputs
    begins: Callable[[bytes], object]  # whether files that begin with these bytes may belong to the reader
    extensions: tuple[str, ...] = ()  # file extensions, in lower case
    kind: Kind = "video"
    decoder: str = "pyav"  # name of the decoding library in reports

    def load(self) -> ModuleType:
        return import_module(f"evoprune.video.readers.{self.module}")


FILES = Reader(
    "pyav", "a video file", (), lambda head: True,
    (
        ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
        ".mts", ".mxf", ".ogv", ".rm", ".rmvb", ".ts", ".vob", ".webm", ".wmv", ".y4m",
    ),
)  # fmt: skip
# In the order in which they are asked whether they read an input. A module is imported only if the first bytes match, because
# importing Pillow would delay every video. A folder has no first bytes.
READERS = (
    Reader("folder", "a folder", (FOLDER,), lambda head: not head),
    Reader(
        "picture", "an image", (PICTURE,), picture_format, (*FRAMES, ".avif", ".heic", ".heif"), "picture", "pillow"
    ),
    Reader("animation", "an animation", tuple(ANIMATIONS.values()), picture_format, decoder="pillow"),
    FILES,  # all other containers
)


def reader_at(path: str) -> Reader:
    """Return the reader of an input, according to its content."""
    head = head_of(path)
    return next(reader for reader in READERS if reader.begins(head) and reader.load().claims(path))


def reader_of(info: Video) -> Reader:
    """Return the reader of an input whose metadata has been read."""
    return next((reader for reader in READERS if info.container in reader.containers), FILES)


def package_of(decoder: str) -> str:
    """Return the Python package of a decoder."""
    return PACKAGES.get(decoder, decoder)

"""The disk cache, mostly for encoded videos. Each file name is a hash of everything that affects the file's contents.

Only the names of quantized weights don't depend on evoprune's version, so that a new version replaces them.

With the cache, a video sampled in the same way for the same model is encoded only once. Each encoded video is stored as a
safetensors file that also contains its cache key.

The cache never causes a run to fail. An entry that is damaged or has a different key is treated as a cache miss, and an entry that
cannot be written is skipped.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import torch

import evoprune
from evoprune.bundled import Demo
from evoprune.errors import UsageError
from evoprune.files import FileMemo, cache_folder, replacing, unfinished_pattern
from evoprune.session.gguf.folder import GgufFolders
from evoprune.session.result import Entry
from evoprune.suggestions import Suggesting
from evoprune.untrusted import loads
from evoprune.util import CONVERT, brief, check_type, converted, file_stats, open_safetensors
from evoprune.video import Folder
from evoprune.vision import Encoded

SUFFIX = ".safetensors"  # file suffix of complete entries
WEIGHTS_LIMIT_BYTES = 32 * 2**30
SPEECH_LIMIT_BYTES = 64 * 2**20
MOST_HASHES = 4096  # maximum number of files whose content hashes are kept in memory
OPTIONAL = ("size", "deepstack")  # optional fields of `Encoded`, which may be missing from an entry


@cache
def own_code() -> str:
    """Return a hash of the `file_stats` of evoprune's source files and bundled scorers.

    Cache keys include this hash because the code may change without a new version number.
    """
    files = sorted([*Path(evoprune.__file__).parent.rglob("*.py"), *Demo.SCORERS.glob("*/*")])
    return hashlib.sha256(repr(file_stats(files)).encode()).hexdigest()


def _folder(given: Any) -> Path:
    """Convert a path to a `Path`.

    Raises:
        UsageError: If it is not a path.
    """
    try:
        folder = Path(given)
        named = b"\0" not in os.fsencode(folder)
    except (TypeError, UnicodeEncodeError):
        named = False
    if not named:
        raise UsageError(f"the cache folder is {brief(given)}, not a path", "give the path of a folder")
    return folder


FOLDER = {CONVERT: _folder}
LIMIT = {CONVERT: lambda given: check_type("limit_bytes", given, int)}


@converted
@dataclass(frozen=True)
class Entries(Suggesting):
    """A cache stored in a folder on disk. Multiple processes can safely use it at the same time.

    Raises:
        UsageError: If `folder` is not a path, or `limit_bytes` is not an integer.
    """

    folder: Path = field(metadata=FOLDER)  # created when the first entry is written
    # Maximum total size. The least recently used entries are evicted first.
    limit_bytes: int = field(metadata=LIMIT)

    def write(self, key: str, content: Callable[[BinaryIO], None], make_room: bool = True) -> bool:
        """Write an entry atomically, and evict the least recently used entries if the size limit is exceeded.

        Args:
            content: Function that writes the entry's contents to a given file.
            make_room: Whether to evict old entries. When writing many entries, pass False and then call the `make_room` method
                once.

        Returns:
            True if the entry was written, or False if an OSError occurred, for example because the disk is full.

        Raises:
            Exception: Any exception raised by `content`, except OSError.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Entries are private. A link in the cache's folder may lead to any file, so it isn't followed.
            with replacing(self.path(key), mode=0o600, through_links=False) as file:
                content(file)
        except OSError:
            return False
        if make_room:
            self.make_room()
        return True

    def size(self) -> tuple[int, int]:
        """Return the number of entries and their total size in bytes."""
        sizes = [stat.st_size for path, stat in self._files() if path.suffix == SUFFIX]
        return len(sizes), sum(sizes)

    def clear(self) -> int:
        """Delete all cache entries and unfinished files, but leave any other files in the folder untouched.

        Returns:
            The number of deleted cache entries.

        Raises:
            OSError: If a file cannot be deleted.
        """
        entries, _ = self.size()
        for path, _ in self._files():
            path.unlink(missing_ok=True)
        return entries

    def path(self, key: str) -> Path:
        """Return the file path for an entry, regardless of whether the file exists."""
        return self.folder / f"{key}{SUFFIX}"

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield each cache file with its stat result, including files still being written.

        Another process may delete a file before the caller uses it.
        """
        entry = f"{'[0-9a-f]' * 64}{SUFFIX}"
        for pattern in (entry, unfinished_pattern(entry), "tmp*.tmp"):  # the last one was used by earlier versions
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    if path.is_file():
                        yield path, path.stat()

    def make_room(self) -> None:
        """Evict the least recently used entries until the cache is within its size limit.

        This also deletes unfinished files more than an hour old, which were left behind by killed processes.
        """
        total = 0
        for path, stat in sorted(self._files(), key=lambda file: file[1].st_mtime, reverse=True):
            total += stat.st_size
            superfluous = total > self.limit_bytes
            if path.suffix != SUFFIX:
                superfluous = time.time() - stat.st_mtime > 3600
            if superfluous:
                with suppress(OSError):
                    path.unlink()


@converted
@dataclass(frozen=True)
class Cache(Entries):
    """A disk cache of encoded videos. Multiple processes can safely use it at the same time."""

    makes_room: ClassVar[bool] = True  # whether `store` evicts old entries if the size limit is exceeded

    # Defaults to the folder used by `evoprune ask --cache`.
    folder: Path = field(default_factory=cache_folder, metadata=FOLDER)
    # Maximum total size. The least recently used entries are evicted first.
    limit_bytes: int = field(default=2 * 2**30, metadata=LIMIT)

    if TYPE_CHECKING:  # the constructor also accepts a string, although the field is a `Path`

        def __init__(self, folder: str | os.PathLike[str] = ..., limit_bytes: int = ...) -> None: ...

    def content_hash(self, path: str | os.PathLike[str]) -> str:
        """Return a hash of a file's contents, or of the names and contents of all files in a folder.

        A file is hashed again only if it has changed. A folder is always hashed again.

        Raises:
            OSError: If a file cannot be read.
        """
        if Folder.is_at(path):
            return content_hash(path)
        return _hashes.get(path, lambda: content_hash(path))

    def load(self, key: str, device: torch.device) -> Entry | None:
        """Load an encoded video from the cache onto a device.

        The `rows` tensor has a shape but no data (it is on the `meta` device), because its values aren't needed for answering
        questions.

        Returns:
            The entry, or None if it doesn't exist or is damaged.
        """
        from safetensors import SafetensorError

        path = self.path(key)
        if not path.is_file():  # also skip pipes, because opening one could block forever
            return None
        try:
            with open_safetensors(path) as file:
                about = file.metadata()["about"]
                # Copy the memory-mapped tensors, because they would become invalid if another process deleted the file
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
                if file.metadata()["digest"] != _digest(about, tensors):
                    return None
            facts = loads(about)
            if facts["key"] != key:
                return None
            with suppress(OSError):  # fails if the folder is read-only
                os.utime(path)
            tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
            features = tensors["features"]
            encoded = Encoded(
                features,
                tensors["kept"],
                features.new_empty(facts["rows"], features.shape[1], device="meta"),
                tensors["unit_to_row"],
                tuple(tuple(grid) for grid in facts["grids"]),
                [tuple(layer) for layer in facts["layers"]],
                0.0,
                facts["flat"],
                *map(tensors.get, OPTIONAL),
                after_tower_below=facts["after_tower_below"],
            )
            return Entry(encoded, tuple(facts["read_s"]), facts["moved"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    @property
    def of_segments(self) -> "SegmentCache":
        """A cache for encoded segments of long videos, stored in a subfolder with its own size limit."""
        return SegmentCache(self.folder / "segments")

    @property
    def of_speech(self) -> Entries:
        """A cache for speech transcripts, stored in a subfolder with its own size limit."""
        return Entries(self.folder / "speech", SPEECH_LIMIT_BYTES)

    @property
    def of_gguf(self) -> GgufFolders:
        """The small files made from GGUF files, in a subfolder."""
        return GgufFolders(self.folder / "gguf")

    @property
    def of_weights(self) -> Entries:
        """A cache for quantized model weights, stored in a subfolder with its own size limit."""
        return Entries(self.folder / "weights", WEIGHTS_LIMIT_BYTES)

    def store(self, key: str, entry: Entry) -> bool:
        """Store an encoded video in the cache, and evict old entries if the size limit is exceeded.

        Returns:
            True if the entry was written, or False if it exceeds the size limit or cannot be written.
        """
        from safetensors.torch import save

        encoded = entry.encoded
        tensors = {name: getattr(encoded, name) for name in ("features", "kept", "unit_to_row", *OPTIONAL)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        facts = {
            "key": key,
            "rows": len(encoded.rows),
            "grids": encoded.grids,
            "layers": encoded.layers,
            "flat": encoded.flat,
            "after_tower_below": encoded.after_tower_below,
            "read_s": entry.read_s,
            "moved": entry.moved,
        }
        about = json.dumps(facts)
        content = save(tensors, {"about": about, "digest": _digest(about, tensors)})
        return len(content) <= self.limit_bytes and self.write(key, lambda file: file.write(content), self.makes_room)


@converted
@dataclass(frozen=True)
class SegmentCache(Cache):
    """A disk cache of encoded video segments.

    Because a long video has hundreds of segments, `store` doesn't evict any entries. Instead, the caller stores all segments and
    then calls `make_room` once.
    """

    makes_room: ClassVar[bool] = False

    @property
    def of_speech(self) -> Entries:
        return Cache(self.folder.parent).of_speech

    limit_bytes: int = field(default=4 * 2**30, metadata=LIMIT)


_hashes: FileMemo[str] = FileMemo(MOST_HASHES)  # shared by all caches, so that each file is hashed only once


def content_hash(path: str | os.PathLike[str]) -> str:
    """Return a hash of a file's contents, or of the names and contents of all files in a folder.

    Raises:
        OSError: If a file cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    inside = sorted(p for p in path.iterdir() if p.is_file())
    return hashlib.blake2b(repr([(p.name, content_hash(p)) for p in inside]).encode()).hexdigest()


def _digest(about: str, tensors: dict[str, torch.Tensor]) -> str:
    """Return a checksum of an entry's metadata and tensors.

    The checksum detects flipped bits, whereas safetensors only detects truncated files.
    """
    digest = hashlib.blake2b(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()

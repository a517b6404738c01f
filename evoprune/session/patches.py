"""Store the patches of recent inputs, so that an input can be encoded again with different settings without being read again.

Patches are stored as uint8 on the device that computed them. With the default settings, the largest input has 24,576 units, whose
patches take 116 MB (151 MB for Qwen3-VL).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator

import torch

from evoprune.backend import Device, empty_cache
from evoprune.session.reading import Reading, SharedChunks, states_of
from evoprune.video import Folder, FrameChunk, InputLimits, Plan

LIMIT_BYTES = 2**29  # maximum size in bytes, for each input and for all unused inputs together
SHARE = 4  # patches in use take at most 1 / SHARE of the available memory


class PatchStore:
    """A thread-safe store for the patches of a model's most recent inputs, indexed by `content_key`.

    Unused patches take up at most `limit_bytes`; beyond that, the least recently used patches are evicted. An input's patches are
    not stored if they exceed the limit or memory is low. A limit of 0 disables the store.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES):
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[Hashable, SharedChunks[FrameChunk]] = OrderedDict()
        self._lock = threading.Lock()

    def open(
        self, key: Hashable, size: int, device: torch.device, source: Callable[[Reading], Iterator[FrameChunk]]
    ) -> SharedChunks[FrameChunk] | None:
        """Return the entry for a key, and start reading its patches if necessary. The caller must release it using `close`.

        Args:
            key: The input's key, from `content_key`.
            size: Size of the patches in bytes.
            device: The device that stores the patches.
            source: Function that produces the patches; see `Reading`.

        Returns:
            The entry, or None if the patches exceed the limit or `device` is low on memory. If memory is low, all unused patches
            are evicted as well.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.acquire():
                if size > self.limit_bytes:
                    return None
                available = Device(device).available_memory()
                used = sum(each.size for each in self._entries.values() if each.users)
                if available is not None and SHARE * (used + size) > available:
                    self._drop_unused(0)
                    return None
                entry = self._entries[key] = SharedChunks(key, source, size=size)
                entry.acquire()
            return entry

    def close(self, entry: SharedChunks[FrameChunk], keep: bool = True) -> None:
        """Release an entry returned by `open`, which may have failed and been replaced in the meantime.

        When the last user releases an entry, its patches stay in the store if they are complete and `keep` is True. Otherwise, they
        are discarded, and the thread that produces them is stopped.
        """
        with self._lock:
            if not entry.release():
                return
            if entry.is_complete and keep:
                self._entries.move_to_end(entry.key)
                self._drop_unused(self.limit_bytes)
                return
            if self._entries.get(entry.key) is entry:
                del self._entries[entry.key]
        entry.stop()

    def clear(self) -> bool:
        """Evict all unused patches. Return True if any patches were evicted."""
        with self._lock:
            freed = self._drop_unused(0)
        if freed:
            empty_cache()
        return freed

    def _drop_unused(self, limit_bytes: int) -> bool:
        """Evict the least recently used patches until the unused patches fit the limit. Return True if any were evicted."""
        unused = [entry for entry in self._entries.values() if not entry.users]
        total = sum(entry.size for entry in unused)
        dropped = False
        for entry in unused:
            if total > limit_bytes or not limit_bytes:
                del self._entries[entry.key]
                total -= entry.size
                dropped = True
        return dropped


def patch_bytes(plan: Plan, limits: InputLimits) -> int:
    """Return the size of an input's patches in bytes, assuming three bytes (one per color channel) for each encoded pixel."""
    count, height, width = plan.grid
    return count * height * width * limits.unit**2 * limits.temporal_patch_size * 3


def content_key(plan: Plan, limits: InputLimits, device: torch.device) -> Hashable | None:
    """Return the patch store key for an input. Inputs with equal keys have identical patches.

    The key contains the state of the files that are read, and all plan fields that affect the pixels.

    Returns:
        The key, or None if the input wasn't read from a file, or a file is missing.
    """
    if not plan.info.is_file:
        return None
    try:
        state = states_of(Folder.files_read(plan.info, plan.sampling.times_s))
    except (OSError, ValueError):
        return None
    sizes = limits.patch_size, limits.temporal_patch_size, limits.merge_size
    return repr((state, plan.of_pixels, sizes, str(device)))

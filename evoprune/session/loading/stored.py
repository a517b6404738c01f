"""Quantised weights on disk: a model is quantised once, and read in this form afterwards."""

import hashlib
import json
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

import evoprune
from evoprune.cpu.integers import Weights, levels
from evoprune.cpu.quantize import Progress, places, quantize, restore
from evoprune.model.weights import QwenVL
from evoprune.session.cache import Entries, cache_folder, own_code
from evoprune.session.loading.calibration import calibrate

LIMIT_BYTES = 32 * 2**30
HEADER_BYTES = 2**21  # of an entry, filled up with spaces; a tensor's entry takes about 120
NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def weights_folder() -> Entries:
    """Where the entries are: `weights` in the folder of the encoded videos."""
    return Entries(cache_folder() / "weights", LIMIT_BYTES)


def quantize_once(model: QwenVL, kind: str, fingerprint: str | None, progress: Progress | None = None) -> None:
    """Quantises a model in place: from the entry of its files and dtype (`fingerprint`; None for no entry), or into a new one."""
    if fingerprint is None:
        quantize(model, kind, calibrate, progress)
        return
    entries, key = weights_folder(), _key(fingerprint, kind)
    if read := _entry(entries.path(key), key, dict(places(model, kind))):
        restore(model, kind, read, progress)
        return
    stream = _Stream(key)

    def write(file: BinaryIO) -> None:
        stream.file = file
        quantize(model, kind, calibrate, progress, stream.add)
        stream.end()

    if not entries.write(key, write) and not stream.file:  # no such folder can be made
        quantize(model, kind, calibrate, progress)


def _key(fingerprint: str, kind: str) -> str:
    """Equal keys mean equal weights. Kernels arrange them by what the CPU can."""
    cpu = [torch.backends.cpu.get_cpu_capability(), levels()]
    facts = [fingerprint, kind, cpu, evoprune.__version__, torch.__version__, own_code()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _entry(path: Path, key: str, layers: Collection[str]) -> Callable[[str], Weights] | None:
    """What reads a layer's weights from a file, memory-mapped; None where there is none, it is damaged, or of another key."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        file = safe_open(path, framework="pt")
    except (OSError, SafetensorError):
        return None
    names: dict[str, list[str]] = {}
    for name in file.keys():  # noqa: SIM118 (not a dict)
        layer, _, part = name.rpartition(".")
        names.setdefault(layer, []).append(part)
    if names.keys() != set(layers) or (file.metadata() or {}).get("key") != key:
        return None
    with suppress(OSError):  # a folder that may only be read
        os.utime(path)
    return lambda layer: {part: file.get_tensor(f"{layer}.{part}") for part in names[layer]}


class _Stream:
    """A safetensors file that is written tensor by tensor, its header last. Goes on without a file that cannot be written."""

    def __init__(self, key: str):
        self.file: BinaryIO | None = None
        self._header: dict[str, dict] = {"__metadata__": {"key": key}}
        self._end, self._problem = 0, None

    def add(self, layer: str, weights: Weights) -> None:
        try:
            if not self._end:
                self.file.seek(8 + HEADER_BYTES)
            for part, tensor in weights.items():
                if not self._problem:
                    self.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                start, self._end = self._end, self._end + tensor.nbytes
                about = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self._end]}
                self._header[f"{layer}.{part}"] = about
        except OSError as problem:
            self._problem = problem

    def end(self) -> None:
        """Raises OSError: the file could not be written."""
        if self._problem:
            raise self._problem
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > HEADER_BYTES:
            raise OSError("the header has no room")
        self.file.seek(0)
        self.file.write(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))

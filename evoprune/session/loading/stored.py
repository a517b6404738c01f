"""Quantised weights: large input channels are found by one run, and what comes of it is kept on disk and read afterwards.

The input of the run is the same every time, made by formula: a picture with flat, smooth, striped and noisy parts, and tokens from
all over the vocabulary.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

import evoprune
from evoprune.backend import Progress, Weights, levels, places, quantize, restore
from evoprune.language import layers_of, new_cache
from evoprune.methods import arange_on, full_plan
from evoprune.model import PATCHES, Model
from evoprune.session.cache import Entries, cache_folder, own_code
from evoprune.util import open_safetensors
from evoprune.vision import encode, tower_shape

CALIBRATION_GRID = (1, 8, 8)  # frame pairs, and rows and columns of units
CALIBRATION_TOKENS = 64  # of text before the visual tokens, and behind them
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


def quantize_once(model: Model, kind: str, fingerprint: str | None, progress: Progress | None = None) -> None:
    """Quantises a model in place: from the entry of its files and dtype (`fingerprint`; None for no entry), or into a new one."""
    if fingerprint is None:
        quantize(model, kind, calibrate, progress)
        return
    entries = weights_folder()
    key = _key(fingerprint, kind)
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
    """Return a key; equal ones mean equal weights. Kernels arrange them by what the CPU can."""
    cpu = [torch.backends.cpu.get_cpu_capability(), levels()]
    facts = [fingerprint, kind, cpu, evoprune.__version__, torch.__version__, own_code()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _entry(path: Path, key: str, layers: Collection[str]) -> Callable[[str], Weights] | None:
    """Return what reads a layer's weights from a file, memory-mapped; None where there is none, it is damaged, or of another
    key.
    """
    if not path.is_file():
        return None
    try:
        file = open_safetensors(path)
    except OSError:
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
        self._end = 0
        self._problem = None

    def add(self, layer: str, weights: Weights) -> None:
        try:
            if not self._end:
                self.file.seek(8 + HEADER_BYTES)
            for part, tensor in weights.items():
                if not self._problem:
                    self.file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
                start = self._end
                self._end = self._end + tensor.nbytes
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


def calibrate(model: Model) -> None:
    """Calls every linear layer of a model on the CPU; its results are not used."""
    seen = calibrate_tower(model.model.visual)
    embed = model.model.language_model.embed_tokens
    ids = torch.linspace(0, embed.num_embeddings - 1, 2 * CALIBRATION_TOKENS, dtype=torch.float64, device="cpu").long()
    before, behind = embed(ids).to(seen.dtype).split(CALIBRATION_TOKENS)
    embeds = torch.cat([before, seen, behind])
    positions = arange_on(len(embeds), "cpu").expand(3, -1)
    layers_of(model).logits(model, embeds, positions, new_cache(model, len(embeds)))


def calibrate_tower(visual) -> torch.Tensor:
    """Calls every linear layer of a tower on the CPU; the features `[N, hidden]`."""
    return encode(visual, [_patches(visual)], full_plan(tower_shape(visual), CALIBRATION_GRID)).features


def _patches(visual) -> torch.Tensor:
    """Return the picture, as `vision.patches.patchify` makes patches: float32 `[patches, values]`, about between -2 and 2."""
    config = visual.config
    count = math.prod(CALIBRATION_GRID) * PATCHES
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    noise = torch.randn(count, values, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    place = torch.linspace(-2, 2, values, dtype=torch.float32, device="cpu")
    level = torch.linspace(-2, 2, count, dtype=torch.float32, device="cpu")[:, None]
    flat = level.expand(-1, values)
    smooth = level + place / 2
    striped = torch.sign(torch.sin(40 * place + level)) * level
    kinds = torch.stack([flat, smooth, striped, noise])
    return kinds[arange_on(count, "cpu") % 4, arange_on(count, "cpu")]

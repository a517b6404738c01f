"""Quantize a model's weights and store the quantized weights on disk for later runs.

A single calibration run identifies input channels with large values. It always uses the same input: a synthetic image with flat,
smooth, striped, and noisy areas, and tokens from the entire vocabulary.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import torch

import evoprune
from evoprune.backend import Quantization
from evoprune.errors import ModelWarning, callback_errors
from evoprune.language import LanguageModel
from evoprune.methods import EncoderPlan, TowerShape, arange_on
from evoprune.model import PATCHES, Model
from evoprune.session.cache import Cache, own_code
from evoprune.util import open_safetensors
from evoprune.vision import encode_rows

CALIBRATION_GRID = (1, 8, 8)  # number of frame pairs, unit rows, and unit columns
CALIBRATION_TOKENS = 64  # number of text tokens both before and after the visual tokens
SPARE_BYTES = 8 * 2**30  # disk space to leave free unless the user explicitly asks to store weights
HEADER_BYTES = 2**21  # header size, padded with spaces; each tensor takes about 120 bytes
NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def is_too_large(size: int) -> bool:
    """Return True if `size` bytes of quantized weights are more than the cache keeps."""
    return size > Cache().of_weights.limit_bytes


def has_room(size: int) -> bool:
    """Return True if the cache folder's disk has room for `size` bytes of quantized weights, with plenty of space to spare."""
    folder = Cache().of_weights.folder
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free > 2 * size + SPARE_BYTES
    except OSError:
        return False


def quantize_once(
    model: Model,
    kind: str,
    fingerprint: str | None,
    progress: Callable[[int, int], None] | None = None,
    read_weight: Callable[[str], torch.Tensor] | None = None,
) -> Path | None:
    """Quantize a model in place, either loading weights stored by an earlier run or storing the result for later runs.

    Args:
        fingerprint: Identifies the model's files and dtype. If None, stored weights are neither used nor written.
        read_weight: Reads the weights that are on the meta device; see `read` of `Quantization.apply`.

    Returns:
        The file containing the newly stored quantized weights, or None if nothing was written, for example because previously
        stored weights were loaded.
    """
    quantization = Quantization(kind)
    if fingerprint is None:
        quantization.apply(model, calibrate, progress, read=read_weight)
        return None
    entries = Cache().of_weights
    name, key = _name_and_key(fingerprint, quantization)
    if read := _entry(entries.path(name), key, quantization.layers(model)):
        quantization.restore(model, read, progress)
        return None
    stream = _Stream(key)

    def write(file: BinaryIO) -> None:
        stream.file = file
        quantization.apply(model, calibrate, passing(progress), stream.add, read_weight)
        stream.end()

    with callback_errors() as passing:  # an OSError of `progress` does not mean that the file cannot be written
        written = entries.write(name, write)
    if written:
        return entries.path(name)
    message = f"the quantized weights could not be stored: is the folder {entries.folder} full or read-only?"
    warnings.warn(message, ModelWarning, stacklevel=2)
    if not stream.file:  # the cache folder couldn't be created
        quantization.apply(model, calibrate, progress, read=read_weight)
    return None


def _name_and_key(fingerprint: str, quantization: Quantization) -> tuple[str, str]:
    """Return the file name and the cache key of a model's quantized weights.

    Both include the CPU capabilities, because the kernels' weight layout depends on them. Only the key includes evoprune's version,
    so that a new version replaces the weights stored by the previous version.
    """
    cpu = [torch.backends.cpu.get_cpu_capability(), quantization.levels]
    name = _hash([fingerprint, quantization.kind, cpu, torch.__version__])
    return name, _hash([name, evoprune.__version__, own_code()])


def _hash(facts: list) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _entry(path: Path, key: str, layers: Collection[str]) -> Callable[[str], dict[str, torch.Tensor]] | None:
    """Open a file of stored weights with memory mapping.

    Args:
        layers: Names of the layers that the file must contain. It must not contain any other layers.

    Returns:
        A function that maps a layer name to the layer's tensors, or None if the file is missing or damaged, or has a different key.
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
    with suppress(OSError):  # fails if the folder is read-only
        os.utime(path)
    return lambda layer: {part: file.get_tensor(f"{layer}.{part}") for part in names[layer]}


class _Stream:
    """Writes a safetensors file one tensor at a time, followed by the header.

    If a write fails, all subsequent tensors are discarded, and `end` raises the error.
    """

    def __init__(self, key: str):
        self.file: BinaryIO | None = None
        self._header: dict[str, dict] = {"__metadata__": {"key": key}}
        self._end = 0
        self._problem = None

    def add(self, layer: str, weights: dict[str, torch.Tensor]) -> None:
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
        """Write the header, which completes the file.

        Raises:
            OSError: If the header or any tensor couldn't be written.
        """
        if self._problem:
            raise self._problem
        text = json.dumps(self._header, separators=(",", ":")).encode()
        if len(text) > HEADER_BYTES:
            raise OSError("the header has no room")
        self.file.seek(0)
        self.file.write(HEADER_BYTES.to_bytes(8, "little") + text.ljust(HEADER_BYTES))


def calibrate(model: Model) -> None:
    """Run all of a model's linear layers once on the CPU, so that `Quantization.apply` can observe their inputs."""
    seen = calibrate_tower(model.model.visual)
    embed = model.model.language_model.embed_tokens
    ids = torch.linspace(0, embed.num_embeddings - 1, 2 * CALIBRATION_TOKENS, dtype=torch.float64, device="cpu").long()
    before, behind = embed(ids).to(seen.dtype).split(CALIBRATION_TOKENS)
    embeds = torch.cat([before, seen, behind])
    positions = arange_on(len(embeds), "cpu").expand(3, -1)
    language = LanguageModel(model)
    language.logits(embeds, positions, language.new_cache(len(embeds)))
    if layer := language.mtp_layer():
        hidden = language.forward(embeds, positions, language.new_cache(len(embeds)), last=CALIBRATION_TOKENS + 1)
        layer.logits(hidden[:-1], ids[-CALIBRATION_TOKENS:], positions[:, -CALIBRATION_TOKENS - 1 : -1])


def calibrate_tower(visual) -> torch.Tensor:
    """Run all of a vision tower's linear layers once on the CPU and return the resulting features, `[N, hidden]`."""
    plan = EncoderPlan.full(TowerShape.of_tower(visual), CALIBRATION_GRID)
    return encode_rows(visual, [_patches(visual)], plan).select_tokens().features


def _patches(visual) -> torch.Tensor:
    """Return the synthetic calibration image as normalized patches.

    The patches are float32 `[patches, values]` in Hugging Face order, with values between about -2 and 2.
    """
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

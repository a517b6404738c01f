"""Quantize a model's weights and store the quantized weights on disk for later runs.

If the weights can't be memory-mapped from the model's files, as in GGUF files, the other parameters are stored too, so later runs
memory-map the whole model.

A single calibration run identifies input channels with large values. It always uses the same input: a synthetic image with flat,
smooth, striped, and noisy areas, and tokens from the entire vocabulary.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch

import evoprune
from evoprune.backend import Quantization
from evoprune.errors import callback_errors
from evoprune.language import LanguageModel
from evoprune.methods import EncoderPlan, TowerShape, arange_on
from evoprune.model import PATCHES, Model
from evoprune.session.cache import Cache, own_code
from evoprune.session.loading.weights import EMBEDDINGS
from evoprune.util import open_safetensors
from evoprune.vision import encode_rows

CALIBRATION_GRID = (1, 8, 8)  # number of frame pairs, unit rows, and unit columns
CALIBRATION_TOKENS = 64  # number of text tokens both before and after the visual tokens
SPARE_BYTES = 8 * 2**30  # disk space to leave free unless the user explicitly asks to store weights
ALIGNMENT = 64
# Size of the header, padded with spaces, so that tensors begin at a multiple of `ALIGNMENT`. Some products of float32 need this for
# the same results as in memory. Each tensor takes about 120 bytes of the header.
HEADER_BYTES = 2**21 - 8
NAMES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}


def can_store(size: int, spare: bool) -> bool:
    """Return True if the cache keeps `size` bytes of quantized weights.

    Args:
        spare: Whether their disk must have plenty of space to spare.
    """
    if size > Cache().of_weights.limit_bytes:
        return False
    if not spare:
        return True
    folder = Cache().of_weights.folder
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free > 2 * size + SPARE_BYTES
    except OSError:
        return False


def stored_parameters(model: Model, kind: str, fingerprint: str | None) -> dict[str, torch.Tensor]:
    """Return the memory-mapped parameters that an earlier run stored along with the quantized layers, by name.

    Args:
        model: The model, which may be on the meta device.
        fingerprint: Same as for `quantize_once`.
    """
    if fingerprint is None:
        return {}
    entry = _entry(fingerprint, model, Quantization(kind))
    return entry.parameters if entry else {}


def quantize_once(
    model: Model,
    kind: str,
    fingerprint: str | None,
    progress: Callable[[int, int], None] | None = None,
    write: bool = True,
    deferred: Mapping[str, Callable[[], Any]] = MappingProxyType({}),
) -> tuple[Path | None, bool]:
    """Quantize a model in place, either loading weights stored by an earlier run or storing the result for later runs.

    Args:
        fingerprint: Identifies the model's files and dtype. If None, stored weights are neither used nor written.
        write: Whether to store the result.
        deferred: Functions that read the weights on the meta device, by name. If these include the embeddings, files are not
            memory-mapped, so the parameters that are not quantized are stored too (see `stored_parameters`).

    Returns:
        The file containing the newly stored weights or None, and whether a later run will have to quantize the weights again, for
        example because the disk is full.
    """
    quantization = Quantization(kind)
    entries = Cache().of_weights
    if fingerprint is not None and (entry := _entry(fingerprint, model, quantization)):
        quantization.restore(model, entry.layer, progress)
        return None, False
    others = _others(model, quantization) if EMBEDDINGS in deferred else {}

    def apply(*args: Any) -> None:
        quantization.apply(model, calibrate, *args, read=lambda weight: deferred[weight]())

    if fingerprint is None or not write:
        apply(progress)
        return None, True
    name, key = _name_and_key(fingerprint, quantization)
    stream = _Stream(key)

    def content(file: BinaryIO) -> None:
        stream.file = file
        for path, weight in sorted(others.items(), key=lambda each: each[1].nbytes % ALIGNMENT > 0):
            layer, _, part = path.rpartition(".")
            stream.add(layer, {part: weight})
        apply(passing(progress), stream.add)
        stream.end()

    with callback_errors() as passing:  # an OSError of `progress` does not mean that the file cannot be written
        written = entries.write(name, content)
    if not written and not stream.file:  # the cache folder couldn't be created
        apply(progress)
    return (entries.path(name) if written else None), not written


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


def _others(model: Model, quantization: Quantization) -> dict[str, torch.Tensor]:
    """Return the parameters of a model that are not quantized, by name."""
    quantized = set(quantization.weights(model))
    return {name: weight for name, weight in model.named_parameters() if name not in quantized}


class _Entry(NamedTuple):
    """An opened file of stored weights. All tensors are memory-mapped."""

    parameters: dict[str, torch.Tensor]  # parameters that are not quantized: all of them, or none
    layer: Callable[[str], dict[str, torch.Tensor]]  # maps a layer name to the layer's tensors


def _entry(fingerprint: str, model: Model, quantization: Quantization) -> _Entry | None:
    """Open a file of stored weights, or return None if it is missing or damaged, or has a different key or other tensors.

    Args:
        model: The unquantized model, which may be on the meta device.
    """
    name, key = _name_and_key(fingerprint, quantization)
    path = Cache().of_weights.path(name)
    if not path.is_file():
        return None
    try:
        file = open_safetensors(path)
    except OSError:
        return None
    others = _others(model, quantization).keys()
    stored = others & set(file.keys())
    layers: dict[str, list[str]] = {}
    for tensor in set(file.keys()) - others:
        layer, _, part = tensor.rpartition(".")
        layers.setdefault(layer, []).append(part)
    fits = layers.keys() == quantization.layers(model).keys() and stored in (set(), others)
    if not fits or (file.metadata() or {}).get("key") != key:
        return None
    with suppress(OSError):  # fails if the folder is read-only
        os.utime(path)
    parameters = {tensor: file.get_tensor(tensor) for tensor in stored}
    return _Entry(parameters, lambda layer: {part: file.get_tensor(f"{layer}.{part}") for part in layers[layer]})


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

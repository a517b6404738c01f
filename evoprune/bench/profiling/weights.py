"""The model that is measured, with its weights plain, packed and quantised, as far as there is memory for them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from evoprune.backend.devices import now
from evoprune.bench.profiling.clips import case_grid, text_tokens
from evoprune.bench.profiling.results import Case
from evoprune.bundled import DEMOS
from evoprune.cpu.linear import PackedLinear, can_pack, pack, weights_bytes
from evoprune.cpu.quantize import check as check_quantize
from evoprune.cpu.quantize import quantize, saved_bytes
from evoprune.errors import OutOfMemory
from evoprune.model import cost
from evoprune.model.config import Config
from evoprune.model.weights import QwenVL, shared
from evoprune.session.loading.find import BUNDLED_CONFIGS, DTYPES, FoundModel, describe_model
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.loading.stored import calibrate
from evoprune.session.options import ModelOptions
from evoprune.video.info import VIDEO
from evoprune.video.plan import InputLimits

MEMORY_HINT = "take fewer or smaller frames (--frames, --size), 16-bit weights (--dtype bf16) or a smaller model (-m)"


def default_load_format(name: str) -> str:
    """Random weights where there is a bundled config of that name, else the model's own."""
    return "dummy" if name in BUNDLED_CONFIGS and not Path(name).is_dir() else "auto"


def outline(options: ModelOptions) -> FoundModel | None:
    """The model without its weights; None if only loading tells. Raises what `load_model` raises."""
    name, random = options.model, options.load_format == "dummy"
    if random and not (name in BUNDLED_CONFIGS or name in DEMOS or Path(name).is_dir()):
        return None
    return describe_model(replace(options, revision=None) if random else options)


def load(options: ModelOptions, cases: Sequence[Case]) -> LoadedModel:
    """Loads a model if there is memory for the smallest case. Raises OutOfMemory; what `case_grid` and `load_model` raise."""
    if found := outline(options):
        size = DTYPES[found.dtype].itemsize
        weights = sum(weight.numel() for weight in found.tree.parameters()) * size
        working = min(working_memory(found.config, case, found.limits[VIDEO], size) for case in cases)
        if short := cost.shortage(weights + working, str(found.device)):
            raise OutOfMemory(f"{options.model} at {min(cases)} {short}", MEMORY_HINT, stage="load")
    loaded = load_model(options, pack=False)
    loaded.ready()
    return loaded


def quantized_models(
    loaded: LoadedModel, names: Sequence[str], working: int, progress: Callable[[str], None]
) -> tuple[dict[str, LoadedModel], dict[str, str], list[str]]:
    """The models that there is memory for beside `working` bytes ("none" is packed), why others are missing, and remarks."""
    for name in names:
        check_quantize(name, torch.device(loaded.device))
    # Where layers are not packed they may have been joined, and stay so.
    ours = shared(loaded.model) if can_pack(next(loaded.model.parameters())) else loaded.model
    notes, missing = [], {}
    parts = ours.model.visual, ours.model.language_model
    tower, language = (sum(weight.nbytes for weight in part.parameters()) for part in parts)
    plain = sum(weight.nbytes for weight in loaded.model.parameters())
    if can_pack(next(ours.parameters())):
        progress("packing weights")
        start = now(ours.device)
        free = cost.available_memory(loaded.device)
        for part, size in ((ours, tower + 1.2 * language), (ours.model.visual, tower)):
            if free is None or free > 1.1 * size + working:
                pack(part)
                break
        if not isinstance(ours.lm_head, PackedLinear):
            notes.append("not enough memory to pack all weights beside those of Hugging Face: ask is faster than this")
        notes.append(_ready("packed", ours, start))
    models = {"none": replace(loaded, model=ours, weights_bytes=weights_bytes(ours))}
    for name in names:
        if name == "none":
            continue
        if short := cost.shortage(plain - saved_bytes(loaded.model, name) + working, loaded.device):
            missing[name] = f"not run: beside the other weights, {name} {short}"
            continue
        start, model = now(loaded.model.device), shared(loaded.model)
        title = f"quantizing to {name}"
        quantize(model, name, calibrate, lambda done, total, title=title: progress(f"{title}: {done} of {total}"))
        models[name] = replace(loaded, model=model, quantize=name, weights_bytes=weights_bytes(model))
        notes.append(_ready(name, model, start))
    if not loaded.device.startswith("cuda"):
        notes.append("peak memory is the process's, with the weights of all rows in it")
    return models, missing, notes


def _ready(name: str, model: QwenVL, start: float) -> str:
    return f"{name} weights: {weights_bytes(model) / 2**30:.1f} GiB, ready in {now(model.device) - start:.1f} s"


def working_memory(config: Config, case: Case, limits: InputLimits, bytes_each: int) -> int:
    """The most bytes in use beside weights of `bytes_each`: those of transformers. Raises as `case_grid`."""
    units = prod(case_grid(case, limits))
    held = cost.SMALL_CHANGE + cost.pixel_bytes(config, units, bytes_each)
    text = text_tokens(config.vision_config, case, limits)
    language = cost.language_bytes(config, units + text, bytes_each)
    return held + max(cost.tower_bytes(config, units, bytes_each), language)

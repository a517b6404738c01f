"""The facts that `evoprune inspect` prints: about this machine, or about a video and what a model would look at."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import evoprune
from evoprune.backend.devices import available_memory
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError
from evoprune.methods.budget import PRESETS
from evoprune.model.cost import kv_bytes
from evoprune.session.loading.find import DTYPES, FoundModel
from evoprune.session.options import PruneOptions
from evoprune.session.patches import LIMIT_BYTES, patch_bytes
from evoprune.session.planning import TEXT, encoding_bytes, piece_sizes
from evoprune.video.plan import ONE_FRAME, Plan
from evoprune.vision.tower import tower_shape

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "av", "decord", "typer", "rich", "numpy")


def environment_facts(stdout: TextIO) -> dict:
    """Versions, devices, decoders, methods, caches, environment variables, and the encoding of `stdout`."""
    from huggingface_hub import constants

    from evoprune import methods
    from evoprune.backend.devices import describe_devices
    from evoprune.backend.limits import available_cores, available_memory
    from evoprune.session.cache import Cache
    from evoprune.session.loading.find import BUNDLED_CONFIGS
    from evoprune.session.loading.stored import weights_folder
    from evoprune.video.frames import choose_decoder

    decoders = {"pyav": "works"}
    try:
        choose_decoder("decord")
        decoders["decord"] = "works"
    except EvopruneError as problem:
        decoders["decord"] = problem.message
    demos = {}  # `demo_model`, `demo_model_folder` and so on
    for name, demo in DEMOS.items():
        key = f"{name.replace('-', '_')}_model"
        demos[key] = "missing"
        if (demo.folder / "model.safetensors").is_file():
            demos[key] = "installed"
        demos[f"{key}_folder"] = str(demo.folder)
    cache = Cache()
    videos, occupied = cache.size()
    segments, segments_bytes = Cache().of_segments.size()
    models, models_bytes = weights_folder().size()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"evoprune": evoprune.__version__} | {name: _version(name) for name in PACKAGES},
        "devices": describe_devices(),
        "available": {"cores": available_cores(), "memory_bytes": available_memory()},
        "decoders": decoders,
        "methods": methods.available(),
        "method_plugins": methods.plugins(),
        **demos,
        "bundled_configs": list(BUNDLED_CONFIGS),
        "hub_cache": constants.HF_HUB_CACHE,
        "cache": {
            "folder": str(cache.folder),
            "videos": videos,
            "size_bytes": occupied,
            "limit_bytes": cache.limit_bytes,
            "segments": segments,
            "segments_bytes": segments_bytes,
            "segments_limit_bytes": Cache().of_segments.limit_bytes,
            "quantized_models": models,
            "quantized_bytes": models_bytes,
        },
        "offline": constants.HF_HUB_OFFLINE,
        "stdout_encoding": stdout.encoding,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("EVOPRUNE_")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def model_facts(model: FoundModel) -> dict:
    """Return a model that has not been loaded: whether it is on disk, its layers, and the memory of its weights."""
    vision = model.config.vision_config
    text = model.config.text_config
    return {
        "id": model.id,
        "on_disk": bool(model.files_here),
        "folder": model.folder and str(model.folder),
        "download_bytes": model.download_bytes,
        "tower": {"layers": vision.depth, "hidden_size": vision.hidden_size},
        "language_model": {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size},
        "context_tokens": text.max_position_embeddings,
        "parameters": model.parameters,
        "dtype": model.dtype,
        "device": str(model.device),
        "weights_bytes": model.weights_bytes,
    }


def memory_facts(model: FoundModel, plan: Plan, pruning: PruneOptions) -> dict:
    """Return the memory that one question about a video takes at a budget, as it is checked before a run, and where more of it is
    free.

    `plan`: of the whole video.

    Raises UsageError: as of `PruneConfig.of`; a method that cannot act in this model.
    """
    config = pruning.config()
    encoder = config.plan(tower_shape(model.tower, model.device), plan.grid)
    depth = model.config.text_config.num_hidden_layers
    share = config.budget.share_of_all([encoder.grid])
    prompt = config.method.prompt_columns(depth, encoder.keep, TEXT, share)
    pair = encoder.grid[1] * encoder.grid[2]
    available = available_memory(str(model.device))
    for size in piece_sizes(model.device, encoder):  # as a run does where memory is short
        working = encoding_bytes(model.config, encoder, max(pair, size), DTYPES[model.dtype].itemsize, prompt)
        needed = model.weights_bytes + working
        if available is None or needed <= available:
            break
    enough = None
    if available is not None:
        enough = needed <= available
    most = needed + model.packed_bytes
    patches = patch_bytes(plan, model.limits[plan.kind])
    if patches <= LIMIT_BYTES:
        most += patches
    return {
        "method": config.name,
        "budget": config.budget.recorded,
        "visual_tokens": encoder.keep,
        "weights_bytes": model.weights_bytes,
        "working_bytes": working,
        "needed_bytes": needed,
        "used_if_free_bytes": most,
        "available_bytes": available,
        "enough": enough,
    }


def plan_facts(plan: Plan, config) -> dict:
    """Return what a model would look at: times, sizes, and at each preset the tokens and the bytes of the KV cache."""
    n = plan.visual_tokens
    span = None if plan.sampling is ONE_FRAME else plan.sampling
    return {
        "start_s": span and span.start_s,
        "end_s": span and span.end_s,
        "frames": plan.sampling.frames,
        "timestamps_s": span and list(span.times_s),
        "resized_hw": [plan.height, plan.width],
        "grid": list(plan.grid),
        "visual_tokens": n,
        "capped": plan.capped,
        "presets": {
            name: {
                "budget": tokens / n,
                "share": budget.share(plan.grid),
                "tokens": tokens,
                "kv_cache_bytes": kv_bytes(config, tokens),
            }
            for name, budget in PRESETS.items()
            for tokens in [budget.keep(plan.grid)]
        },
    }

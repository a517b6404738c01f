"""The facts printed by `evoprune inspect`: about this machine, or about a video and how a model would read it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

import evoprune
from evoprune.backend import Device
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError
from evoprune.methods import Budget
from evoprune.model import Cost
from evoprune.session.loading.weights import DTYPES, ModelWeights
from evoprune.session.memory import TEXT, piece_needs
from evoprune.session.patches import LIMIT_BYTES, patch_bytes
from evoprune.video import Plan

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "av", "decord", "typer", "rich", "numpy")


def environment_facts(stdout: TextIO) -> dict:
    """Return versions, devices, decoders, methods, caches, environment variables, and the encoding of `stdout`."""
    from huggingface_hub import constants

    from evoprune import methods
    from evoprune.backend import available_cores, describe_devices, host_memory
    from evoprune.session.cache import Cache
    from evoprune.session.loading.hub import BUNDLED_CONFIGS
    from evoprune.session.loading.stored import weights_folder
    from evoprune.video import choose_decoder

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
        "available": {"cores": available_cores(), "memory_bytes": host_memory()},
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


def model_facts(weights: ModelWeights) -> dict:
    """Return facts about a model that is not loaded: whether it is on disk, its layers, and the memory for its weights."""
    model = weights.description
    vision = model.config.vision_config
    text = model.config.text_config
    return {
        "id": model.id,
        "on_disk": bool(weights.files_here),
        "folder": model.folder and str(model.folder),
        "download_bytes": weights.download_bytes,
        "tower": {"layers": vision.depth, "hidden_size": vision.hidden_size},
        "language_model": {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size},
        "context_tokens": text.max_position_embeddings,
        "parameters": weights.parameters,
        "dtype": model.dtype,
        "device": model.device,
        "weights_bytes": weights.bytes,
    }


def memory_facts(weights: ModelWeights, plan: Plan) -> dict:
    """Return the memory that one question about an input takes, computed as in the check before a run.

    The entry "enough" tells whether that memory is available, or is None if the available memory is unknown.
    """
    model = weights.description
    pruning = plan.pruning.config()
    encoder = plan.encoder
    depth = model.config.text_config.num_hidden_layers
    share = pruning.budget.share_of_all([encoder.grid])
    prompt = pruning.method.prompt_columns(depth, encoder.keep, TEXT, share)
    available = Device(model.device).available_memory()
    bytes_each = DTYPES[model.dtype].itemsize
    # Like a run, try smaller pieces if memory is short.
    for _, working in piece_needs(model.config, weights.device, encoder, bytes_each, prompt):
        needed = weights.bytes + working
        if available is None or needed <= available:
            break
    enough = None
    if available is not None:
        enough = needed <= available
    most = needed + weights.packed_bytes
    patches = patch_bytes(plan, model.limits[plan.kind])
    if patches <= LIMIT_BYTES:
        most += patches
    return {
        "method": pruning.name,
        "budget": pruning.budget.recorded,
        "visual_tokens": encoder.keep,
        "weights_bytes": weights.bytes,
        "working_bytes": working,
        "needed_bytes": needed,
        "used_if_free_bytes": most,
        "available_bytes": available,
        "enough": enough,
    }


def plan_facts(plan: Plan, config) -> dict:
    """Return how a model would read an input without pruning.

    Includes timestamps, sizes and tokens, and for each preset the number of tokens and the bytes of their KV cache.
    """
    plan = plan.full
    n = plan.visual_tokens
    span = None if plan.is_picture else plan.sampling
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
                "kv_cache_bytes": Cost(config).kv_bytes(tokens),
            }
            for name, budget in Budget.PRESETS.items()
            for tokens in [budget.keep(plan.grid)]
        },
    }

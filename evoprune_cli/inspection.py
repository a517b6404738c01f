"""Collects the information printed by `evoprune inspect` about this machine and how a model would read a video."""

import os
import platform
from typing import Any, TextIO

import evoprune
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError
from evoprune.methods import Budget
from evoprune.model import Config, Cost
from evoprune.util import installed_version, without_password
from evoprune.video import Plan
from evoprune_cli.variables import SECRET, VARIABLES

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "av", "decord", "typer", "rich", "numpy")
SHOWN = VARIABLES.keys() - {
    SECRET
}  # environment variables whose values are printed; values of all others may be secret
HIDDEN = "(set)"


def environment_facts(stdout: TextIO) -> dict:
    """Describe this machine: versions, devices, decoders, methods, caches, environment variables, and the encoding of `stdout`."""
    import torch
    from huggingface_hub import constants

    from evoprune import methods
    from evoprune.backend import Device, Host, Quantization
    from evoprune.session import BUNDLED_CONFIGS

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"evoprune": evoprune.__version__} | {name: installed_version(name) for name in PACKAGES},
        "devices": Device.describe_all(),
        "available": {"cores": Host().available_cores(), "memory_bytes": Host().available_memory()},
        "quantize": Quantization.kinds(torch.device("cpu")),
        "decoders": _decoders(),
        "methods": methods.available(),
        "method_plugins": methods.plugins(),
        **_demos(),
        "bundled_configs": list(BUNDLED_CONFIGS),
        "hub_cache": constants.HF_HUB_CACHE,
        "cache": _cache(),
        "offline": constants.HF_HUB_OFFLINE,
        "stdout_encoding": stdout.encoding,
        "environment": {
            name: without_password(value) if name in SHOWN else HIDDEN
            for name, value in sorted(os.environ.items())
            if name.startswith("EVOPRUNE_")
        },
    }


def _decoders() -> dict[str, str]:
    from evoprune.video import choose_decoder

    try:
        choose_decoder("decord")
    except EvopruneError as problem:
        return {"pyav": "works", "decord": problem.message}
    return {"pyav": "works", "decord": "works"}


def _demos() -> dict[str, str]:
    """Return the state and the folder of each demo model: `demo_model`, `demo_model_folder`, and so on."""
    demos = {}
    for name, demo in DEMOS.items():
        key = f"{name.replace('-', '_')}_model"
        demos[key] = "installed" if (demo.folder / "model.safetensors").is_file() else "missing"
        demos[f"{key}_folder"] = str(demo.folder)
    return demos


def _cache() -> dict[str, Any]:
    from evoprune.session import Cache

    cache = Cache()
    videos, occupied = cache.size()
    segments, segments_bytes = cache.of_segments.size()
    models, models_bytes = cache.of_weights.size()
    return {
        "folder": str(cache.folder),
        "videos": videos,
        "size_bytes": occupied,
        "limit_bytes": cache.limit_bytes,
        "segments": segments,
        "segments_bytes": segments_bytes,
        "segments_limit_bytes": cache.of_segments.limit_bytes,
        "quantized_models": models,
        "quantized_bytes": models_bytes,
    }


def plan_facts(plan: Plan, config: Config) -> dict:
    """Describe how a model would read an input without pruning.

    The result includes timestamps, sizes, and token counts. For each budget preset, it also includes the number of kept tokens and
    the size of their KV cache.
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
        "cut_by": plan.cut_by,
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

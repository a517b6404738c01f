"""Configures transformers modules for each device: their layer and expert implementations, and whether they call fla kernels."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import TypeVar

import torch

from evoprune.backend.devices import is_host, wants_plain_pytorch

T = TypeVar("T")

# Name of the KV cache argument and output field in transformers models. Transformers 5.24 and later use the first name, older
# versions the second.
CACHE_NAMES = ("cache", "past_key_values")

EXPERTS = "evoprune"  # the name under which `_experts_output` is registered with transformers
# Transformers functions that are replaced with GPU kernels if fla or causal-conv1d is installed.
FUSED = {"causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}
# Counts the active `without_packages` contexts in each thread.
_thread = threading.local()


@cache
def cache_name() -> str:
    """Return the name of the KV cache argument in the installed transformers version."""
    from transformers.generation import GenerationMixin

    known = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in known)


def form_of_layers(device: torch.device, few: T, modules: T) -> T:
    """Select one of two layer implementations for a model.

    On the CPU, arithmetic is the bottleneck, so `modules` is returned. Other devices are limited by the number of operations, so
    `few` is returned unless plain PyTorch is requested.

    Args:
        device: The model's device.
        few: The implementation with as few operations as possible.
        modules: The implementation that calls the transformers modules.
    """
    return modules if is_host(device) or wants_plain_pytorch() else few


def _experts_output(layer, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer's experts, `[L, hidden]`.

    On devices other than the CPU, a single column is multiplied by copies of its expert weights, as transformers does during
    generation. Two or more columns use a grouped matmul. Except for bf16 on Hopper and Blackwell GPUs, the grouped matmul copies
    its group offsets to the host, which is not possible inside a CUDA graph.

    Args:
        layer: The transformers module that contains the experts.
        x: The columns, `[L, hidden]`.
        chosen: int64 `[L, n]`, the experts chosen for each column.
        weights: `[L, n]`, the output weight of each chosen expert.
    """
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    if len(x) == 1 and not is_host(x.device):
        return batched_mm_experts_forward(layer, x, chosen, weights)
    return grouped_mm_experts_forward(layer, x, chosen, weights)


@contextmanager
def without_packages() -> Iterator[None]:
    """Prevent linear attention layers in this thread from calling fla and causal-conv1d.

    Works as a context manager and a decorator. If these packages are installed, transformers calls them instead of its own
    functions. On the first prompt, fla would then spend more than a minute compiling and autotuning up to 59 kernel variants.
    """
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def choose_functions(model, *, experts: bool) -> None:
    """Replace the linear attention and expert functions in the language model of a `HostedVL`, in place.

    If the kernels in `FUSED` are installed, transformers calls them on every device, even though they fail on a CPU. The
    replacements call the built-in transformers functions on the CPU and inside a `without_packages` context. In all other cases,
    they call the kernels.

    Args:
        model: The `HostedVL` to change.
        experts: Whether MoE layers should call `_experts_output`. This has no effect if the model already uses a non-default
            implementation.
    """
    text = model.model.language_model
    for source in {type(part).__module__ for part in text.modules()}:
        functions = vars(sys.modules[source])
        for name in FUSED & functions.keys():
            if own := getattr(functions[name], "__wrapped__", None):
                functions[name] = partial(_fused_or_own, functions[name], own)
    if experts and model.config.text_config.experts is not None and text.config._experts_implementation == "grouped_mm":
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_output)
        text.config._experts_implementation = EXPERTS


def _fused_or_own(fused: Callable, own: Callable, x: torch.Tensor, *args, **kwargs):
    if getattr(_thread, "depth", 0) or is_host(x.device):
        return own(x, *args, **kwargs)
    return fused(x, *args, **kwargs)

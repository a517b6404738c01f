"""How transformers modules run on each device: which layer implementation, which kernels, and how experts are multiplied."""

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

# Names of the KV cache in the arguments and outputs of transformers models: since version 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")

EXPERTS = "evoprune"  # the name of `_experts_output` in transformers' registry of experts implementations
# Functions in transformers modules that are GPU kernels if fla or causal-conv1d is installed.
FUSED = {"causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}
# Holds the number of active `without_packages` contexts of each thread.
_thread = threading.local()


@cache
def cache_name() -> str:
    """Return the argument name of the KV cache in the installed transformers version."""
    from transformers.generation import GenerationMixin

    known = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in known)


def form_of_layers(device: torch.device, few: T, modules: T) -> T:
    """Choose the function that runs the layers on a device.

    A CPU is limited by arithmetic, so it runs the modules. A GPU is limited by the number of operations, so it runs `few`. If plain
    PyTorch is requested, all devices run the modules.

    Args:
        device: The device of the model.
        few: Runs layers with few operations.
        modules: Runs the transformers modules.
    """
    return modules if is_host(device) or wants_plain_pytorch() else few


def _experts_output(layer, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the output of a layer's experts, `[L, hidden]`.

    On devices other than the CPU, a single column is multiplied with copies of its experts' weights, as transformers does during
    generation. Several columns use the grouped matmul, which copies the ends of the groups to the host (except in bf16 on Hopper
    and Blackwell GPUs). A CUDA graph cannot contain such a copy.

    Args:
        layer: The experts, a transformers module.
        x: The columns, `[L, hidden]`.
        chosen: int64 `[L, n]`, the experts of each column.
        weights: `[L, n]`, the weights of the experts' outputs.
    """
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    if len(x) == 1 and not is_host(x.device):
        return batched_mm_experts_forward(layer, x, chosen, weights)
    return grouped_mm_experts_forward(layer, x, chosen, weights)


@contextmanager
def without_packages() -> Iterator[None]:
    """Prevent linear attention layers in this thread from calling fla and causal-conv1d (context manager and decorator).

    If these packages are installed, transformers calls them instead of its own functions. Before the first prompt, fla would spend
    more than a minute compiling and timing up to 59 variants of its kernels.
    """
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def choose_functions(model, *, experts: bool) -> None:
    """Choose the functions that the language model of a `HostedVL` calls.

    If `FUSED` kernels are installed, transformers calls them on any device, but they fail on a CPU. This replaces them, so that
    transformers' own functions run on the CPU and within `without_packages`.

    Args:
        model: The model, which is changed in place.
        experts: Make mixtures of experts call `_experts_output`, unless an implementation other than transformers' default was
            chosen.
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

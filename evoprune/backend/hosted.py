"""How modules of transformers compute by device: as they are or in few operations, by which functions, and how experts multiply."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from inspect import signature
from typing import Any, TypeVar

import torch

from evoprune.backend.devices import is_host, wants_plain_pytorch

T = TypeVar("T")

# Names of the argument of transformers' models, and of the field of their outputs, for the KV cache: since 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")

EXPERTS = "evoprune"  # the name of `through_experts` among transformers' implementations of experts
# Functions in modules of transformers: where fla or causal-conv1d is installed, kernels for GPUs.
FUSED = {"causal_conv1d_fn", "causal_conv1d_update", "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"}
# Of each thread: how many contexts of `without_packages` it is in.
_thread = threading.local()


@cache
def cache_name() -> str:
    """Return the name that the installed transformers gives to the KV cache."""
    from transformers.generation import GenerationMixin

    known = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_NAMES if name in known)


def cache_of(values: Mapping) -> Any:
    """Return the KV cache among the arguments or outputs of a transformers model by name, or None if there is none.

    transformers 5.24 and later take the old name too.
    """
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def form_of_layers(device: torch.device, few: T, modules: T) -> T:
    """Return which of two functions runs layers: `few`, of few operations, or `modules`, of transformers.

    A CPU waits for arithmetic, and takes the modules; so does whoever wants plain PyTorch. A GPU waits for its operations.
    """
    return modules if is_host(device) or wants_plain_pytorch() else few


def through_experts(layer, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return what the experts of a layer make of columns, both `[L, hidden]`. `layer`: a module of transformers.

    Off the CPU a single column goes through a product with copies of its experts' weights, as where transformers generates.
    The product of groups, which serves several, copies the ends of the groups to the host: in every dtype but bf16, and in bf16
    on GPUs other than Hopper's and Blackwell's. A CUDA graph cannot do that.

    Args:
        chosen: int64 `[L, n]`, the experts of each column. weights: `[L, n]`, of what they return.
    """
    from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

    if len(x) == 1 and not is_host(x.device):
        return batched_mm_experts_forward(layer, x, chosen, weights)
    return grouped_mm_experts_forward(layer, x, chosen, weights)


@contextmanager
def without_packages() -> Iterator[None]:
    """Provide a context, and a decorator, in which this thread's layers of linear attention call no function of fla or
    causal-conv1d.

    Where these packages are installed, transformers calls them in place of its own functions. fla compiles and times up to 59 forms
    of its kernels before the first prompt is read, which takes more than a minute.
    """
    _thread.depth = getattr(_thread, "depth", 0) + 1
    try:
        yield
    finally:
        _thread.depth -= 1


def choose_functions(module: torch.nn.Module) -> None:
    """Has transformers run its own functions in `without_packages`, and on tensors of a CPU, where it has imported `FUSED` kernels.

    It calls those whatever the device, and on a CPU they fail.
    """
    for source in {type(part).__module__ for part in module.modules()}:
        functions = vars(sys.modules[source])
        for name in FUSED & functions.keys():
            if own := getattr(functions[name], "__wrapped__", None):
                functions[name] = partial(_chosen, functions[name], own)


def _chosen(fused: Callable, own: Callable, x: torch.Tensor, *args, **kwargs):
    if getattr(_thread, "depth", 0) or is_host(x.device):
        return own(x, *args, **kwargs)
    return fused(x, *args, **kwargs)

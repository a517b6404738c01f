"""Device-specific code. Callers pass in a device or tensors, and the functions in this package adapt to the device.

Every kernel and CUDA graph has a fallback in plain PyTorch, used if the kernel can't run or if `EVOPRUNE_PLAIN=1` is set.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.backend.attention import (
        Attention,
        without_cudnn,
    )
    from evoprune.backend.cpu.linear import Packing, linear, shared_copy, weights_bytes
    from evoprune.backend.cpu.quantize import Quantization
    from evoprune.backend.devices import (
        Device,
        Timer,
        empty_cache,
        pick_device,
        plain_pytorch,
        read_or,
        to_device,
    )
    from evoprune.backend.hosted import EXPERTS, cache_name, choose_functions, form_of_layers, without_packages
    from evoprune.backend.indexed import accept_biases
    from evoprune.backend.layers import is_unhooked_linear, joined, kernels_for
    from evoprune.backend.limits import (
        DeviceName,
        Host,
        keep_freed_memory,
    )
    from evoprune.backend.operators import (
        greedy_cosine,
        mean_rows,
        nearest_selected,
        reuse_scan,
        snap,
        standard_places,
        tube_radii,
        unit_counts,
    )
    from evoprune.backend.weights import prepare

__all__ = [
    "EXPERTS",
    "Attention",
    "Device",
    "DeviceName",
    "Host",
    "Packing",
    "Quantization",
    "Timer",
    "accept_biases",
    "cache_name",
    "choose_functions",
    "empty_cache",
    "form_of_layers",
    "greedy_cosine",
    "is_unhooked_linear",
    "joined",
    "keep_freed_memory",
    "kernels_for",
    "linear",
    "mean_rows",
    "nearest_selected",
    "pick_device",
    "plain_pytorch",
    "prepare",
    "read_or",
    "reuse_scan",
    "shared_copy",
    "snap",
    "standard_places",
    "to_device",
    "tube_radii",
    "unit_counts",
    "weights_bytes",
    "without_cudnn",
    "without_packages",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "attention": [
            "Attention",
            "without_cudnn",
        ],
        "cpu.linear": ["Packing", "linear", "shared_copy", "weights_bytes"],
        "cpu.quantize": ["Quantization"],
        "devices": [
            "Device",
            "Timer",
            "empty_cache",
            "pick_device",
            "plain_pytorch",
            "read_or",
            "to_device",
        ],
        "hosted": ["EXPERTS", "cache_name", "choose_functions", "form_of_layers", "without_packages"],
        "indexed": ["accept_biases"],
        "layers": ["is_unhooked_linear", "joined", "kernels_for"],
        "limits": [
            "Host",
            "DeviceName",
            "keep_freed_memory",
        ],
        "operators": [
            "greedy_cosine",
            "mean_rows",
            "nearest_selected",
            "reuse_scan",
            "snap",
            "standard_places",
            "tube_radii",
            "unit_counts",
        ],
        "weights": ["prepare"],
    },
)

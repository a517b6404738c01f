"""Compile the Triton kernels for GPUs on a machine that has no GPU. test_kernels.py runs this file in a separate process."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evoprune.backend import kernels

# By argument name; all other arguments are pointers to float32, or constants.
TYPES = {
    **dict.fromkeys(("row", "tubes", "selected", "order", "ends", "pair", "source"), "*i64"),
    **dict.fromkeys(
        ("points", "begin", "length", "count", "pairs", "units", "seen", "known", "rows", "keep", "width"), "i32"
    ),
    **dict.fromkeys(("threshold", "still", "rounding", "factor"), "fp32"),
    "cosines": "*i16",
}
LOW, HIGH = kernels._bits(1 / 1.2), kernels._bits(1.2)
SCAN = {"low": LOW, "high": HIGH, "halvings": (HIGH - LOW).bit_length(), "blocks": 32}
ROWS = {"block_rows": kernels.ROWS, "block": kernels.CHANNELS}
CASES = {
    "distances": (kernels._tube_distances, {"side": kernels.SIDE}, {}),
    "nearest": (kernels._nearest, {"side": kernels.SIDE}, {"out": "*i64"}),
    "radii": (kernels._greedy, {"block": 256}, {}),
    "means": (kernels._means, {"width": 5120, "block": 1024}, {"rows": "*bf16", "out": "*bf16"}),
    "moments": (kernels._moments, ROWS, {"rows": "*bf16", "count": "*fp32"}),
    "standardise": (kernels._standardise, {"width": 5120} | ROWS, {"rows": "*bf16"}),
    "reuse": (kernels._scan, SCAN | {"block": 512}, {}),
    "groups": (
        kernels._rotate_into_groups,
        {"heads": 16, "dim": 80, "more": 8, "root": 80**0.5, "least": -1000.0, "half": 64, "gathers": True},
        {name: "*bf16" for name in ("qkv", "q", "k", "v")} | {name: "*i64" for name in ("place", "keys", "weight")},
    ),
    "cosines": (kernels._greedy_cosine, {"weighted": True, "with_bonus": False, "block": 16384}, {}),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", CASES)
def test_a_kernel_compiles(name, capability):
    kernel, constants, types = CASES[name]
    signature = {each: (TYPES | types).get(each, "*fp32") for each in kernel.arg_names} | dict.fromkeys(
        constants, "constexpr"
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    assert "cubin" in triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm

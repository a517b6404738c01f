"""Measure individual kernels and steps, and print the times as Markdown tables: `python -m experiments.speed.kernels`.

The measurements cover single-row matrix products (the work of decoding), memory bandwidth, and weight packing and quantization. The
weights are random, in bf16 on the CPU, with the dimensions of the 3B model.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from evoprune.backend import (
    Device,
    Packing,
    Quantization,
    shared_copy,
)
from evoprune.errors import UsageError
from evoprune.model import Config, QwenVL, matmul_rate
from evoprune.session import ModelOptions, describe
from experiments.tables import table
from experiments.timing import medians

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
CPU = torch.device("cpu")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """Measurement sizes.

    Attributes:
        config: The config of the model whose dimensions are used.
        product: The number of input and output features of the single-row products.
        copies: The number of copies of each weight, which together are too large for any CPU cache.
        read_bytes: The size of the tensor read to measure memory bandwidth.
    """

    config: Config
    product: tuple[int, int] = (2048, 11008)
    copies: int = 12
    read_bytes: int = 2**30


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n".join([f"\n{title}\n", *table(columns, rows)]), flush=True)


def times(ms: Sequence[float]) -> list[tuple[str, str]]:
    """Format times in milliseconds, each with its ratio to the first time."""
    return [(f"{each:,.0f}" if each >= 100 else f"{each:.3g}", f"{each / ms[0]:.2f}x") for each in ms]


# Decoding: single-row products, which read all weights.


def kernels(inner: int, outer: int, copies: int) -> Iterator[tuple[str, int, list[Callable]]]:
    """Yield each kernel that maps `[1, inner]` to `[1, outer]`: its name, the bytes it reads, and one function per weight copy."""
    layers = []
    for _ in range(copies):
        layers.append(nn.Linear(inner, outer, bias=False, device="meta"))
        weight = torch.randn(outer, inner).mul_(0.02).to(DTYPE)
        layers[-1].weight = nn.Parameter(weight, requires_grad=False)
    yield "bf16, plain", layers[0].weight.nbytes, layers
    packed = converted(layers, Packing.now)
    yield "bf16, packed", packed[0].nbytes, packed
    scale = torch.ones(outer, dtype=DTYPE)
    bytes_ = [layer.weight.to(torch.int8) for layer in layers]
    products = [partial(torch.ops.aten._weight_int8pack_mm, mat2=weight, scales=scale) for weight in bytes_]
    yield "int8, `_weight_int8pack_mm`", bytes_[0].nbytes + scale.nbytes, products
    int8 = converted(layers, lambda module: Quantization("int8").apply(module, call_layers))
    yield "int8 (as built)", int8[0].nbytes, int8
    int4 = converted(layers, lambda module: Quantization("int4").apply(module, call_layers))
    yield "int4 (as built)", int4[0].nbytes, int4
    # The values are arbitrary, because the time does not depend on them.
    numbers = torch.randint(16, (outer, inner), dtype=torch.int32)
    held = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1) for _ in layers]
    for group in (32, 128):
        scales = torch.ones(inner // group, outer, 2, dtype=DTYPE)
        products = [partial(_int4_product, packed=packed, group=group, scales=scales.clone()) for packed in held]
        yield f"int4, `_weight_int4pack_mm_for_cpu`, groups of {group}", held[0].nbytes + scales.nbytes, products


def converted(layers: Sequence[nn.Linear], convert: Callable[[nn.Module], None]) -> list[nn.Module]:
    """Return copies of the layers after applying `convert`, which changes a module in place.

    The module passed to `convert` contains the copies and has the same structure as a language model.
    """
    copies = nn.ModuleList(map(shared_copy, layers))
    module = tree(model=tree(language_model=copies))
    module.dtype = DTYPE  # a complete model derives its dtype from its norms
    convert(module)
    return [*copies]


def _int4_product(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)


def single_rows(sizes: Sizes, repeat: int) -> None:
    """Print how long a single-row product takes with each kernel, and how fast the kernel reads its weights."""
    x = torch.randn(1, sizes.product[0]).to(DTYPE)
    names, sizes_bytes, weights = zip(*kernels(*sizes.product, sizes.copies), strict=True)
    # Pass a new view each time; otherwise, layers would share the converted activations.
    with Quantization.decoding():
        ms = medians(
            [lambda products=products: [product(x[:]) for product in products] for products in weights], repeat
        )
    ms = [each / sizes.copies for each in ms]
    rows = [
        (name, *cells, f"{size / 2**20:.1f}", f"{size / each / 1e6:.1f}")
        for name, size, each, cells in zip(names, sizes_bytes, ms, times(ms), strict=True)
    ]
    title = "One row by {}x{} weights, {} of each in turn".format(*sizes.product, sizes.copies)
    show(title, ("kernel", "ms", "of plain bf16", "MiB", "GB/s"), rows)


def memory(sizes: Sizes, repeat: int) -> None:
    """Print the combined memory read rate of all threads."""
    numbers = torch.ones(sizes.read_bytes // 4)
    (ms,) = medians([numbers.sum], repeat)
    print(f"\nMemory: {sizes.read_bytes / 2**20:,.0f} MiB summed at {numbers.nbytes / ms / 1e6:.1f} GB/s")


# Startup: packing and quantizing weights.


def call_layers(module: nn.Module) -> None:
    """Call every linear layer in a module with one row of zeros."""
    for layer in [each for each in module.modules() if hasattr(each, "in_features")]:
        layer(torch.zeros(1, layer.in_features, dtype=DTYPE))


def tree(**children: nn.Module) -> nn.Module:
    """Return an empty module with the given children."""
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def conversions(model: QwenVL, sizes: Sizes) -> None:
    """Print how long it takes to pack and quantize one layer and the whole model. `model` has only one decoder layer."""
    text = sizes.config.text_config
    vision = sizes.config.vision_config
    rows = []
    for kind in ("packed", "int8", "int4"):
        fresh = model.shared()  # new layers that share the same weights
        pieces = {
            "a decoder layer": (text.num_hidden_layers, tree(model=tree(language_model=fresh.model.language_model))),
            "the output layer": (1, tree(lm_head=fresh.lm_head)),
        }
        if kind == "packed":
            pieces["a tower layer"] = vision.depth, tree(block=fresh.model.visual.blocks[0])
        total = 0.0
        for name, (count, module) in pieces.items():
            module.dtype = DTYPE  # a complete model derives its dtype from its norms
            start = time.perf_counter()
            Packing.now(module) if kind == "packed" else Quantization(kind).apply(module, call_layers)
            spent = time.perf_counter() - start
            total += count * spent
            rows.append((kind, name, f"{spent:.2f}", f"{count}", f"{count * spent:.1f}"))
        rows.append((kind, "all", "", "", f"{total:.1f}"))
    show("Seconds to pack and to quantize weights", ("form", "of", "s", "times", "s in all"), rows)


@torch.no_grad()
def measure(sizes: Sizes, repeat: int) -> None:
    """Run all measurements and print their tables."""
    single_rows(sizes, repeat)
    memory(sizes, repeat)
    small = replace(
        sizes.config,
        vision_config=replace(sizes.config.vision_config, depth=1, fullatt_block_indexes=()),
        text_config=replace(sizes.config.text_config, num_hidden_layers=1),
    )
    conversions(QwenVL.random(small, DTYPE, CPU), sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds; their median is shown (default: 7)")
    args = parser.parse_args()
    try:
        Quantization("int8").check(CPU)
        Quantization("int4").check(CPU)
    except UsageError as problem:
        parser.exit(2, f"{problem.message}\n")
    sizes = Sizes(describe(ModelOptions(MODEL, load_format="dummy")).config)
    if not Packing.supports(torch.empty(1, dtype=DTYPE)):
        parser.exit(2, "this CPU has no products in bf16\n")
    env = Device("cpu").environment()
    rate = matmul_rate(DTYPE) / 1e9
    print(f"{env.device_name}, {env.threads} threads, {rate:.0f} GFLOP/s in bf16 products; torch {env.torch}")
    print(f"Medians of {args.repeat} rounds after one of warm-up, all rows of a table in turn")
    measure(sizes, args.repeat)


if __name__ == "__main__":
    main()

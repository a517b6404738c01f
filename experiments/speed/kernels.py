"""Time single kernels and steps, as Markdown tables: `python -m experiments.speed.kernels`.

It measures products of single rows, memory, packing and quantising of weights, and one layer of the tower against alternatives. The
weights are random and of the 3B model's dimensions, on the CPU, in bf16.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend.cpu.linear import PackedLinear, can_pack, linear, pack
from evoprune.backend.cpu.quantize import (
    Int4Linear,
    Int8Linear,
    Unquantised,
    check,
    int4_weights,
    int8_weights,
    quantize,
)
from evoprune.backend.devices import PIECE_UNITS, environment
from evoprune.errors import UsageError, first_line
from evoprune.methods.plans import full_plan
from evoprune.model.config import PATCHES, Config, vision_sizes
from evoprune.model.cost import matmul_rate
from evoprune.model.weights import QwenVL, Tree, shared
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import random_model
from evoprune.session.options import ModelOptions
from evoprune.vision.attention import PaddedGroups, grouped_attention
from evoprune.vision.encoder import encode
from evoprune.vision.families import norm as tower_norm
from evoprune.vision.tower import rotary, rotate, tower_geometry, tower_shape
from experiments.timing import medians

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
CPU = torch.device("cpu")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        config: of the model whose dimensions are taken.
        product: (in, out) features of the products of single rows.
        copies: of each weight of those products, too many for any cache.
        read_bytes: size of the tensor that is read to measure memory.
        grid: (H, W) of a frame pair in units, whole windows.
        grids: frame pairs that the encoder takes at a time.
        clip: frame pairs of the clip that the tower encodes in chunks, or at once.
        rows: of products of bytes.
    """

    config: Config
    product: tuple[int, int] = (2048, 11008)
    copies: int = 12
    read_bytes: int = 2**30
    grid: tuple[int, int] = (8, 12)
    grids: int = 5
    clip: int = 16
    rows: tuple[int, ...] = (1, 34, 68, 126, 414, 1536)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    print(f"\n{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |", flush=True)


def times(ms: Sequence[float]) -> list[tuple[str, str]]:
    """Milliseconds as text, and how many times the first of them each is."""
    return [(f"{each:,.0f}" if each >= 100 else f"{each:.3g}", f"{each / ms[0]:.2f}x") for each in ms]


# Decoding: products of one row, which read all weights.


def kernels(inner: int, outer: int, copies: int) -> Iterator[tuple[str, int, list[Callable]]]:
    """Of each kernel for x `[1, inner]` to `[1, outer]`: its name, the bytes it reads, and one function for each weight."""
    layers = []
    for _ in range(copies):
        layers.append(nn.Linear(inner, outer, bias=False, device="meta"))
        weight = torch.randn(outer, inner).mul_(0.02).to(DTYPE)
        layers[-1].weight = nn.Parameter(weight, requires_grad=False)
    yield "bf16, plain", layers[0].weight.nbytes, layers
    packed = [PackedLinear(layer) for layer in layers]
    yield "bf16, packed", packed[0].nbytes, packed
    scale = torch.ones(outer, dtype=DTYPE)
    bytes_ = [layer.weight.to(torch.int8) for layer in layers]
    products = [partial(torch.ops.aten._weight_int8pack_mm, mat2=weight, scales=scale) for weight in bytes_]
    yield "int8, `_weight_int8pack_mm`", bytes_[0].nbytes + scale.nbytes, products
    int8 = [Int8Linear(int8_weights(layer)) for layer in layers]
    yield "int8, integer products (as built)", int8[0].nbytes, int8
    int4 = [Int4Linear(int4_weights(layer), (outer, inner)) for layer in layers]
    yield "int4, groups of 32 (as built)", int4[0].nbytes, int4
    # The quantised layer knows groups of 32 only. The time does not depend on the values.
    group = 128
    numbers = torch.randint(16, (outer, inner), dtype=torch.int32)
    scales = torch.ones(inner // group, outer, 2, dtype=DTYPE)
    held = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1) for _ in layers]
    products = [partial(_int4_product, packed=packed, group=group, scales=scales.clone()) for packed in held]
    yield "int4, groups of 128", held[0].nbytes + scales.nbytes, products


def _int4_product(x: torch.Tensor, packed: torch.Tensor, group: int, scales: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)


def single_rows(sizes: Sizes, repeat: int) -> None:
    """Prints how long a product of one row takes with each kernel, and how fast it reads its weights."""
    x = torch.randn(1, sizes.product[0]).to(DTYPE)
    names, sizes_bytes, weights = zip(*kernels(*sizes.product, sizes.copies), strict=True)
    # A new view each time, because layers share the conversion of the same activations.
    ms = medians([lambda products=products: [product(x[:]) for product in products] for products in weights], repeat)
    ms = [each / sizes.copies for each in ms]
    rows = [
        (name, *cells, f"{size / 2**20:.1f}", f"{size / each / 1e6:.1f}")
        for name, size, each, cells in zip(names, sizes_bytes, ms, times(ms), strict=True)
    ]
    title = "One row by {}x{} weights, {} of each in turn".format(*sizes.product, sizes.copies)
    show(title, ("kernel", "ms", "of plain bf16", "MiB", "GB/s"), rows)


def byte_products(sizes: Sizes, repeat: int) -> None:
    """Prints how long products of bytes take by their number of rows, beside float32: as built, and with fbgemm's kernels.

    fbgemm takes float32 and rounds it itself; its scales are one a matrix. PyTorch has deprecated the tensors that it needs.
    """
    inner, outer = sizes.product
    plain = nn.Linear(inner, outer, bias=False)
    stored = int8_weights(plain)
    built = Int8Linear(stored)
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    scales = built.scale.double()
    zeros = torch.zeros(outer, dtype=torch.int64)
    weights = torch.quantize_per_channel(plain.weight.float(), scales, zeros, 0, torch.qint8)
    held = torch.ops.quantized.linear_prepack(weights, None)
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    rows = []
    for count in sizes.rows:
        x = torch.randn(count, inner)
        whole = built.to_bytes(x, built.large)[0].float()
        # A new view each time, because layers share the conversion of the same activations.
        ways = [lambda x=x: plain(x), lambda x=x: built(x[:]), lambda whole=whole: product(whole, 1.0, 0, held)]
        rows.append((f"{count:,}", *(cell for cells in times(medians(ways, repeat)) for cell in cells)))
    arranging = [
        lambda: Int8Linear(stored),
        lambda: torch.ops.quantized.linear_prepack(weights, None),
    ]
    for name, each in zip(("as built", "fbgemm"), medians(arranging, repeat), strict=True):
        print(f"Arranging the weights, {name}: {each:.0f} ms")
    torch.backends.quantized.engine = engine
    columns = (
        "rows",
        *(text for name in ("float32", "int8 as built", "fbgemm") for text in (f"{name}: ms", "of float32")),
    )
    show(f"Products by {inner}x{outer} weights", columns, rows)


def memory(sizes: Sizes, repeat: int) -> None:
    """Prints how fast all threads together read memory."""
    numbers = torch.ones(sizes.read_bytes // 4)
    (ms,) = medians([numbers.sum], repeat)
    print(f"\nMemory: {sizes.read_bytes / 2**20:,.0f} MiB summed at {numbers.nbytes / ms / 1e6:.1f} GB/s")


# Start-up: weights packed and quantised.


def call_layers(module: nn.Module) -> None:
    """Calls every linear layer with one row."""
    for layer in [each for each in module.modules() if type(each) is Unquantised]:
        layer(torch.zeros(1, layer.in_features, dtype=DTYPE))


def conversions(model: QwenVL, sizes: Sizes) -> None:
    """Prints how long packing and quantising take for a layer, and for the whole model. `model`: with one decoder layer."""
    text = sizes.config.text_config
    vision = sizes.config.vision_config
    rows = []
    for kind in ("packed", "int8", "int4"):
        fresh = shared(model)  # other layers on the same weights
        pieces = {
            "a decoder layer": (text.num_hidden_layers, Tree(model=Tree(language_model=fresh.model.language_model))),
            "the output layer": (1, Tree(lm_head=fresh.lm_head)),
        }
        if kind == "packed":
            pieces["a tower layer"] = vision.depth, Tree(block=fresh.model.visual.blocks[0])
        total = 0.0
        for name, (count, module) in pieces.items():
            module.dtype = DTYPE  # as a whole model tells it, with its norms
            start = time.perf_counter()
            pack(module) if kind == "packed" else quantize(module, kind, call_layers)
            spent = time.perf_counter() - start
            total += count * spent
            rows.append((kind, name, f"{spent:.2f}", f"{count}", f"{count * spent:.1f}"))
        rows.append((kind, "all", "", "", f"{total:.1f}"))
    show("Seconds to pack and to quantise weights", ("form", "of", "s", "times", "s in all"), rows)


# The tower: one layer, as it is built and with alternatives.

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def as_built(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention `[B, heads, rows, d]` by the encoder's own function. Its inputs and its result are views here."""
    groups, heads, rows, dim = q.shape
    units = rows // PATCHES
    q, k, v = (x.transpose(1, 2).reshape(-1, PATCHES, heads, dim) for x in (q, k, v))
    return grouped_attention(q, k, v, [PaddedGroups((groups, units))]).view(groups, rows, heads, dim).transpose(1, 2)


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PyTorch's own."""
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def layer(
    block: nn.Module,
    x: torch.Tensor,
    turn: tuple[torch.Tensor, torch.Tensor],
    heads: int,
    group: int,
    attend: Attention = as_built,
    norm: Callable = tower_norm,
) -> torch.Tensor:
    """One layer of the tower without pruning, on the functions that the encoder runs on.

    Args:
        block: its weights, plain or packed.
        x: `[units, 4, hidden]`. turn: cos and sin `[units, 4, 1, 1, d]`.
        group: patch rows that attend to each other.
    """
    qkv = linear(block.attn.qkv, norm(x, block.norm1.weight)).view(*x.shape[:2], 3, heads, -1)
    q, k = rotate(qkv[:, :, :2], *turn).unbind(2)
    by_head = [rows.reshape(-1, group, heads, rows.shape[-1]).transpose(1, 2) for rows in (q, k, qkv[:, :, 2])]
    mixed = attend(*by_head).transpose(1, 2).reshape(x.shape)
    x = linear(block.attn.proj, mixed, plus=x)
    hidden = norm(x, block.norm2.weight)
    hidden = linear(block.mlp.up_proj, hidden, times=linear(block.mlp.gate_proj, hidden, silu=True))
    return linear(block.mlp.down_proj, hidden, plus=x)


def layer_inputs(visual: nn.Module, sizes: Sizes) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[int]]:
    """x and `turn` of `layer`, in window order; and the patch rows of a window and of a frame pair."""
    geo = tower_geometry(visual, *sizes.grid)
    x = torch.randn(sizes.grids * geo.units, PATCHES, visual.config.hidden_size).to(DTYPE)
    cos, sin = (part[geo.order].repeat(sizes.grids, 1, 1, 1, 1) for part in rotary(vision_sizes(visual.config), geo))
    return x, (cos, sin), [geo.units // geo.windows * PATCHES, geo.units * PATCHES]


def layers(plain: nn.Module, packed: nn.Module, sizes: Sizes, repeat: int) -> None:
    """Prints the time of one layer as built, and with one alternative at a time. `plain` and `packed`: the tower."""
    x, turn, groups = layer_inputs(plain, sizes)
    heads = plain.config.num_heads
    sdpa = F.scaled_dot_product_attention
    run = partial(layer, packed.blocks[0])
    ways = {
        "as built": run,
        "plain weights, activations apart": partial(layer, plain.blocks[0]),
        "PyTorch's fused attention": partial(run, attend=sdpa),
        "PyTorch's rms_norm": partial(run, norm=rms_norm),
    }
    found = [times(medians([partial(way, x, turn, heads, group) for way in ways.values()], repeat)) for group in groups]
    for attend, name in ((as_built, "attention alone, as built"), (sdpa, "attention alone, PyTorch's")):
        ways[name] = attend
    for cells, group in zip(found, groups, strict=True):
        shape = (len(x) * PATCHES // group, group, 3, heads, plain.config.hidden_size // heads)
        qkv = torch.randn(shape).to(DTYPE).transpose(1, 3).unbind(2)  # views, as in the tower
        cells += times(medians([partial(attend, *qkv) for attend in (as_built, sdpa)], repeat))
    rows = [(name, *windows, *grids) for name, windows, grids in zip(ways, *found, strict=True)]
    columns = ["", *(text for group in groups for text in (f"groups of {group}: ms", "of as built"))]
    show(f"One layer of the tower, {len(x) * PATCHES:,} patch rows", columns, rows)


def pieces(packed: nn.Module, sizes: Sizes, repeat: int) -> None:
    """Prints the time of a short tower on a clip, some units at a time and all at once."""
    config = packed.config
    units = sizes.clip * sizes.grid[0] * sizes.grid[1]
    patches = torch.randn(units * PATCHES, packed.patch_embed.proj.weight[0].numel()).to(DTYPE)
    some = min(PIECE_UNITS, sizes.grids * sizes.grid[0] * sizes.grid[1])
    plan = full_plan(tower_shape(packed), (sizes.clip, *sizes.grid))
    runs = [partial(encode, packed, [patches], plan, piece_units=piece_units) for piece_units in (some, units)]
    ms = times(medians(runs, repeat))
    rows = [(f"{some} units at a time", *ms[0]), (f"all {units:,} at once", *ms[1])]
    show(f"A tower of {config.depth} layers on {2 * sizes.clip} frames", ("", "ms", "of as built"), rows)


def compiled(plain: nn.Module, packed: nn.Module, sizes: Sizes, repeat: int, backend: str = "inductor") -> None:
    """Prints how long one layer takes in windows, as it is built and compiled by torch.compile."""
    from torch._inductor import config as settings
    from torch._inductor.utils import fresh_cache

    x, turn, (group, _) = layer_inputs(plain, sizes)
    rest = (x, turn, plain.config.num_heads, group)
    ways: dict[str, Callable] = {
        "as built, packed weights": partial(layer, packed.blocks[0], *rest),
        "plain weights": partial(layer, plain.blocks[0], *rest),
    }
    notes = ["", ""]
    for name, freezing in (("torch.compile", False), ("torch.compile, weights frozen", True)):
        torch._dynamo.reset()

        def fixed(x: torch.Tensor) -> torch.Tensor:
            return layer(plain.blocks[0], x, *rest[1:])

        start = time.perf_counter()
        try:
            with fresh_cache(), settings.patch(freezing=freezing):
                run = torch.compile(fixed, backend=backend, dynamic=False)
                apart = (run(x) - fixed(x)).abs().max() / fixed(x).abs().max()
        except Exception as problem:  # no compiler, or one that fails, is a result too
            print(f"\n{name}: {type(problem).__name__}: {first_line(problem)}")
            continue
        ways[name] = partial(run, x)
        notes.append(f"{time.perf_counter() - start:.1f} s to compile, {apart:.1%} apart at most")
    cells = times(medians(list(ways.values()), repeat))
    rows = [(name, *cell, note) for name, cell, note in zip(ways, cells, notes, strict=True)]
    show(f"One layer of the tower compiled, {len(x) * PATCHES:,} patch rows", ("", "ms", "of as built", ""), rows)


@torch.no_grad()
def measure(sizes: Sizes, repeat: int, backend: str = "inductor") -> None:
    """Prints everything."""
    single_rows(sizes, repeat)
    memory(sizes, repeat)
    vision = sizes.config.vision_config
    text = sizes.config.text_config
    small = replace(
        sizes.config,
        vision_config=replace(vision, depth=2, fullatt_block_indexes=(1,)),  # one layer in windows, one in frame pairs
        text_config=replace(text, num_hidden_layers=1),
    )
    model = random_model(small, DTYPE, CPU)
    conversions(model, sizes)
    plain = model.model.visual
    packed = shared(model).model.visual
    pack(packed)
    layers(plain, packed, sizes, repeat)
    pieces(packed, sizes, repeat)
    compiled(plain, packed, sizes, repeat, backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds; their median is shown (default: 7)")
    parser.add_argument("--bytes", action="store_true", help="products of bytes alone, which need no bf16")
    args = parser.parse_args()
    try:
        check("int8", CPU)
        check("int4", CPU)
    except UsageError as problem:
        parser.exit(2, f"{problem.message}\n")
    sizes = Sizes(describe(ModelOptions(MODEL, load_format="dummy")).config)
    if args.bytes:
        env = environment("cpu")
        print(f"{env.device_name}, {env.threads} threads; torch {env.torch}; medians of {args.repeat} rounds in turn")
        with torch.no_grad():
            byte_products(sizes, args.repeat)
        return
    if not can_pack(torch.empty(1, dtype=DTYPE)):
        parser.exit(2, "this CPU has no products in bf16\n")
    env = environment("cpu")
    rate = matmul_rate(DTYPE) / 1e9
    print(f"{env.device_name}, {env.threads} threads, {rate:.0f} GFLOP/s in bf16 products; torch {env.torch}")
    print(f"Medians of {args.repeat} rounds after one of warm-up, all rows of a table in turn")
    measure(sizes, args.repeat)


if __name__ == "__main__":
    main()

"""Compare the products of 8-bit layers in the tower and in the language model: `python -m experiments.speed.products`.

The tower's weights are packed, and the language model's weights stay in row-major order (results/peers.md).
The weights are random, with the dimensions of the 3B model's largest layer.
"""

import argparse
import time
from functools import partial

import torch
from torch import nn

from evoprune.backend import Device, Quantization
from experiments.speed.kernels import tree
from experiments.tables import table
from experiments.timing import medians

SIZE = 2048, 11008  # input and output features
COPIES = 6  # of each layer, which together are too large for any CPU cache


def layers(part: str) -> nn.ModuleList:
    """Return int8 layers of this part of a model."""
    copies = nn.ModuleList(nn.Linear(*SIZE, bias=False) for _ in range(COPIES))
    module = tree(model=tree(**{part: copies}))
    module.dtype = torch.float32  # a complete model derives its dtype from its norms
    Quantization("int8").apply(module, lambda whole: [layer(torch.zeros(1, SIZE[0])) for layer in copies])
    return copies


def fbgemm() -> list:
    """Return weights that are packed for FBGEMM, which evoprune doesn't use because packing takes long."""
    torch.backends.quantized.engine = "fbgemm"
    whole = torch.ones(SIZE[1], SIZE[0], dtype=torch.int8)
    return [
        torch.ops.quantized.linear_prepack(torch._make_per_tensor_quantized_tensor(whole, 1.0, 0), None)
        for _ in range(COPIES)
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default="1,64,179,768")
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds; their median is shown (default: 7)")
    args = parser.parse_args()
    sides = [layers(part) for part in ("visual", "language_model")]
    begun = time.perf_counter()
    packed = fbgemm()
    packing_ms = (time.perf_counter() - begun) / COPIES * 1000
    rows = []
    for count in map(int, args.rows.split(",")):
        x = torch.randn(count, SIZE[0])

        def run(side: nn.ModuleList, x: torch.Tensor = x) -> None:
            for layer in side:
                layer(x[:])  # a new view, because layers with the same input would share its 8-bit form

        def answer() -> None:
            with Quantization.decoding():
                run(sides[1])

        def others(x: torch.Tensor = x) -> None:
            for weights in packed:
                torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(x, 1.0, 64, weights)

        ms = medians([*(partial(run, side) for side in sides), others, *([answer] if count == 1 else [])], args.repeat)
        rows.append((str(count), *(f"{each / COPIES:.2f}" for each in ms), *[""] * (4 - len(ms))))
    env = Device("cpu").environment()
    print(f"{env.device_name}, {env.threads} threads, torch {env.torch}; {SIZE[0]}x{SIZE[1]}, ms a layer")
    print(f"FBGEMM packs a layer in {packing_ms:.0f} ms\n")
    print("\n".join(table(("rows", "tower", "language model, prompt", "FBGEMM", "language model, answer"), rows)))


if __name__ == "__main__":
    main()

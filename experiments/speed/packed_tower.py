"""Measure how fast a Hugging Face model's tower encodes a video on its own, with `EvoPrune`, and with `EvoPrune(pack=True)`.

    python -m experiments.speed.packed_tower --threads 1

The tower has a published model's dimensions and random weights, because the speed does not depend on the values. Nothing is pruned.
The three variants take turns in rounds, and their median times are compared.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from evoprune.backend import Device
from evoprune.bench import Case, hugging_face_model, synthetic_clip
from evoprune.hf import PackedTower, encode_each
from evoprune.methods import Budget, PruneConfig
from evoprune.model import QwenVL
from evoprune.session import DTYPES, ModelOptions, describe
from evoprune.vision import normalised, pixel_patches
from experiments.tables import table
from experiments.timing import medians


def random_tower(name: str, dtype: torch.dtype):
    """Return a transformers tower with the dimensions of the model `name`, random weights, and sdpa attention."""
    config = describe(ModelOptions(name), local=True).config
    config = replace(config, text_config=replace(config.text_config, num_hidden_layers=1))
    return hugging_face_model(QwenVL.random(config, dtype, torch.device("cpu"))).model.visual


def measure(visual, patches: torch.Tensor, grid_thw: torch.Tensor, rounds: int) -> list[tuple[str, float, float]]:
    """Return each variant's name, its median time in milliseconds, and its tokens' relative deviation from Hugging Face."""
    packed = PackedTower(visual)
    none = PruneConfig.of(Budget.parse(1.0), "none")
    ways = {
        "Hugging Face": lambda: visual(patches, grid_thw=grid_thw).pooler_output,
        "EvoPrune": lambda: encode_each(visual, patches, grid_thw, none)[0].features,
        "EvoPrune, pack=True": lambda: encode_each(packed.current(), patches, grid_thw, none)[0].features,
    }
    with torch.inference_mode():
        made = [way().float() for way in ways.values()]
        ms = medians(list(ways.values()), rounds)
    apart = [float((each - made[0]).norm() / made[0].norm()) for each in made]
    return list(zip(ways, ms, apart, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.packed_tower", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="model whose dimensions to use")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--case", default="8x224x336", help="frames x height x width")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    case = Case(*map(int, options.case.split("x")))
    frames = synthetic_clip("motion", case.frames, case.height, case.width)
    patches = normalised(pixel_patches(torch.from_numpy(frames))).to(dtype)
    grid_thw = torch.tensor([[case.frames // 2, case.height // 14, case.width // 14]])
    env = Device("cpu").environment()
    print(
        f"{options.model}, {options.dtype}, {case}, {options.rounds} rounds, {options.threads} threads, {env.device_name}"
    )
    rows = measure(random_tower(options.model, dtype), patches, grid_thw, options.rounds)
    cells = [(name, f"{ms:,.0f}", f"{rows[0][1] / ms:.2f}", f"{apart:.2g}") for name, ms, apart in rows]
    print("\n".join(["", *table(("tower", "ms", "times as fast as Hugging Face", "relative difference"), cells)]))


if __name__ == "__main__":
    sys.exit(main())

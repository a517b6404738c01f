"""A model whose features ripen late: the demo model with layers in front of its tower that change nothing.

    python -m experiments.late_tower runs/late --clips runs/late-clips
    evoprune tune runs/late-clips/*.mp4 -m runs/late --questions runs/late-clips/questions.txt

The first new layer adds a large constant to every feature, the last one takes it away, and those between add nothing: all answers
stay the same. A selection between them sees features that are almost alike, so what is right for the demo model is wrong here.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch

from evoprune.bundled import DEMOS
from experiments.demo.worlds import SHAPES
from experiments.demo.write import clips_asked, write_clip

BLOCK = re.compile(r"^((?:model\.)?visual\.blocks\.)(\d+)(\..*)$")
QUESTIONS = """\
How many shapes are there?
What number can be seen?
What appears?
What vanishes?
Which thing flashes?
What happens in the video?
Is there a yellow triangle?
Which way does the square move?
What colour is the digit?
How big is the white shape?
"""
ADDS = ("attn.proj.weight", "attn.proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias")


def late_tower(folder: Path, layers: int, common: float = 0.0, source: Path = DEMOS["demo"].folder) -> None:
    """Writes the model into a folder.

    Args:
        folder: made if it is missing.
        layers: how many are put in front; a multiple of the distance between layers that see whole frames leaves their rhythm.
        common: length of the constant, beside features of about 10.
        source: the folder of a model with one file of weights.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    vision = config["vision_config"]
    vision["depth"] += layers
    vision["fullatt_block_indexes"] = [number + layers for number in vision["fullatt_block_indexes"]]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    made, before = {}, ""
    for name, weight in load_file(source / "model.safetensors").items():
        found = BLOCK.match(name)
        if not found:
            made[name] = weight
            continue
        before, number, after = found[1], int(found[2]), found[3]
        made[f"{before}{number + layers}{after}"] = weight
        if number == 0:
            for new in range(layers):
                made[f"{before}{new}{after}"] = torch.zeros_like(weight) if after[1:] in ADDS else weight.clone()
    bias = made[f"{before}0.mlp.down_proj.bias"]
    constant = torch.randn(len(bias), dtype=torch.float32, device="cpu", generator=torch.Generator().manual_seed(0))
    constant = (constant * common / constant.norm()).to(bias.dtype)
    made[f"{before}0.mlp.down_proj.bias"] = constant
    made[f"{before}{layers - 1}.mlp.down_proj.bias"] = -constant
    save_file(made, folder / "model.safetensors", {"format": "pt"})


def write_clips(folder: Path, block: int, count: int = 16) -> None:
    """Writes the first validation clips of a block as files, to tune on, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.txt").write_text(QUESTIONS)
    for name in clips_asked(SHAPES.name, "validation", block, count):
        write_clip(name, folder, SHAPES.crf[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--common", type=float, default=300.0)
    parser.add_argument("--clips", type=Path, help="a folder for 16 validation clips of the block")
    parser.add_argument("--block", type=int, default=34)
    args = parser.parse_args()
    late_tower(args.folder, args.layers, args.common)
    if args.clips:
        write_clips(args.clips, args.block)


if __name__ == "__main__":
    main()

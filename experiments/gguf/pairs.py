"""Measure evoprune and llama.cpp with Q8_0 and Q4_K_M pairs that have Qwen2.5-VL-3B's dimensions and random weights.

    python -m experiments.gguf.pairs FOLDER --sources SOURCES [--only-files] [--kinds Q8_0,Q4_K_M]

Run it in the environment of `python -m experiments.environments gguf --into DIR`, in which SOURCES is llama.cpp's folder. The
command writes the checkpoint and the pairs to FOLDER, unless they are there, and prints the error of the weights. Then it measures
the first and later starts with `experiments.speed.loading`, and answers with `experiments.speed.peers`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from experiments.gguf.convert import convert
from experiments.speed.checkpoint import MODEL, write_checkpoint
from experiments.speed.processes import ROOT

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
KINDS = "Q8_0,Q4_K_M"


def write_pairs(folder: Path, sources: Path, kinds: list[str]) -> Path:
    """Write a folder with a text file and a projector for each type, and return the bf16 text file."""
    from experiments.gguf.llama import quantize

    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, MODEL)
        settings = CLIP | {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
        (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    full, projector = folder / "model-BF16.gguf", folder / "mmproj-F16.gguf"
    if not full.exists():
        convert(sources, checkpoint, full, "qwen2", "--outtype", "bf16")
    if not projector.exists():
        convert(sources, checkpoint, projector, "qwen2", "--outtype", "f16", "--mmproj")
    for kind in kinds:
        text = folder / kind / f"model-{kind}.gguf"
        if not text.exists():
            text.parent.mkdir(exist_ok=True)
            quantize(full, text, kind)
            (text.parent / projector.name).hardlink_to(projector)
    return full


def error_of(text: Path, full: Path, sources: Path) -> float:
    """Return the root mean square error of the layers' matrices, relative to the bf16 file."""
    sys.path.insert(0, str(sources / "gguf-py"))
    from gguf import GGUFReader
    from gguf.quants import dequantize

    exact = {each.name: each for each in GGUFReader(full).tensors}
    wrong = size = 0.0
    for each in GGUFReader(text).tensors:
        if each.name.startswith("blk.") and len(each.shape) > 1:
            stored, right = (dequantize(one.data, one.tensor_type) for one in (each, exact[each.name]))
            wrong += float(np.square(stored - right).sum(dtype=np.float64))
            size += float(np.square(right).sum(dtype=np.float64))
    return (wrong / size) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sources", type=Path, required=True, help="folder of llama.cpp")
    parser.add_argument("--kinds", default=KINDS)
    parser.add_argument(
        "--only-files", action="store_true", help="only write the files, and print the error of the weights"
    )
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(exist_ok=True)
    kinds = args.kinds.split(",")
    full = write_pairs(folder, args.sources.absolute(), kinds)
    for kind in kinds:
        text = folder / kind / f"model-{kind}.gguf"
        print(f"{kind}: error of weights {error_of(text, full, args.sources.absolute()):.4f}", flush=True)
        if args.only_files:
            continue
        run("experiments.speed.loading", text, "--quantize", "int8")
        peers = [
            "--quantize",
            "int8",
            "--llama",
            sys.executable,
            "--gguf",
            text,
            "--mmproj",
            text.with_name("mmproj-F16.gguf"),
        ]
        run("experiments.speed.peers", text, "-o", folder / f"peers-{kind}", *peers, "--new", "16")


def run(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, check=True)  # noqa: S603 (this Python)


if __name__ == "__main__":
    main()

"""Write README's table of models: what fits into a machine's memory, how much is downloaded, and how long the first word takes.

    python -m experiments.model_table            # print the table
    python -m experiments.model_table --readme   # write it into README.md

Download sizes and memory come from `evoprune inspect` for one minute of 1080p video. The time for Qwen2.5-VL-3B was measured
(results/peers.md). All other times are estimates: this time, scaled by the number of operations for the same video.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from evoprune.methods import TowerShape
from evoprune.model import Cost
from evoprune.session import ModelOptions, PruneOptions, describe
from evoprune.video import Plan, SamplingOptions, probe
from experiments.tables import fill, table

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- models: python -m experiments.model_table --readme -->"
END = "<!-- end of models -->"
MODELS = {  # the memory of a machine that suffices, in GiB
    "Qwen/Qwen3.5-0.8B": 8,
    "Qwen/Qwen2.5-VL-3B-Instruct": 8,
    "Qwen/Qwen3-VL-4B-Instruct": 16,
    "Qwen/Qwen2.5-VL-7B-Instruct": 16,
    "Qwen/Qwen3-VL-8B-Instruct": 16,
}
MEASURED = "Qwen/Qwen2.5-VL-3B-Instruct"
FIRST_WORD_S = {"balanced": 35, "fast": 18}  # results/peers.md: 68 frames from 90 s of 1080p video, 8 bits, AVX512
SECONDS = 60
TEXT_TOKENS = 40  # tokens of a prompt's text


def clip(folder: Path) -> Path:
    """Write one minute of gray 1080p video."""
    path = folder / "minute.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(1), options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        frame = np.full((1080, 1920, 3), 128, np.uint8)
        for _ in range(SECONDS):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode())
    return path


def inspected(path: Path, model: str) -> dict:
    command = [sys.executable, "-m", "evoprune_cli", "inspect", str(path), "-m", model, "--quantize", "int8", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 (runs evoprune)
    return json.loads(result.stdout)


def operations(path: Path, model: str, budget: str) -> float:
    """Return the number of operations until the first word about a video."""
    description = describe(ModelOptions(model, device="cpu"), local=True)
    plan: Plan = description.plan(probe(path), SamplingOptions(), PruneOptions(budget=budget))
    encoder = plan.encoder
    count, height, width = plan.grid
    windows = TowerShape.of(description.config.vision_config, "cpu").windows(height, width)
    cost = Cost(description.config)
    tower = cost.tower_flop([*encoder.layers, encoder.rows], count, windows)
    return tower + cost.prefill_flop(TEXT_TOKENS + encoder.keep)


def gib(count: int) -> str:
    return f"{count / 2**30:.1f}"


def lines() -> list[str]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = clip(Path(folder))
        most = {budget: operations(path, MEASURED, budget) for budget in FIRST_WORD_S}
        for model, memory in MODELS.items():
            facts = inspected(path, model)
            waits = []
            for budget, measured_s in FIRST_WORD_S.items():
                wait_s = measured_s * operations(path, model, budget) / most[budget]
                waits.append(f"{measured_s}" if model == MEASURED else f"about {wait_s:.0f}")
            download = gib(facts["model"]["download_bytes"])
            rows.append([f"{memory} GiB", f"`{model}`", download, gib(facts["memory"]["needed_bytes"]), *waits])
    heads = ["your memory", "model", "download, GiB", "memory it needs, GiB"]
    return table([*heads, *(f"first word with `-b {budget}`, s" for budget in FIRST_WORD_S)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    text = "\n".join(lines())
    if not parser.parse_args().readme:
        print(text)
        return
    fill(README, BEGIN, END, text)


if __name__ == "__main__":
    main()

"""How fast the vision tower is at true model dimensions: `python -m evoprune.benchmark`.

Random weights on a bundled config, so it needs no download: speed does not depend on what the weights are. All sides run in turn,
again and again, in one process; figures are medians, ratios are taken round by round, so a drift of the machine's speed cancels.
"""

import argparse
import platform
import statistics
import time
from dataclasses import dataclass

import torch

from evoprune import methods
from evoprune.dummy import random_tower
from evoprune.models import BUNDLED_CONFIGS, DTYPES, describe_model
from evoprune.pruning.budget import keep_count
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import patchify


@dataclass(frozen=True)
class Row:
    """One side: seconds of every round, what was kept, and the mean share of rows the tower computed."""

    name: str
    seconds: list[float]
    tokens: int
    live_share: float
    prune_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def time_tower(visual, frames: torch.Tensor, budgets: list[float], method: str, rounds: int) -> list[Row]:
    """Times Hugging Face's tower and ours at each budget, alternating, after one round of warm-up.

    Args:
        visual: a Hugging Face vision tower.
        frames: uint8 `[F, H, W, 3]`, F even, H and W multiples of 28.
        budgets: shares of tokens kept.
        method: name of the pruning method.
        rounds: how often each side is timed.
    """
    count, height, width, _ = frames.shape
    grid = (count // 2, height // 28, width // 28)
    units = grid[0] * grid[1] * grid[2]
    patches = patchify(frames).to(visual.dtype)
    thw = torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])
    rule = methods.get(method)

    def hugging_face():
        with torch.inference_mode():
            return visual(patches, grid_thw=thw).pooler_output

    sides = {"Hugging Face": hugging_face}
    for budget in budgets:
        sides[f"{method} -b {budget:g}"] = lambda b=budget: encode(visual, [patches], grid, rule, keep_count(b, units))
    seconds, results = {name: [] for name in sides}, {}
    for round_ in range(rounds + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            results[name] = run()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    rows = [Row("Hugging Face", seconds["Hugging Face"], units, 1.0, 0.0)]
    for name in list(sides)[1:]:
        made = results[name]
        rows.append(Row(name, seconds[name], len(made.kept), made.live_share, made.prune_seconds))
    return rows


def table(rows: list[Row]) -> str:
    """A Markdown table; the ratio is the median of the rounds' ratios to Hugging Face."""
    lines = [
        "| tower | median s | min-max s | times HF's speed | live share | pruning | tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = statistics.median(hf / own for hf, own in zip(rows[0].seconds, row.seconds, strict=True))
        share = f"{row.prune_seconds / row.median:.1%}" if row.prune_seconds else ""
        lines.append(
            f"| {row.name} | {row.median:.2f} | {min(row.seconds):.2f}-{max(row.seconds):.2f} | {ratio:.2f}x"
            f" | {row.live_share:.2f} | {share} | {row.tokens:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="Qwen/Qwen2.5-VL-3B-Instruct", choices=sorted(BUNDLED_CONFIGS))
    parser.add_argument("-b", "--budget", default="1.0,0.25,0.1", help="list of shares kept")
    parser.add_argument("--method", default="evoprune-paper")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="224x336", help="height x width, multiples of 28")
    parser.add_argument("--dtype", default="bf16", choices=sorted(DTYPES))
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    visual = random_tower(describe_model(args.model)[0].vision_config, DTYPES[args.dtype])
    frames = torch.randint(
        0, 256, (args.frames, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    rows = time_tower(visual, frames, [float(b) for b in args.budget.split(",")], args.method, args.rounds)
    units = args.frames // 2 * (height // 28) * (width // 28)
    print(
        f"{args.model} (true dimensions, random weights), {args.dtype}, {args.frames} frames of {args.size} = {units:,} units, "
        f"{torch.get_num_threads()} threads, {args.rounds} rounds, torch {torch.__version__}, {platform.machine()}\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()

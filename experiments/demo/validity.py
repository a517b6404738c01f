"""Measure how well a world reproduces the published ranking of methods: `python -m experiments.demo.validity -m FOLDER`.

Only methods by other authors are run, on images and videos of scenes. For each method, the table compares the fraction of full
accuracy kept with the published figure for Qwen2.5-VL (docs/methods.md). The mix of clips and questions is chosen based on this
table. This project's own methods are not run, so that the mix cannot be tuned in their favor.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evoprune.bench import EvalSettings, Evaluation
from evoprune.language import GenerationOptions
from evoprune.session import ModelOptions
from experiments import tables
from experiments.demo.worlds import SCENES
from experiments.demo.write import clips_asked, data_text, demo_videos
from experiments.progress import progress_line

PICTURE = "picture"
VIDEO = "video"
SIXTH = 1 / 6
LONGEST = 12  # maximum number of tokens in an answer; no answer about scenes is longer
# A cell is near its published figure if the two differ by at most this many percentage points of accuracy kept. The world is close
# enough if at least this many cells are near and all rank correlations reach this value.
NEAR, ENOUGH, AGREED = 6.0, 8, 0.7


@dataclass(frozen=True)
class Cell:
    """A published figure: the percentage of full accuracy that a method keeps on a question group at a budget.

    `counted` is True for the twelve cells that decide whether the world is close enough. `ranked` is True if the cell is included
    in the rank correlation for its group and budget. `within` restricts the questions to a more specific group.
    """

    group: str
    budget: float
    method: str
    published: float
    counted: bool = True
    ranked: bool = True
    within: str = ""


CELLS = (
    Cell(PICTURE, 0.25, "scope", 92.5),
    Cell(PICTURE, 0.25, "divprune", 89.3),
    Cell(PICTURE, 0.25, "vispruner", 88.3),
    Cell(PICTURE, 0.25, "visionzip", 87.6),
    Cell(PICTURE, 0.25, "dart", 85.7, counted=False),
    Cell(PICTURE, 0.25, "divprune", 68.0, counted=False, ranked=False, within="text"),
    Cell(PICTURE, 0.1, "scope", 79.4),
    Cell(PICTURE, 0.1, "divprune", 76.1),
    Cell(PICTURE, 0.1, "vispruner", 72.6),
    Cell(PICTURE, 0.1, "visionzip", 71.8),
    Cell(PICTURE, 0.1, "dart", 69.8, counted=False),
    Cell(PICTURE, 0.1, "random", 72.0, counted=False),
    Cell(PICTURE, 0.1, "divprune", 37.0, counted=False, ranked=False, within="text"),
    Cell(VIDEO, 0.2, "visionzip", 96.0),
    Cell(VIDEO, 0.1, "visionzip", 92.0),
    Cell(VIDEO, 0.1, "flashvid", 93.0),
    Cell(VIDEO, SIXTH, "subsample", 93.0),
    Cell(VIDEO, SIXTH, "pool", 89.0, counted=False),
    Cell(VIDEO, 0.24, "fastvid", 95.7, counted=False),
)


def kept(
    model: str, limit: int, seed: int, split: str, processes: int
) -> tuple[dict[Cell, float], list[str], list[dict]]:
    """Measure how much accuracy each cell's method keeps, as a percentage of full accuracy.

    Also returns all answers, and one line per group with its full and blind accuracy.
    """
    found = {}
    facts = []
    samples = []
    for group in (PICTURE, VIDEO):
        with demo_videos(clips_asked(SCENES.name, split, seed, limit, [group]), [group]) as videos:
            for budget in dict.fromkeys(cell.budget for cell in CELLS if cell.group == group):
                cells = [cell for cell in CELLS if (cell.group, cell.budget) == (group, budget)]
                first = budget == next(cell.budget for cell in CELLS if cell.group == group)
                # On the CPU, because evoprune prunes clips this small inside the tower only on CPUs.
                settings = EvalSettings(
                    data_text(SCENES.name, split, seed), (budget,), tuple(dict.fromkeys(cell.method for cell in cells)),
                    blind=first, groups=(group,), limit=limit, model=ModelOptions(model, device="cpu", dtype="fp32"),
                    generation=GenerationOptions(max_new_tokens=LONGEST),
                )  # fmt: skip
                run = Evaluation(settings, videos)
                run.load()
                run.run(
                    lambda *what, at=(group, budget): _progress(f"{at[0]} {at[1]:.2g}: {progress_line(*what)}"),
                    processes,
                )
                samples += run.samples
                rows = run.document()["rows"]
                by_name = {(row["row"], row["method"], row["group"]): row for row in rows}
                if first:
                    full, blind = (by_name[kind, "none", "all"] for kind in ("full", "blind"))
                    facts.append(
                        f"{group}: {full['n']:,} questions about {full['videos']:,} clips; in full {100 * full['accuracy']:.1f}%, "
                        f"blind {100 * blind['accuracy']:.1f}%"
                    )
                for cell in cells:
                    value = by_name["method", cell.method, cell.within or "all"]["kept_of_full"]
                    found[cell] = math.nan if value is None else 100 * value
    return found, facts, samples


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what[:78]}", end="", file=sys.stderr, flush=True)


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the one-based ranks of the values. Tied values get their mean rank."""
    array = np.asarray(values, float)
    return np.array([((array < v).sum() + (array <= v).sum() + 1) / 2 for v in array])


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Spearman's rank correlation, or NaN if one side is constant."""
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else math.nan


def table(found: dict[Cell, float], facts: list[str]) -> str:
    """Return the table of published and measured figures, the number of near cells, and the rank correlations."""
    rows = []
    for counted in (True, False):
        for cell in (cell for cell in CELLS if cell.counted == counted):
            name = f"{cell.group} {cell.within}".strip() + ("" if counted else ", for information")
            ours = found[cell]
            figures = f"{cell.published:.1f}", f"{ours:.1f}", f"{ours - cell.published:+.1f}"
            rows.append([name, f"{cell.budget:.2g}", cell.method, *figures])
    heads = ("", "budget", "method", "published", "ours", "difference")
    lines = [*(f"- {fact}" for fact in facts), "", *tables.table(heads, rows)]
    near = sum(cell.counted and abs(found[cell] - cell.published) <= NEAR for cell in CELLS)
    lines += ["", f"- {near} of 12 cells within {NEAR:g} points ({ENOUGH} wanted)"]
    groups = {
        f"{PICTURE} {b:g}": [c for c in CELLS if (c.group, c.budget) == (PICTURE, b) and c.ranked] for b in (0.25, 0.1)
    }
    groups[f"{VIDEO}, all budgets"] = [c for c in CELLS if c.group == VIDEO and c.ranked]
    for name, cells in groups.items():
        value = rank_correlation([c.published for c in cells], [found[c] for c in cells])
        lines.append(f"- rank correlation, {name}, {len(cells)} methods: {value:.2f} ({AGREED} wanted)")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="folder of weights that were trained on scenes")
    parser.add_argument("--limit", type=int, default=300, help="clips of each group (default: %(default)s)")
    parser.add_argument("--split", default="validation", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="block of clips (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="clips at a time (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="also write the table to this file")
    parser.add_argument("--samples", type=Path, help="write the answers to this file, one line of JSON each")
    asked = parser.parse_args(args)
    found, facts, samples = kept(asked.model, asked.limit, asked.seed, asked.split, asked.processes)
    text = table(found, facts)
    print(text)
    if asked.samples:
        asked.samples.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

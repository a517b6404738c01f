"""Measure whether probabilities of choices mean what they say: `python -m experiments.accuracy.calibration -o results/choices.md`.

Each bundled model answers about clips of its own world, once by the text that it generates and once by the likelihood of choices:
the options of a question, or else all answers to questions of its type about these clips. The Brier score and the reliability
table are of all choices' probabilities; the confidence of an answer is the probability of the choice that was taken.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from evoprune.bench.eval import EvalSettings, Evaluation, told
from evoprune.bench.questions import VideoQuestions
from evoprune.bench.scores import FULL, mean_brier, row_name
from evoprune.session.options import GenerationOptions, ModelOptions
from experiments.demo.worlds import SCENES, SHAPES
from experiments.demo.write import clips_asked, data_text, demo_videos

MODELS = {SHAPES.name: "demo", SCENES.name: "demo-scenes"}
BUDGET = 0.25
LONGEST = 64  # tokens of an answer or a choice: none about a world is longer
BINS = (0.0, 0.5, 0.7, 0.9, 0.99, 1.0)  # of confidence
MOST = 26  # choices of a question: as many as options may be


def with_choices(videos: Sequence[VideoQuestions]) -> list[VideoQuestions]:
    """Return videos whose questions all have options: those that have none get all answers of their type.

    Questions whose type has one answer, or too many, are left out.
    """
    answers = defaultdict(set)
    for video in videos:
        for row in video.rows:
            answers[row.type].add(row.answer)
    chosen = []
    for video in videos:
        rows = []
        for row in video.rows:
            options = row.options or tuple(sorted(answers[row.type]))
            if 2 <= len(options) <= MOST:
                rows.append(replace(row, options=options))
        chosen.append(replace(video, rows=tuple(rows)))
    return [video for video in chosen if video.rows]


def without_the_others(videos: Sequence[VideoQuestions], kept: Sequence[VideoQuestions]) -> list[VideoQuestions]:
    """Return the videos with the questions alone that `kept` has too, as they were."""
    ids = {row.id for video in kept for row in video.rows}
    found = [replace(video, rows=tuple(row for row in video.rows if row.id in ids)) for video in videos]
    return [video for video in found if video.rows]


def evaluated(world: str, split: str, block: int, score: str, videos: Sequence[VideoQuestions]) -> list[dict]:
    settings = EvalSettings(
        data_text(world, split, block), (BUDGET,), score=score,
        model=ModelOptions(MODELS[world], device="cpu", dtype="fp32"),
        generation=GenerationOptions(max_new_tokens=LONGEST),
    )  # fmt: skip
    run = Evaluation(settings, videos)
    run.load()
    run.run(lambda *what: _progress(f"{world}, {score}: {told(*what)}"))
    for sample in run.samples:
        if "error" in sample:
            raise SystemExit(f"{sample['video']} failed: {sample['error']['message']}")
    return run.samples


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what[:78]}", end="", file=sys.stderr, flush=True)


def reliability(samples: Sequence[dict]) -> list[tuple[str, int, float, float]]:
    """Return for each bin of confidence: its name, its answers, their mean confidence, the share of right ones."""
    confidence = np.array([max(each["probability"] for each in sample["choices"]) for sample in samples])
    right = np.array([sample["right"] for sample in samples])
    lines = []
    for low, high in pairwise(BINS):
        inside = (confidence >= low) & (confidence < high)
        if high == BINS[-1]:
            inside |= confidence == high
        if inside.any():
            name = f"{low:g} to {high:g}"
            lines.append((name, int(inside.sum()), float(confidence[inside].mean()), float(right[inside].mean())))
    return lines


def calibration_error(samples: Sequence[dict]) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over bins, weighted by their answers."""
    lines = reliability(samples)
    total = sum(count for _, count, _, _ in lines)
    return sum(count * abs(confidence - right) for _, count, confidence, right in lines) / total


def tables(by_world: dict[str, tuple[list[dict], list[dict]]]) -> str:
    """Return both tables as Markdown, of the samples of each world: graded by text, and by likelihood."""
    scores = [
        "| model | row | questions | right by text | right by likelihood | Brier | calibration error |",
        "|---|---|---|---|---|---|---|",
    ]
    bins = ["| model | row | confidence | answers | mean confidence | right |", "|---|---|---|---|---|---|"]
    for world, (by_text, by_likelihood) in by_world.items():
        for kind in dict.fromkeys((s["row"], s["method"], s["budget"]) for s in by_likelihood):
            name = "nothing pruned" if kind[0] == FULL else row_name(*kind)
            chosen = [s for s in by_likelihood if (s["row"], s["method"], s["budget"]) == kind]
            texts = [s["right"] for s in by_text if (s["row"], s["method"], s["budget"]) == kind]
            right = np.mean([s["right"] for s in chosen])
            scores.append(
                f"| {MODELS[world]} | {name} | {len(chosen):,} | {100 * np.mean(texts):.1f}% | {100 * right:.1f}% "
                f"| {mean_brier(chosen):.3f} | {calibration_error(chosen):.3f} |"
            )
            for interval, count, confidence, share in reliability(chosen):
                bins.append(
                    f"| {MODELS[world]} | {name} | {interval} | {count:,} | {confidence:.3f} | {100 * share:.1f}% |"
                )
    return "\n".join([*scores, "", *bins]) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=150, help="clips of each world (default: %(default)s)")
    parser.add_argument("--split", default="heldout", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="block of clips (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, help="write the tables there too")
    asked = parser.parse_args(args)
    found = {}
    for world in MODELS:
        with demo_videos(clips_asked(world, asked.split, asked.seed, asked.limit)) as videos:
            choosing = with_choices(videos)
            given = (world, asked.split, asked.seed)
            by_text = evaluated(*given, "text", without_the_others(videos, choosing))
            found[world] = by_text, evaluated(*given, "likelihood", choosing)
    text = tables(found)
    print(text)
    if asked.output:
        asked.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

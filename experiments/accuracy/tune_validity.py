"""Check whether agreement without labels picks what labels would have picked.

    python -m experiments.accuracy.tune_validity runs/shapes.jsonl runs/second.jsonl --heldout runs/shapes-6.jsonl runs/b-6.jsonl

It reads files of `tune_records`: for each model one of clips to tune on, and one of others to report on, in the same
order. It prints the rank correlations of agreement, of KL and of the clips' own labels with labelled accuracy; how many clips they
need; and, from disjoint draws of clips, what accuracy the recommended setting has on the other clips.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evoprune.bench.tune import bounds, design_effect, smoothed
from evoprune.bench.tune import recommended as fastest

FULL = "none -b 1"
DRAWS = 200
COUNTS = (4, 8, 16, 32)
POINT = 0.01


@dataclass(frozen=True)
class Records:
    """Sums over the questions of each clip, settings by clips.

    Attributes:
        names: of the settings, without the full budget.
        right, questions, agree, tokens, kl: `[S, C]`; KL summed over tokens.
        tflop: `[S]`, mean operations.
        full: `[C]`, right answers of the full budget.
    """

    names: tuple[str, ...]
    right: np.ndarray
    questions: np.ndarray
    agree: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray
    tflop: np.ndarray
    full: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        return self.right.sum(1) / self.questions.sum(1)


def read(path: Path) -> Records:
    """Return the records of a file; clips that are not complete are left out."""
    clips: dict[str, dict[str, dict]] = defaultdict(dict)
    for line in path.read_text().splitlines():
        record = json.loads(line)
        clips[record["clip"]][record["name"]] = record
    names = list(next(iter(clips.values())))
    whole = [found for found in clips.values() if len(found) == len(names)]

    def table(value) -> np.ndarray:
        return np.array([[sum(map(value, found[name]["answers"])) for found in whole] for name in names], float)

    right = table(lambda answer: answer["right"])
    tflop = np.array([np.mean([found[name]["tflop_3b"] for found in whole]) for name in names])
    at = names.index(FULL)
    others = [i for i, name in enumerate(names) if name != FULL]
    tables = [
        right,
        table(lambda a: 1),
        table(lambda a: a["agree"]),
        table(lambda a: a["tokens"]),
        table(lambda a: sum(a["kl"])),
    ]
    return Records(tuple(names[i] for i in others), *(made[others] for made in tables), tflop[others], right[at])


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks along the last axis, ties at their mean."""
    order = values[..., None, :]
    return (order < values[..., :, None]).sum(-1) + (order == values[..., :, None]).sum(-1) / 2


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def correlations(records: Records, accuracy: np.ndarray, clips: int | None = None) -> list[float]:
    """Of agreement, of -KL and of labels with accuracy: over all clips, or the median over draws of so many of them."""
    total = records.right.shape[1]
    random = np.random.default_rng(0)
    draws = [np.arange(total)]
    if clips is not None:
        draws = [random.choice(total, clips, replace=False) for _ in range(DRAWS)]
    found = []
    for chosen in draws:
        tokens = records.tokens[:, chosen].sum(1)
        scores = records.agree[:, chosen].sum(1) / tokens, -records.kl[:, chosen].sum(1) / tokens
        found.append([spearman(score, accuracy) for score in (*scores, records.right[:, chosen].sum(1))])
    return np.median(found, 0).tolist()


@dataclass(frozen=True)
class Draw:
    """What a draw of clips recommends, and what that is worth on other clips: shares."""

    name: str
    promised: float
    agreement: float
    accuracy: float
    best: str
    best_accuracy: float

    @property
    def holds(self) -> bool:
        """Within a point of the best setting of equal or lower cost, and as much agreement as promised."""
        return self.accuracy >= self.best_accuracy - POINT and self.agreement >= self.promised


def recommended(records: Records, chosen: Sequence[int], goal: float) -> tuple[int, float] | None:
    """What `tune` would recommend from these clips, with operations for times, and its lower bound; None where there is none."""
    counts = [(records.agree[s, chosen], records.tokens[s, chosen]) for s in range(len(records.names))]
    tokens = records.tokens[:, chosen].sum(1)
    effect = design_effect(counts)
    shares = smoothed(records.agree[:, chosen].sum(1), tokens, records.kl[:, chosen].sum(1) / tokens)
    lows = [bounds(share, int(count), len(chosen), effect)[0] for share, count in zip(shares, tokens, strict=True)]
    rows = [
        {"at": s, "method": name, "first_token": records.tflop[s], "passes": low >= goal}
        for s, (name, low) in enumerate(zip(records.names, lows, strict=True))
    ]
    row = fastest(rows)
    if row is None:
        return None
    best = row["at"]
    return best, lows[best]


def draws(tune: Records, heldout: Records, clips: int, goal: float) -> list[Draw | None]:
    """Of disjoint sets of clips; None where no setting passes."""
    order = np.random.default_rng(1).permutation(tune.right.shape[1])
    made = []
    for first in range(0, len(order) - clips + 1, clips):
        found = recommended(tune, order[first : first + clips], goal)
        if found is None:
            made.append(None)
            continue
        chosen, low = found
        cheap = [s for s in range(len(heldout.names)) if heldout.tflop[s] <= heldout.tflop[chosen] * 1.001]
        best = max(cheap, key=lambda s: heldout.accuracy[s])
        agreement = heldout.agree[chosen].sum() / heldout.tokens[chosen].sum()
        made.append(
            Draw(
                tune.names[chosen], low, float(agreement), float(heldout.accuracy[chosen]), tune.names[best],
                float(heldout.accuracy[best]),
            )
        )  # fmt: skip
    return made


def report(title: str, tune: Records, heldout: Records | None, goals: Sequence[float], clips: int) -> str:
    """One model's section, in Markdown."""
    questions = int(tune.questions[0].sum())
    lines = [
        f"## {title}",
        "",
        f"{len(tune.names)} settings, {tune.right.shape[1]} clips, {questions:,} questions.",
        "",
    ]
    others = tune.accuracy
    which = "the same clips"
    if heldout is not None:
        others = heldout.accuracy
        which = f"{int(heldout.questions[0].sum()):,} questions about other clips"
    lines += ["Rank correlation with labelled accuracy over the settings (of drawn clips the median of 200 draws).", ""]
    lines += ["| score on | accuracy on | agreement | -KL | labels |", "|---|---|---|---|---|"]
    rows = [
        ("all clips", "the same clips", correlations(tune, tune.accuracy)),
        ("all clips", which, correlations(tune, others)),
    ]
    rows += [(f"{count} clips", which, correlations(tune, others, count)) for count in COUNTS]
    lines += [f"| {one} | {other} | {' | '.join(f'{value:.3f}' for value in values)} |" for one, other, values in rows]
    if heldout is not None:
        full = heldout.full.sum() / heldout.questions[0].sum()
        lines += ["", f"The full budget answers {100 * full:.1f}% of the held-out questions right.", ""]
        lines += [
            "| agree | draw | recommended | promised | agrees | right | best that costs no more | right | holds |"
        ]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for goal in goals:
            for number, draw in enumerate(draws(tune, heldout, clips, goal), 1):
                lines.append(_row(goal, number, draw))
    return "\n".join(lines) + "\n"


def _row(goal: float, number: int, draw: Draw | None) -> str:
    if draw is None:
        return f"| {goal:g} | {number} | none | | | | | | |"
    shares = [f"{100 * x:.1f}" for x in (draw.promised, draw.agreement, draw.accuracy, draw.best_accuracy)]
    first = f"| {goal:g} | {number} | {draw.name} | {shares[0]} | {shares[1]} | {shares[2]} |"
    return f"{first} {draw.best} | {shares[3]} | {'yes' if draw.holds else 'no'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--heldout", type=Path, nargs="*", default=[])
    parser.add_argument("--agree", type=float, nargs="+", default=[0.9, 0.85, 0.8])
    parser.add_argument("--clips", type=int, default=16)
    args = parser.parse_args()
    others = args.heldout or [None] * len(args.files)
    for path, other in zip(args.files, others, strict=True):
        print(report(path.stem, read(path), other and read(other), args.agree, args.clips))


if __name__ == "__main__":
    main()

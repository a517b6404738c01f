"""The frontier: methods of others against `evoprune` at equal time, a table and a chart.

    python -m experiments.equal_time PROFILE.json --presets DIR --rivals DIR -o results/equal-time.md --chart results/frontier.svg

PROFILE.json is of `evoprune profile --format json`. Both folders are of `experiments.frontier`: the first has the presets on many
clips, the second the methods of others and `evoprune` on the same clips. A method that selects after the encoder has the time of
the profile's bound, which leaves its selection out.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from evoprune import methods
from evoprune.evaluation.scores import FULL, METHOD
from evoprune.profiling.results import BOUND
from evoprune.pruning.budget import PRESETS
from evoprune.text import budget_text
from evoprune.visualize.chart import COLOURS, INK, Panel, Point, Series, draw
from evoprune.visualize.svg import SOFT
from experiments.frontier import SETS, kept, samples_of
from experiments.paired import in_points, paired_difference

OURS = "evoprune"
ALIKE = 1.03  # times that differ by less are equal
LEAST = 60  # percent; the chart leaves out what keeps less

Key = tuple[str, float | str]  # a method and a budget
Samples = dict[str, dict[Key, list[dict]]]  # by set, then by row; with nothing pruned it is NONE
NONE: Key = "none", 1.0


def read(folders: Sequence[Path]) -> Samples:
    found: Samples = {}
    for name in SETS:
        rows = found[name] = {}
        for folder in folders:
            for sample in samples_of(folder, name):
                if sample["row"] in (FULL, METHOD):
                    key = NONE if sample["row"] == FULL else (sample["method"], sample["budget"])
                    rows.setdefault(key, {})[sample["video"], sample["id"]] = sample
        found[name] = {key: list(each.values()) for key, each in rows.items()}
    return found


def speeds(profiles: Sequence[Path]) -> dict[Key, float]:
    """First token of Hugging Face over that of each row of the same run, by a video's share; a bound has the method BOUND."""
    found = {}
    for profile in profiles:
        for row in json.loads(profile.read_text(encoding="utf-8"))["rows"]:
            method = BOUND if row["row"] == BOUND else row["method"]
            if method and (ratio := row["ratio"]["first_token_to_hugging_face"]):
                found.setdefault((method, float(PRESETS.get(row["budget"], row["budget"]))), ratio)
    return found


def speed_of(key: Key, fast: dict[Key, float]) -> float | None:
    name, budget = key
    share = float(PRESETS.get(budget, budget))
    after = methods.parse(name).acts == "after"
    return fast.get((BOUND if after else name, share))


def on_same(mine: list[dict], others: list[dict]) -> list[dict]:
    there = {(s["video"], s["id"]) for s in others}
    return [s for s in mine if (s["video"], s["id"]) in there]


def worst(samples: Samples, key: Key) -> float:
    """Percent of the accuracy kept in the worst of the sets."""
    return min(kept(rows[key], on_same(rows[NONE], rows[key])) for rows in samples.values())


def verdicts(samples: Samples, key: Key, ours: Key) -> list[str]:
    """Our row minus the other one, in points, in each set."""
    made = []
    for rows in samples.values():
        mine = on_same(rows[ours], rows[key])
        mean, low, high = paired_difference(mine, on_same(rows[key], mine))
        word = "better" if low > 0 else "worse" if high < 0 else "tie"
        made.append(f"{word} {in_points(mean, low, high)}")
    return made


def table(samples: Samples, fast: dict[Key, float]) -> list[str]:
    """A row for each row of the others: the most accurate of ours that takes no longer, and what it keeps more."""
    rows = set.intersection(*(set(each) for each in samples.values()))
    ours = {key: speed_of(key, fast) for key in rows if key[0] == OURS} | {NONE: fast["none", 1.0]}
    ours = {key: speed for key, speed in ours.items() if speed}
    lines = [
        "| | first token | keeps | ours | first token | " + " | ".join(SETS) + " |",
        "|---" * (len(SETS) + 5) + "|",
    ]
    missing = []
    others = {key: speed_of(key, fast) for key in rows if key[0] not in (OURS, "none")}
    for key, speed in sorted(others.items(), key=lambda each: -(each[1] or 0)):
        text = f"`{key[0]} -b {budget_text(key[1])}`"
        if not speed:
            missing.append(text)
            continue
        slow = {one: at for one, at in ours.items() if at * ALIKE >= speed}
        if not slow:
            lines.append(f"| {text} | {speed:.2f} | {worst(samples, key):.1f} | none so fast | | " + " | " * len(SETS))
            continue
        best = max(slow, key=lambda one: worst(samples, one))
        cells = [
            text,
            f"{speed:.2f}",
            f"{worst(samples, key):.1f}",
            f"`-b {budget_text(best[1])}`",
            f"{ours[best]:.2f}",
        ]
        lines.append("| " + " | ".join([*cells, *verdicts(samples, key, best)]) + " |")
    return [*lines, "", f"Not profiled: {', '.join(missing)}."] if missing else lines


def chart(samples: Samples, presets: Samples, fast: dict[Key, float]) -> str:
    rows = set.intersection(*(set(each) for each in samples.values()))
    inside, after = [], []
    for key in sorted(rows, key=str):
        speed = speed_of(key, fast)
        if key[0] in (OURS, "none") or not speed or worst(samples, key) < LEAST:
            continue
        is_after = methods.parse(key[0]).acts == "after"
        (after if is_after else inside).append(Point(speed, worst(samples, key), label="" if is_after else key[0]))
    made = set.intersection(*(set(each) for each in presets.values()))
    ours = [(speed_of((OURS, name), fast), name) for name in PRESETS if (OURS, name) in made]
    line = [Point(speed, worst(presets, (OURS, name)), label=f"-b {name}") for speed, name in ours if speed]
    series = [
        Series("evoprune", (Point(fast["none", 1.0], 100.0, label="-b full"), *line), COLOURS[0]),
        *(Series("", (point,), COLOURS[1]) for point in inside),
        *(Series("", (point,), SOFT, hollow=True) for point in after),
        Series("", (Point(1.0, 100.0, label="Hugging Face"),), INK),
    ]
    x_label, y_label = "first token, times as fast as Hugging Face", "accuracy kept, worst of four sets, %"
    facts = (
        "Two generated worlds, two demo models each. Orange: methods of others inside the encoder or the language model, at a "
        "quarter and a tenth of the tokens; grey: methods after the encoder, as fast as they would be if selecting cost nothing. "
        "3B dimensions, 8 moving frames, fp32, two CPU threads."
    )
    return draw(
        "Accuracy kept against speed", facts, [Panel("", x_label, y_label, tuple(series), from_zero=False)], False
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profiles", type=Path, nargs="+", help="the first one that has a row counts")
    parser.add_argument("--presets", type=Path, nargs="+", required=True)
    parser.add_argument("--rivals", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, help="of the table; default: stdout")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args(arguments)
    fast = speeds(args.profiles)
    samples, presets = read(args.rivals), read(args.presets)
    text = "\n".join(table(samples, fast)) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.chart:
        args.chart.write_text(chart(samples, presets, fast), encoding="utf-8")


if __name__ == "__main__":
    main()

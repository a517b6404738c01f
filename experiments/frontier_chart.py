"""The frontier as a chart: what each method keeps in the worst of the sets, against its first token.

    python -m experiments.frontier_chart PROFILE.json -o results/frontier.svg

PROFILE.json is of `evoprune profile --format json`, with the methods inside the encoder and the language model. The others are at
its bound, which leaves their selection out. What methods keep stands in the pages of `experiments.comparison`, what the presets
keep and how fast they are in results/frontier.md.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from evoprune import methods
from evoprune.profiling.results import BOUND
from evoprune.visualize.chart import COLOURS, INK, Panel, Point, Series, draw
from evoprune.visualize.svg import SOFT

PAGES = "results/comparison.md", "results/comparison-scenes.md"
BUDGETS = 0.25, 0.1
LEAST = 60  # percent; rows that keep less are not drawn


def cells(line: str) -> list[str]:
    return [cell.strip(" `") for cell in line.strip().strip("|").split("|")]


def kept_by_rivals(pages: list[Path]) -> dict[tuple[str, float], float]:
    """Percent of the accuracy that is kept in the worst of the sets, by method and budget, from the tables "In short"."""
    found = defaultdict(list)
    for page in pages:
        table = page.read_text(encoding="utf-8").partition("## In short")[2].partition("\n## ")[0]
        for line in table.splitlines():
            if line.startswith("| `"):
                name, *values = cells(line)
                for budget, shares in zip(BUDGETS, values[::2], strict=False):
                    found[name, budget] += [float(share) for share in re.findall(r"[\d.]+", shares)]
    return {key: min(shares) for key, shares in found.items() if len(shares) == 2 * len(pages)}


def presets(page: Path) -> Iterator[Point]:
    """The presets of results/frontier.md: the first table with one, and the first table of times."""
    lines = page.read_text(encoding="utf-8").splitlines()
    kept = {cells(line)[0]: float(cells(line)[1]) for line in reversed(lines) if line.startswith("| `-b ")}
    head = next(cells(line) for line in lines if "times as fast as Hugging Face" in line and line.startswith("|"))
    column = head.index("times as fast as Hugging Face")
    for line in reversed(lines):
        if match := re.match(r"\| `evoprune (-b (?:high|balanced|fast))` \|", line):
            kept[match[1]] = kept[match[1]], float(cells(line)[column])
    for name, found in kept.items():
        if isinstance(found, tuple):
            yield Point(found[1], found[0], label=name)


def speeds(profile: dict) -> dict[tuple[str, float], float]:
    """How many times as fast as Hugging Face the first token is, by method and budget; the bound is BOUND."""
    return {
        (row["method"] if row["row"] != BOUND else BOUND, row["budget"]): row["ratio"]["first_token_to_hugging_face"]
        for row in profile["rows"]
        if row["budget"] in BUDGETS and row["ratio"]["first_token_to_hugging_face"]
    }


def chart(profile: dict, pages: list[Path], page: Path) -> str:
    fast, kept, groups = speeds(profile), kept_by_rivals(pages), defaultdict(list)
    for (name, budget), share in kept.items():
        if name.partition(":")[0] in ("evoprune", "evoprune-merge", "downscale", "subsample") or "+" in name:
            continue
        after = methods.get(name).acts == "after" if name in methods.built_in() else False
        times = fast.get((BOUND if after else name, budget))
        if times and share >= LEAST:
            place = "after the encoder" if after else "inside the encoder or the language model"
            groups[place].append(Point(times, share, label="" if after else name))
    ours = sorted(presets(page), key=lambda point: point.x)
    series = [
        Series("evoprune, presets", tuple(ours), COLOURS[0]),
        *(Series("", (point,), COLOURS[1]) for point in groups["inside the encoder or the language model"]),
        *(Series("", (point,), SOFT, hollow=True) for point in groups["after the encoder"]),
        Series("", (Point(1.0, 100.0, label="Hugging Face"),), INK),
    ]
    panel = Panel(
        "",
        "first token, times as fast as Hugging Face",
        "accuracy kept, worst of four sets, %",
        tuple(series),
        from_zero=False,
    )
    facts = (
        "8 moving frames, dimensions of the 3B model, fp32, two CPU threads. Accuracy: demo models on generated clips, two worlds "
        "with two sets of weights each. Grey: methods after the encoder at -b 0.25 and 0.1, where a selection without cost "
        "puts them. Other methods' accuracy is of fewer clips (results/comparison.md, results/comparison-scenes.md)."
    )
    return draw("Accuracy kept against speed", facts, [panel], legend=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--pages", type=Path, nargs="+", default=[*map(Path, PAGES)])
    parser.add_argument("--presets", type=Path, default=Path("results/frontier.md"))
    parser.add_argument("-o", "--output", type=Path, default=Path("results/frontier.svg"))
    args = parser.parse_args()
    profile = json.loads(args.profile.read_text(encoding="utf-8"))
    args.output.write_text(chart(profile, args.pages, args.presets), encoding="utf-8")


if __name__ == "__main__":
    main()

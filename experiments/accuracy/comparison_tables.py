"""Write the tables of `experiments.accuracy.comparison`: the best, ties with it, and which is better at equal cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from evoprune import methods
from evoprune.bench.scores import ALL, BLIND, FULL, METHOD, TYPE, row_name
from evoprune.methods.budget import Budget
from evoprune.util import budget_text
from experiments.accuracy.paired import in_points, paired_difference

OURS = methods.DEFAULT
Recorded = float | str  # a budget as of `Budget.recorded`
# By world: groups with columns of their own at equal cost.
APART = {"shapes": ("static", "panning"), "scenes": ("picture", "video", "text")}

LEGEND = """\
- **accuracy**: right answers in percent, with the 95% interval over videos; **kept**: as a share of accuracy with nothing pruned.
- **against the best**: the paired difference to the most accurate row of the budget, in points. A *tie* has zero in its interval.
- **tokens**: visual tokens that the language model reads, mean over questions. Some methods cannot reach every budget; † is more
  than the budget.
- **live share**: rows that the tower computes, mean over its layers, as a share of all units.
- **TFLOP**: 10^12 operations of tower and prefill at 3B dimensions, counted from the rows of each layer.
- **selection ms**: scoring, merging and selecting for a video, or for a question if the method reads it. Other programs may have
  run at the same time."""
SHORT_LEGEND = (
    "Kept accuracy in percent, one figure a model. Operations of tower and prefill at 3B dimensions, as a share of those with "
    "nothing pruned. †: more tokens than the budget."
)
TUNED = (
    "`evoprune` and `evoprune-merge` were tuned on validation clips of this generator. The other methods have the settings of "
    "their papers or of their authors' code, or this project's where these give none, and were not tuned."
)
OVER = 1.05  # times the budget: a method that keeps more tokens does not reach it
COST_LEGEND = (
    "Each row of another method is paired with the most expensive row of `evoprune`, at any budget, that costs no more operations. "
    "The last columns are the accuracy of `evoprune` minus that of the other row, in points."
)
GROUPS_LEGEND = {
    "shapes": "Detail: shape, colour, size, digit. Time: events, order, motion. Space: place, relation, count. Rest: existence and "
    "descriptions. Flash: questions of any kind about a thing that flashes. Static, panning: what the camera does.",
    "scenes": "Picture, video: what is asked about. Of pictures: what a sign says (text), looks, places, counts. Of videos: what "
    "any frame shows (gist), events, motion, and what two or three frames show (moment).",
}


def share(budget: Recorded) -> float:
    """Return the share of a video's tokens that a budget keeps."""
    return Budget.parse(budget).video


@dataclass(frozen=True)
class Standing:
    """A row against the best of its budget: its accuracy minus the best's, with its 95% interval, as shares."""

    difference: float
    low: float
    high: float
    best: bool

    @property
    def tie(self) -> bool:
        return self.low <= 0 <= self.high

    def __str__(self) -> str:
        return "best" if self.best else _difference(self.difference, self.low, self.high)


@dataclass(frozen=True)
class Outcome:
    """One model's answers: its name, the results as `Evaluation.document` has them, and the samples behind them."""

    name: str
    document: dict
    samples: list[dict]

    def rows(self, budget: Recorded) -> list[dict]:
        """Return the rows of a budget over all questions, the most accurate first."""
        found = [row for row in self.document["rows"] if _at(row, budget) and row["group"] == ALL]
        return sorted(found, key=lambda row: -row["accuracy"])

    def with_rows_of(self, other: "Outcome") -> "Outcome":
        """This one, and the rows and samples of the methods of another, which asked the same questions of the same model."""
        rows = [row for row in other.document["rows"] if row["row"] == METHOD]
        samples = [sample for sample in other.samples if sample.get("row") == METHOD]
        return Outcome(self.name, self.document | {"rows": self.document["rows"] + rows}, self.samples + samples)


def standings(samples: Sequence[dict], budget: Recorded) -> dict[str, Standing]:
    """Of each method at a budget, by name. The best has most right answers; of several, it is the first."""
    rows: dict[str, list[dict]] = {}
    for sample in sorted((s for s in samples if "error" not in s), key=lambda s: s["video"]):  # stable
        if _at(sample, budget):
            rows.setdefault(sample["method"], []).append(sample)
    if not rows:
        return {}
    right = {name: sum(s["right"] for s in found) for name, found in rows.items()}
    first = max(rows, key=right.__getitem__)
    return {name: Standing(*paired_difference(found, rows[first]), name == first) for name, found in rows.items()}


@dataclass(frozen=True)
class Match:
    """A row of another method beside the most expensive row of `evoprune` that costs no more; None where all cost more.

    Attributes:
        other, ours: as in the results, over all questions.
        differences: of accuracy, ours minus the other's, with its 95% interval, by group; all questions are one.
    """

    other: dict
    ours: dict | None
    differences: dict[str, tuple[float, float, float]]


def equal_cost(outcome: Outcome) -> list[Match]:
    """Of each row of another method, the most expensive first. Variants of `evoprune` and combinations are left out."""
    rows = [row for row in outcome.document["rows"] if row["row"] == METHOD and row["group"] == ALL]
    ours = [row for row in rows if row["method"] == OURS]
    names = {row["method"]: [each.name for each in methods.parse_names(row["method"])] for row in rows}
    others = [row for row in rows if len(names[row["method"]]) == 1 and names[row["method"]] != [OURS]]
    samples: dict[str, list[dict]] = {}
    for sample in outcome.samples:
        if "error" not in sample:
            samples.setdefault(row_name(sample["row"], sample["method"], sample["budget"]), []).append(sample)
    made = []
    for other in sorted(others, key=lambda row: -row["tflop_3b"]):
        mine = max(
            (row for row in ours if row["tflop_3b"] <= other["tflop_3b"]), key=lambda row: row["tflop_3b"], default=None
        )
        differences = {}
        groups = (ALL, *_apart(outcome))
        if mine is None:
            groups = ()
        for group in groups:
            pair = [[s for s in samples[row["name"]] if group == ALL or group in s["groups"]] for row in (mine, other)]
            if pair[0]:
                differences[group] = paired_difference(*pair)
        made.append(Match(other, mine, differences))
    return made


def _by_method(outcomes: Sequence[Outcome], budgets: Sequence[Recorded]) -> dict[str, dict[Recorded, list[dict]]]:
    """Return the rows of each method at each budget, one a model. Variants and combinations are left out."""
    found: dict[str, dict[Recorded, list[dict]]] = {}
    for outcome in outcomes:
        for budget in budgets:
            for row in outcome.rows(budget):
                if not {":", "+"} & set(row["method"]):
                    found.setdefault(row["method"], {}).setdefault(budget, []).append(row)
    return found


def _kept_of_all(rows: Sequence[dict]) -> str:
    """Return the kept accuracy of each row in percent, without its interval."""
    return " / ".join(_kept(row).partition(" ")[0] for row in rows)


def _operations(rows: Sequence[dict], outcome: Outcome) -> str:
    """Of the first row, as a share of the outcome's operations with nothing pruned."""
    whole = (row for row in outcome.document["rows"] if row["row"] == FULL and row["group"] == ALL)
    full = next((row["tflop_3b"] for row in whole), None)
    if not (rows and full):
        return ""
    return f"{100 * rows[0]['tflop_3b'] / full:.0f}%"


def short(outcomes: Sequence[Outcome], budgets: Sequence[Recorded]) -> str:
    """Return what each method keeps in each model, and what it costs in the first one, as a Markdown table.

    The best method on average comes first.
    """
    found = _by_method(outcomes, budgets)
    lines = [["", *(title for budget in budgets for title in (f"-b {budget_text(budget)} keeps", "operations"))]]
    lines.append(["---"] * len(lines[0]))
    means = {name: [row["accuracy"] for rows in at.values() for row in rows] for name, at in found.items()}
    for name in sorted(found, key=lambda name: -sum(means[name]) / len(means[name])):
        cells = [f"`{name}`"]
        for budget in budgets:
            rows = found[name].get(budget, [])
            over = "".join(_over(row) for row in rows[:1])
            cells += [_kept_of_all(rows) + over, _operations(rows, outcomes[0])]
        lines.append(cells)
    return _joined(lines)


def _over(row: dict) -> str:
    """Return a mark where a row keeps more tokens than its budget allows: of a preset, its share of a still."""
    inner = row["layer_tokens"] < row["tokens"]  # whose budget is a mean over layers
    return " †" * (row["kept_share"] > OVER * Budget.parse(row["budget"]).largest and not inner)


def own_steps(outcome: Outcome, budgets: Sequence[Recorded]) -> list[str]:
    """Return what `evoprune` loses from each budget to the next smaller one, paired, as Markdown."""
    found = {
        budget: [s for s in outcome.samples if "error" not in s and _at(s, budget) and s["method"] == OURS]
        for budget in budgets
    }
    order = sorted((budget for budget in budgets if found[budget]), key=share, reverse=True)
    steps = (
        (large, small, _difference(*paired_difference(found[small], found[large]))) for large, small in pairwise(order)
    )
    return [f"- `-b {budget_text(small)}` minus `-b {budget_text(large)}`: {points}" for large, small, points in steps]


def against_ours(outcome: Outcome, budgets: Sequence[Recorded]) -> str:
    """`evoprune` minus each other row of the same budget, paired, as a Markdown table; nothing where it is not among them."""
    found: dict[tuple[str, Recorded], list[dict]] = {}
    for sample in outcome.samples:
        if "error" not in sample and sample["row"] == METHOD:
            found.setdefault((sample["method"], sample["budget"]), []).append(sample)
    given = [budget for budget in budgets if (OURS, budget) in found]
    names = [name for name in dict.fromkeys(name for name, _ in found) if name != OURS]
    if not (given and names):
        return ""
    lines = [["", *(f"-b {budget_text(budget)}" for budget in given)], ["---"] * (len(given) + 1)]
    for name in names:
        cells = [f"`{name}`"]
        for budget in given:
            difference = ""
            if (name, budget) in found:
                difference = _difference(*paired_difference(found[OURS, budget], found[name, budget]))
            cells.append(difference)
        lines.append(cells)
    return _joined(lines)


def document(outcomes: Sequence[Outcome], budgets: Sequence[Recorded], chart: str, command: str) -> str:
    """Return all of it in Markdown."""
    settings, videos = (outcomes[0].document[name] for name in ("settings", "videos"))
    clips = f"{videos['evaluated']:,} clips of {settings['data']}"
    blocks = [
        f"# Methods side by side: {clips}",
        *_findings(outcomes, budgets),
        f"{outcomes[0].document['items']['answered']:,} questions about {clips}, asked of "
        f"{' / '.join(f'`{outcome.name}`' for outcome in outcomes)}. The clips are small and generated. The tables rank methods on "
        "them; they are not scores of a real Qwen2.5-VL.",
        TUNED,
        f"`{command}`",
        f"![Accuracy of each method]({chart})",
    ]
    if len(outcomes) > 1:
        blocks += ["## Best, or a tie with the best, in all models", _shared(outcomes, budgets)]
    blocks += ["## In short", SHORT_LEGEND, short(outcomes, budgets), "## Columns", LEGEND]
    for outcome in outcomes:
        blocks += _of_model(outcome, budgets)
    return "\n\n".join(blocks) + "\n"


def _findings(outcomes: Sequence[Outcome], budgets: Sequence[Recorded]) -> list[str]:
    """The most accurate method of each budget (mean of the models) and `evoprune`, with what they keep and cost, as a list."""
    found = _by_method(outcomes, budgets)
    lines = []
    for budget in budgets:
        at = {name: rows[budget] for name, rows in found.items() if budget in rows}
        if not at:
            continue
        best = max(at, key=lambda name: sum(row["accuracy"] for row in at[name]) / len(at[name]))
        shown = [best]
        if OURS in at and best != OURS:
            shown.append(OURS)
        parts = [f"`{name}` {_kept_of_all(at[name])}% with {_operations(at[name], outcomes[0])}" for name in shown]
        lines.append(f"- `-b {budget_text(budget)}`: {'; '.join(parts)}")
    if not lines:
        return []
    first = "The most accurate method at each budget (mean of the models)" + f", and `{OURS}`" * (OURS in found)
    return [f"{first}: accuracy kept, and share of the operations with nothing pruned.", "\n".join(lines)]


def _of_model(outcome: Outcome, budgets: Sequence[Recorded]) -> list[str]:
    """Return the section of one model: accuracy and cost of each budget, paired differences, and accuracy by group."""
    videos = outcome.document["videos"]
    answered = outcome.document["items"]["answered"]
    failed = ""
    if videos["failed"]:
        failed = f"; {videos['failed']} failed and are left out"
    whole = {row["row"]: row for row in outcome.document["rows"] if row["row"] != METHOD and row["group"] == ALL}
    first = f"{answered:,} questions about {videos['evaluated']:,} of {videos['wanted']:,} clips{failed}. With nothing pruned: "
    if FULL in whole:
        full = whole[FULL]
        first += f"{_accuracy(full)}, {full['tokens']:,.0f} tokens, {full['tflop_3b']:.3g} TFLOP."
    else:
        first += "-"
    if BLIND in whole:
        first += f" From the question alone, without the video: {_accuracy(whole[BLIND])}."
    blocks = [f"## {outcome.name}", first]
    for budget in budgets:
        blocks += [f"### `-b {budget_text(budget)}`", _table(outcome, budget), *_spread(outcome, budget)]
    if steps := own_steps(outcome, budgets):
        blocks += [f"### `{OURS}` from one budget to the next", "\n".join(steps)]
    if others := against_ours(outcome, budgets):
        blocks += [f"### `{OURS}` minus each other row at the same budget", others]
    if matches := equal_cost(outcome):
        blocks += ["### At equal cost", COST_LEGEND, _all_of_ours(outcome), _cost_table(matches, _apart(outcome))]
    groups = dict.fromkeys(row["group"] for row in outcome.document["rows"])
    if columns := [group for group in groups if group != ALL and not group.startswith(TYPE)]:
        tables = (_group_table(outcome, budget, columns) for budget in budgets)
        blocks += ["### By group of questions", GROUPS_LEGEND[_world(outcome)], *tables]
    return blocks


def _table(outcome: Outcome, budget: Recorded) -> str:
    against = standings(outcome.samples, budget)
    titles = ["", "accuracy", "kept", "against the best", "tokens", "live share", "TFLOP", "selection ms"]
    lines = [titles, ["---"] * len(titles)]
    for row in outcome.rows(budget):
        name = row["method"]
        lines.append(
            [
                f"`{name}`", _accuracy(row), _kept(row), str(against[name]), f"{row['layer_tokens']:,.1f}{_over(row)}",
                f"{row['live_share']:.2f}", f"{row['tflop_3b']:.3g}", _selection_ms(outcome.samples, name, budget),
            ]
        )  # fmt: skip
    return _joined(lines)


def _group_table(outcome: Outcome, budget: Recorded, groups: Sequence[str]) -> str:
    """Accuracy in each group at a budget, after that with nothing pruned."""
    rows = outcome.document["rows"]
    found = {(row["method"], row["group"]): _accuracy(row) for row in rows if _at(row, budget)}
    full = {row["group"]: _accuracy(row) for row in rows if row["row"] == FULL}
    lines = [[f"-b {budget_text(budget)}", *groups], ["---"] * (len(groups) + 1)]
    lines.append(["nothing pruned", *(full.get(group, "") for group in groups)])
    for row in outcome.rows(budget):
        cells = (found.get((row["method"], group), "") for group in groups)
        lines.append([f"`{row['method']}`", *cells])
    return _joined(lines)


def _spread(outcome: Outcome, budget: Recorded) -> list[str]:
    """Return how well the clips separate methods: from random tokens to the best row, in half-widths of the interval."""
    rows = outcome.rows(budget)
    drawn = next((row for row in rows if row["method"] == "random"), None)
    if drawn is None:
        return []
    apart = rows[0]["accuracy"] - drawn["accuracy"]
    half = (drawn["high"] - drawn["low"]) / 2
    times = ""
    if half:
        times = f", {apart / half:.1f} times the half-width of the interval of `random`"
    return [f"From `random` to the best row: {100 * apart:.1f} points{times}."]


def _world(outcome: Outcome) -> str:
    return outcome.document["settings"]["data"].partition(" ")[0]


def _apart(outcome: Outcome) -> tuple[str, ...]:
    return APART[_world(outcome)]


def _all_of_ours(outcome: Outcome) -> str:
    rows = [r for r in outcome.document["rows"] if r["row"] == METHOD and r["group"] == ALL and r["method"] == OURS]
    return "\n".join(
        f"- `{row['name']}` keeps {_kept(row)}% with {row['tflop_3b']:.3g} TFLOP"
        for row in sorted(rows, key=lambda row: -share(row["budget"]))
    )


def _cost_table(matches: Sequence[Match], apart: Sequence[str]) -> str:
    groups = [group for group in (ALL, *apart) if any(group in match.differences for match in matches)]
    lines = [["", "TFLOP", OURS, "TFLOP", *groups]]
    lines.append(["---"] * len(lines[0]))
    for match in matches:
        cells = [f"`{match.other['name']}`", f"{match.other['tflop_3b']:.3g}"]
        if match.ours:
            cells += [f"`{match.ours['name']}`", f"{match.ours['tflop_3b']:.3g}"]
        else:
            cells += ["all cost more", ""]
        differences = {group: _difference(*found) for group, found in match.differences.items()}
        lines.append([*cells, *(differences.get(group, "") for group in groups)])
    return _joined(lines)


def _joined(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shared(outcomes: Sequence[Outcome], budgets: Sequence[Recorded]) -> str:
    lines = []
    for budget in budgets:
        tied = [{name for name, s in standings(o.samples, budget).items() if s.best or s.tie} for o in outcomes]
        names = [row["method"] for row in outcomes[0].rows(budget) if all(row["method"] in found for found in tied)]
        lines.append(f"- `-b {budget_text(budget)}`: {', '.join(f'`{name}`' for name in names) or 'none'}")
    return "\n".join(lines)


def _at(row: dict, budget: Recorded) -> bool:
    return row["row"] == METHOD and row["budget"] == budget


def _selection_ms(samples: Sequence[dict], method: str, budget: Recorded) -> str:
    """Return the mean; empty if some answers come from a run that was not timed."""
    mine = [s for s in samples if "error" not in s and _at(s, budget) and s["method"] == method]
    times = [s["prune_ms"] for s in mine if "prune_ms" in s]
    if len(times) < len(mine):
        return ""
    return f"{sum(times) / len(times):.2f}"


def _accuracy(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


def _kept(row: dict) -> str:
    if row["kept_of_full"] is None:
        return "-"
    if row["kept_low"] is None:  # too few videos
        return f"{100 * row['kept_of_full']:.1f}"
    return f"{100 * row['kept_of_full']:.1f} ({100 * row['kept_low']:.1f}-{100 * row['kept_high']:.1f})"


def _difference(mean: float, low: float, high: float) -> str:
    """In points; called a tie where the interval includes zero."""
    text = in_points(mean, low, high)
    return f"tie {text}" if low <= 0 <= high else text

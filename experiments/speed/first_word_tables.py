"""Write the tables and the chart for `experiments.speed.first_word` from its records, and insert them into the documents."""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evoprune.util import counted
from experiments import svg
from experiments.speed.first_word_asks import TRANSFORMERS
from experiments.speed.first_word_readers import READERS
from experiments.tables import fill, table

BEGIN = "<!-- first word: python -m experiments.speed.first_word -o DIR --readme -->"
END = "<!-- end of first word -->"
PAGE = "first_word.md"
CHART = "first_word.svg"
STAGES = {"reading and preparing": "#E69F00", "encode": "#0072B2", "prefill": "#56B4E9"}
RIGHT_S = 0.02  # a frame is considered wrong if it is more than this many seconds from the requested one
Row = dict[str, Any]


def seconds(value: float | None) -> str:
    """Format seconds with two or three digits. Returns an empty string for None."""
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 9.95 else f"{value:.2f}"


def times_as_fast(value: float | None) -> str:
    """Format a ratio with two digits. Returns an empty string for None."""
    if value is None:
        return ""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def machine(record: Row) -> str:
    """Return the name of the machine on which a run was measured."""
    about = record["about"]
    cores = "1 core" if about["cores"] == 1 else f"{about['cores']} cores"
    name = f"{cores} of {about['cpu']}"
    if about["device"] == "cpu":
        return name
    return f"{about['device_name']}, {name}"


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    """Group rows by a key, in order of first appearance."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def middle(rows: Sequence[Row], name: str) -> float | None:
    """Return the median of a value over the rows that contain it, or None if there are none."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None


def middle_row(rows: Sequence[Row]) -> Row | None:
    """Return the successful turn with the median time to first word, or None if all turns failed.

    Unlike the medians of the stages, the stages of a single turn add up to the time shown in the table.
    """
    ordered = sorted((row for row in rows if "error" not in row), key=lambda row: row["first_word"])
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def ratio(others: Sequence[Row], rows: Sequence[Row], name: str) -> float | None:
    """Return the median ratio of the other side's value to this side's, over the rounds completed by both sides."""
    theirs = {row["round"]: row[name] for row in others if name in row}
    found = [theirs[row["round"]] / row[name] for row in rows if name in row and row["round"] in theirs]
    return median(found) if found else None


def error_of(rows: Sequence[Row]) -> str:
    """Return the error message of a side without results."""
    return next((row["error"] for row in rows if "error" in row), "not measured").replace("|", "/")


# Time to the first word.


def title_of(side: str, rows: Sequence[Row] = ()) -> str:
    """Return a side's name as shown in the tables."""
    if not side.startswith(TRANSFORMERS):
        return f"evoprune `-b {side}`"
    reader = next((row["reader"] for row in rows if "reader" in row), None)
    if reader is None:
        return "transformers"
    return f"transformers, fed by {reader}"


def waits(record: Row) -> dict[tuple, dict[str, list[Row]]]:
    """Return the turns of the `loaded` part, grouped by case and side.

    A process's first question is used only if no later question for the case succeeded.
    """
    found = {}
    for case, rows in grouped(record.get("loaded", []), lambda row: (row["clip"], row["asked_frames"])).items():
        later = any(not row["first"] and "error" not in row for row in rows)
        sides = grouped(rows, lambda row: row["side"])
        found[case] = {
            side: [row for row in turns if "error" in row or row["first"] != later] or turns
            for side, turns in sides.items()
        }
    return found


def stages(row: Row) -> list[float]:
    """Return the time spent in each of `STAGES`, in seconds.

    The reading time is the time that remains after subtracting encoding and prefill, so it excludes reading that overlaps with
    encoding.
    """
    return [max(0.0, row["first_word"] - row["encode"] - row["prefill"]), row["encode"], row["prefill"]]


def case_title(clip: str, sides: dict[str, list[Row]]) -> str:
    """Return the clip name with the number and size of its frames."""
    row = next((row for rows in sides.values() for row in rows if row.get("size")), None)
    if row is None:
        return clip
    height, width = row["size"]
    return f"{clip}, {row['frames']} frames of {width}x{height}"


def loaded_tables(record: Row) -> list[str]:
    """Return a table for each question with the times of the stages, the first word, and the last word."""
    lines = []
    all_first = [row for row in record.get("loaded", []) if row["first"]]
    for (clip, asked), sides in waits(record).items():
        words = next((row["words"] for rows in sides.values() for row in rows if "words" in row), 0)
        last = f"last of {words} words, s"
        heads = [
            case_title(clip, sides), "frames", "visual tokens", *STAGES, "first word, s", "times as fast", last,
            "first question of a process, s", f"its {last}",
        ]  # fmt: skip
        rows = []
        for side, turns in sides.items():
            shown = middle_row(turns)
            if shown is None:
                rows.append([title_of(side, turns), error_of(turns), *[""] * (len(heads) - 2)])
                continue
            at_first = [
                row for row in all_first if (row["side"], row["clip"], row["asked_frames"]) == (side, clip, asked)
            ]
            rows.append(
                [
                    title_of(side, turns),
                    shown["seek"],
                    f"{shown['visual']:,}",
                    *map(seconds, stages(shown)),
                    seconds(middle(turns, "first_word")),
                    times_as_fast(ratio(sides.get(TRANSFORMERS, []), turns, "first_word")),
                    seconds(middle(turns, "last_word")),
                    seconds(middle(at_first, "first_word")),
                    seconds(middle(at_first, "last_word")),
                ]
            )
        lines += [*table(heads, rows, numbers=True), ""]
    return lines


def start_table(record: Row) -> list[str]:
    """Return the table of times from process start."""
    rows = record.get("start", [])
    if not rows:
        return []
    sides = grouped(rows, lambda row: row["side"])
    heads = [
        rows[0]["clip"], "first word, s", "times as fast", "second word, s", "last word, s", "CPU time, s", "peak memory, GiB",
    ]  # fmt: skip
    cells = []
    for side, turns in sides.items():
        if middle(turns, "first_word") is None:
            cells.append([title_of(side), error_of(turns), *[""] * (len(heads) - 2)])
            continue
        cells.append(
            [
                title_of(side),
                seconds(middle(turns, "first_word")),
                times_as_fast(ratio(sides.get(TRANSFORMERS, []), turns, "first_word")),
                seconds(middle(turns, "second_word")),
                seconds(middle(turns, "last_word")),
                seconds(middle(turns, "cpu")),
                f"{middle(turns, 'peak_bytes') / 2**30:.1f}",
            ]
        )
    return table(heads, cells, numbers=True)


# Reading.


def reading_cell(turns: Sequence[Row]) -> str:
    """Return the median time with the number of wrong frames and their largest distance, or the reason for a reader's failure."""
    value = middle(turns, "seconds")
    if value is None:
        over = next((row["over_s"] for row in turns if "over_s" in row), None)
        return f"over {seconds(over)}" if over else "failed"
    others = max(row.get("others", 0) for row in turns)
    moved = max(row.get("moved_s", 0.0) for row in turns)
    if moved <= RIGHT_S:
        return seconds(value)
    return f"{seconds(value)} ({counted(others, 'other frame')}, up to {seconds(moved)} s off)"


def failures(rows: Sequence[Row]) -> list[str]:
    """Return the distinct reasons for reader failures."""
    failed = [row for row in rows if "error" in row and "over_s" not in row]
    said = grouped(failed, lambda row: (row["side"], row["error"]))
    return [
        f"- {side} failed with {'; '.join(dict.fromkeys(row['clip'] for row in rows))}: {error}"
        for (side, error), rows in said.items()
    ]


def reading_table(record: Row) -> list[str]:
    """Return a table with a row for each case and a column for each reader."""
    cases = grouped(record.get("reading", []), lambda row: (row["clip"], row["part_s"]))
    if not cases:
        return []
    names = [name for name in READERS if any(row["side"] == name for rows in cases.values() for row in rows)]
    lines = []
    for (clip, part_s), rows in cases.items():
        sides = grouped(rows, lambda row: row["side"])
        count = next(row["asked"] for row in rows)
        title = f"{clip}: {count} frames, {part_s:.3g} s apart"
        cells = {name: reading_cell(turns) for name, turns in sides.items()}
        lines.append([title, *(cells.get(name, "") for name in names)])
    return [*table(["seconds", *names], lines, numbers=True), "", *failures(record["reading"])]


# The documents.


def settings(record: Row) -> list[str]:
    """Return the machine, the versions, and the settings as a Markdown list."""
    about = record["about"]
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in about["versions"].items())
    threads = about["omp_num_threads"]
    limits = ", ".join(
        f"{name} {part['seconds']:.0f} of {part['limit_s']:.0f} s" for name, part in record["parts"].items()
    )
    rounds = max((part["rounds"] for part in record["parts"].values()), default=0)
    dtypes = {row["dtype"] for row in record.get("loaded", []) if "dtype" in row}
    used = {title_of(row["side"]): row["threads"] for row in record.get("loaded", []) if "threads" in row}
    lines = [
        f"{machine(record)}; {about['date']}; OMP_NUM_THREADS {threads or 'not set'}; medians of at most {rounds} rounds.",
        f"Readers have as many threads as FFmpeg, and evoprune as many workers, as they choose for {about['cores']} cores.",
        f"Versions: {versions}.",
        f"Time: {limits}.",
    ]
    if used:
        threads = ", ".join(f"{side} {count}" for side, count in used.items())
        lines.insert(2, f"Model: {about['model']}, {', '.join(sorted(dtypes))}; threads of torch: {threads}.")
    if about["tiny"]:
        lines.insert(0, "**A trial with small clips: its times mean nothing.**")
    return [f"- {line}" for line in lines]


def sections(record: Row) -> list[str]:
    """Return a run's tables under their headings."""
    made = {
        "With the model loaded": loaded_tables(record),
        "From the start of a process": start_table(record),
        "Reading": reading_table(record),
    }
    lines = []
    for heading, found in made.items():
        if found:
            lines += [f"### {heading}", "", *found, ""]
    return lines


def document(records: Sequence[Row]) -> str:
    """Return all tables, with a section for each machine."""
    lines = []
    for record in records:
        lines += [f"## {machine(record)}", "", *settings(record), "", *sections(record)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def chart_title(records: Sequence[Row]) -> str:
    """Return a sentence with the chart's results, used as both its title and its alt text."""
    said = []
    for record in records:
        for (clip, _), sides in waits(record).items():
            named = [
                f"{name} {seconds(middle(rows, 'first_word'))} s" for name, rows in sides.items() if middle_row(rows)
            ]
            said.append(f"{machine(record)}, {case_title(clip, sides)}: {', '.join(named)}")
    return f"From the path to the first word. {'; '.join(said)}"


WIDTH = 830  # width of the chart, in pixels
LEFT = 196  # left edge of the bars, in pixels
RIGHT = 150  # room for the text after a bar, in pixels
PITCH = 25  # distance between two bars, in pixels
TALL = 17


def chart(records: Sequence[Row]) -> str:
    """Return an SVG chart with a bar for each side and question, divided into stages."""
    elements = [svg.text(svg.EDGE, 34, "From the path to the first word, with the model loaded", size=17, weight=600)]
    x = svg.EDGE
    for name, colour in STAGES.items():
        elements += [
            f'<rect x="{x}" y="48" width="11" height="11" fill="{colour}"/>',
            svg.text(x + 17, 58, name, size=11.5),
        ]
        x += 42 + round(6.3 * len(name))
    y = 92
    for record in records:
        for (clip, _), sides in waits(record).items():
            elements.append(
                svg.text(svg.EDGE, y, f"{machine(record)}: {case_title(clip, sides)}", size=12.5, weight=600)
            )
            shown = {side: middle_row(rows) for side, rows in sides.items()}
            longest = max((row["first_word"] for row in shown.values() if row), default=1.0)
            y += 12
            for side, row in shown.items():
                elements.append(svg.text(LEFT - 8, y + 13, title_of(side).replace("`", ""), "end", size=11.5))
                if row is None:
                    elements.append(svg.text(LEFT, y + 13, error_of(sides[side])[:80], size=11.5, fill=svg.SOFT))
                else:
                    said = f"{seconds(middle(sides[side], 'first_word'))} s"
                    faster = ratio(sides.get(TRANSFORMERS, []), sides[side], "first_word")
                    if faster and side != TRANSFORMERS:
                        said += f", {times_as_fast(faster)} times as fast"
                    elements += _bar(y, row, longest, said)
                y += PITCH
            y += 26
    words = "Seconds, medians; the stages of the median turn. What is read while the encoder works is part of encode."
    elements.append(svg.text(svg.EDGE, y, words, size=11, fill=svg.SOFT))
    return svg.document(chart_title(records), WIDTH, y + 18, elements)


def _bar(y: float, row: Row, longest: float, said: str) -> list[str]:
    """Draw a turn as a bar that is divided into stages and followed by a label."""
    made = []
    x = float(LEFT)
    for length, colour in zip(stages(row), STAGES.values(), strict=True):
        wide = (WIDTH - LEFT - RIGHT) * length / longest
        made.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{TALL}" fill="{colour}"/>')
        x += wide
    return [*made, svg.text(x + 6, y + 13, said, size=11.5)]


def write_tables(records: Sequence[Row], folder: Path) -> None:
    """Write the page and the chart to a folder, if all records have their "about" entry."""
    if not all("about" in record for record in records):
        return
    (folder / PAGE).write_text(document(records), encoding="utf-8")
    if any(waits(record) for record in records):
        (folder / CHART).write_text(chart(records), encoding="utf-8")


def write_documents(records: Sequence[Row], root: Path) -> None:
    """Write the results between the markers in README.md and results/first_word.md, and draw the chart.

    Raises ValueError if a marker is missing.
    """
    fill(root / "README.md", BEGIN, END, f"![{chart_title(records)}](results/{CHART})")
    fill(root / "results" / PAGE, BEGIN, END, f"![{chart_title(records)}]({CHART})\n\n{document(records)}")
    (root / "results" / CHART).write_text(chart(records), encoding="utf-8")

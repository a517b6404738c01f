"""Draws a chart of `evoprune profile` again, from what `--format json -o FILE` kept.

python -m experiments.profile_chart runs/frames.json -o frames.svg
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from evoprune.bench.profiling.results import Case, Counts, Results, Row, Sample
from evoprune.model.rules import read_object
from evoprune.report.records import Environment, ModelFacts
from evoprune_cli.profile import draw_chart


def results(document: dict) -> Results:
    """What a benchmark found, as far as its chart shows it."""
    rows = []
    for row in document["rows"]:
        times = [[s[name] / 1000 for name in ("encode", "encode_prune", "prefill", "generate")] for s in row["samples"]]
        rows.append(
            Row(
                kind=row["row"],
                case=Case(row["frames"], row["height"], row["width"]),
                budget=row["budget"],
                method=row["method"],
                counts=row["counts"] and Counts(**row["counts"]),
                samples=[Sample(*parts) for parts in times],
                error=row["error"],
                quantize=row["quantize"],
            )
        )
    facts = ModelFacts(**document["model"]), document["memory"]["weights_bytes"], Environment(**document["env"])
    made = Results(*facts, document["machine"], document["settings"], rows, document["matmul"]["samples"])
    made.rounds = document["rounds"]["measured"]
    return made


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.profile_chart", description=__doc__)
    parser.add_argument("document", type=Path, help="JSON of evoprune profile")
    parser.add_argument("-o", "--output", type=Path, required=True, help="an SVG file")
    asked = parser.parse_args(args)
    asked.output.write_text(draw_chart(results(read_object(asked.document))), encoding="utf-8")
    print(asked.output)


if __name__ == "__main__":
    main()

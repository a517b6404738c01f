"""Compare 8 bits with float32 on the same clips and questions: accuracy, and how far full answers diverge.

    python -m experiments.accuracy.bits -o runs/shapes.jsonl --block 53 --clips 300
    python -m experiments.accuracy.bits -o runs/second.jsonl --block 53 --clips 300 -m tests/demo/second
    python -m experiments.accuracy.bits runs/shapes.jsonl runs/second.jsonl

The first form adds one line a clip and budget: question by question whether each answer is right, at how many tokens of the answer
in float32 the first choice is the same, and KL(float32 || 8 bits) at each. It goes on where the file ends. The second form prints
the table.
"""

import argparse
import json
from collections import defaultdict
from functools import partial
from pathlib import Path

from evoprune.bench.agreement import agreement, reference
from evoprune.bench.questions import grade
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA
from experiments.accuracy.clips_to_lines import add_lines
from experiments.accuracy.paired import in_points, paired_difference
from experiments.demo.write import ClipName, demo_video

BUDGETS = (1.0, 0.25, 0.1)
TOKENS = 64


def start(model: str, kind: str, folder: str):
    """Return what each process begins with: the function that makes the lines of a clip."""
    loaded = [load_model(ModelOptions(model, dtype="fp32", threads=1, quantize=bits)) for bits in ("none", kind)]
    return partial(lines_of, loaded, Path(folder))


def lines_of(loaded: list, folder: Path, clip: ClipName) -> list[dict]:
    """Return a line a budget."""
    made = []
    with demo_video(clip, folder) as video:
        for budget in BUDGETS if video.rows else ():
            exact, bits = (VideoQA(each, budget=budget, seed=clip.seed).encode(video.path) for each in loaded)
            answers = []
            for row in video.rows:
                said = exact.ask(row.prompt, max_new_tokens=TOKENS)
                given = reference(exact, row.prompt, said.ids, said.report.finish_reason == "stop")
                found = agreement(given, bits)
                # Where all first choices are the same, so is the answer.
                other = said if found.agrees.all() else bits.ask(row.prompt, max_new_tokens=TOKENS)
                answers.append({
                    "exact": bool(grade(row, said.text)), "bits": bool(grade(row, other.text)),
                    "agree": int(found.agrees.sum()), "tokens": len(found.agrees),
                    "kl": [round(value, 6) for value in found.kl.tolist()],
                })  # fmt: skip
            made.append({"clip": str(clip), "budget": budget, "answers": answers})
    return made


def table(paths: list[Path]) -> list[str]:
    """Rows of a table in Markdown: one a file and budget."""
    made = [
        "| run | budget | questions | fp32 | 8 bits | difference in points | tokens agreed | mean KL, nats | 95th percentile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        budgets: dict[float, list[dict]] = defaultdict(list)
        for line in path.read_text().splitlines():
            record = json.loads(line)
            budgets[record["budget"]] += [{"video": record["clip"], **answer} for answer in record["answers"]]
        for budget, answers in budgets.items():
            sides = [
                [{"video": a["video"], "id": i, "right": a[side]} for i, a in enumerate(answers)]
                for side in ("bits", "exact")
            ]
            count = len(answers)
            kl = sorted(value for a in answers for value in a["kl"])
            right = [sum(a[side] for a in answers) / count for side in ("exact", "bits")]
            agreed = sum(a["agree"] for a in answers) / sum(a["tokens"] for a in answers)
            difference = in_points(*paired_difference(*sides))
            made.append(
                f"| {path.stem} | {budget} | {count:,} | {right[0]:.1%} | {right[1]:.1%} | {difference} "
                f"| {agreed:.2%} | {sum(kl) / len(kl):.4f} | {kl[int(0.95 * len(kl))]:.4f} |"
            )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="lines to print a table of")
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quantize", default="int8", choices=("int8", "int4"))
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--block", type=int)
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.files:
        print("\n".join(table(args.files)))
        return
    if args.output is None or args.block is None:
        parser.error("--output and --block are needed, or files to print")
    add_lines(args, partial(start, args.model, args.quantize))


if __name__ == "__main__":
    main()

"""Compare 8-bit or 4-bit weights with float32 on the same clips and questions: accuracy and differences between answers.

    python -m experiments.accuracy.bits --block 53 --clips 300 --processes 2

For each world and each set of weights in `experiments.accuracy.frontier`, the table has one row per budget. Agreement is the
fraction of tokens in the float32 answer for which both models predict the same token. KL is the KL divergence,
KL(float32 || quantized), at these tokens.
"""

import argparse
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from evoprune.bench import Reference, grade, map_in_processes
from evoprune.session import ModelOptions, load_model
from evoprune.video_qa import VideoQA
from experiments.accuracy.frontier import SETS
from experiments.accuracy.paired import in_points, paired_difference
from experiments.demo.write import ClipName, clips_asked, demo_video
from experiments.tables import table

BUDGETS = (1.0, 0.25, 0.1)
TOKENS = 64
COLUMNS = (
    "world and weights",
    "budget",
    "questions",
    "fp32",
    "quantized",
    "difference in points",
    "tokens agreed",
    "mean KL, nats",
    "95th percentile",
)


def start(model: str, kind: str, folder: str) -> Callable[[ClipName], list[dict]]:
    """Load the float32 and quantized models in a worker process, and return a function that asks both about a clip."""
    loaded = [load_model(ModelOptions(model, dtype="fp32", threads=1, quantize=bits)) for bits in ("none", kind)]
    return partial(answers_about, loaded, Path(folder))


def answers_about(loaded: list, folder: Path, clip: ClipName) -> list[dict]:
    """Ask both models all questions about a clip at each budget, and return their answers and agreement."""
    made = []
    with demo_video(clip, folder) as video:
        for budget in BUDGETS if video.rows else ():
            exact, bits = (VideoQA(each, budget=budget, seed=clip.seed).encode(video.path) for each in loaded)
            for row in video.rows:
                said = exact.ask(row.prompt, max_new_tokens=TOKENS)
                given = Reference.of(exact, row.prompt, said.ids, said.report.finish_reason == "stop")
                found = given.agreement(bits)
                # If both models predict the same tokens throughout, their answers are identical.
                other = said if found.agrees.all() else bits.ask(row.prompt, max_new_tokens=TOKENS)
                made.append(
                    {"video": str(clip), "id": row.id, "budget": budget, "agrees": found.agrees.tolist()}
                    | {"exact": bool(grade(row, said.text)), "bits": bool(grade(row, other.text))}
                    | {"kl": found.kl.tolist()}
                )
    return made


def table_row(name: str, budget: float, answers: list[dict]) -> list[object]:
    """Return the table row that compares both models' accuracy and predictions at one budget."""
    bits, exact = ([answer | {"right": answer[side]} for answer in answers] for side in ("bits", "exact"))
    right = [np.mean([answer["right"] for answer in side]) for side in (exact, bits)]
    agrees, kl = (np.concatenate([answer[what] for answer in answers]) for what in ("agrees", "kl"))
    return [
        name, budget, f"{len(answers):,}", f"{right[0]:.1%}", f"{right[1]:.1%}", in_points(*paired_difference(bits, exact)),
        f"{agrees.mean():.2%}", f"{kl.mean():.4f}", f"{np.quantile(kl, 0.95):.4f}",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quantize", default="int8", choices=("int8", "int4"))
    parser.add_argument("--split", default="validation")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--clips", type=int, default=300, help="of each set")
    parser.add_argument("--sets", default=";".join(SETS), help="some of: %(default)s")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    rows = []
    for name in args.sets.split(";"):
        world, model = SETS[name]
        clips = clips_asked(world, args.split, args.block, args.clips)
        with (
            tempfile.TemporaryDirectory() as folder,
            closing(map_in_processes(partial(start, model, args.quantize, folder), clips, args.processes)) as found,
        ):
            answers = [answer for about_clip in found for answer in about_clip]
        rows += [table_row(name, budget, [a for a in answers if a["budget"] == budget]) for budget in BUDGETS]
    print("\n".join(table(COLUMNS, rows)))


if __name__ == "__main__":
    main()

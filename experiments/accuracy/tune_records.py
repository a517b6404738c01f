"""Record what tuning sees without labels, beside what labels say: one line a clip and setting.

    python -m experiments.accuracy.tune_records -o shapes.jsonl --block 33 --clips 160
    python -m experiments.accuracy.tune_records -o second.jsonl --block 33 --clips 160 -m tests/demo/second

Every clip's questions are answered in full and by every setting. A line holds, question by question, whether the answer is right,
how many of the full answer's tokens the setting agrees on, and KL at each of them. `tune_validity` reads the lines. A
file that breaks off goes on where it ended.
"""

import argparse
from contextlib import closing
from functools import partial
from pathlib import Path

from evoprune.bench.agreement import agreement, reference
from evoprune.bench.eval import Cost
from evoprune.bench.questions import grade
from evoprune.bench.shared import SharedInput, SharedRows
from evoprune.bench.tune import Candidate, candidates
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.session import Session
from experiments.accuracy.clips_to_lines import add_lines
from experiments.demo.write import ClipName, demo_video

RIVALS = ("random", "divprune", "downscale")
FULL = Candidate("none", 1.0)
TOKENS = 64


def settings() -> list[Candidate]:
    """Return what `evoprune tune` tries, and three other methods."""
    return candidates() + [Candidate(method, budget) for method in RIVALS for budget in (0.5, 0.25, 0.1)]


def start(model: ModelOptions, folder: str):
    """Return what each process begins with: the function that makes the lines of a clip."""
    return partial(lines_of, load_model(model), Path(folder))


def lines_of(loaded, folder: Path, clip: ClipName) -> list[dict]:
    """Return a line of the full answers, then one a setting."""
    with demo_video(clip, folder) as video:
        rows = SharedRows()
        references = []
        made = []
        for setting in (FULL, *settings()):
            session = Session(loaded, PruneOptions(setting.budget, setting.method, seed=clip.seed).config())
            kind = partial(SharedInput, shared_rows=rows)
            with closing(open_inputs(session, [video.path], kind=kind)) as opened:
                encoded = opened.encode()
            cost = Cost(loaded, encoded)
            answers = []
            for number, row in enumerate(video.rows):
                answer = encoded.ask(row.prompt, max_new_tokens=TOKENS)
                right = bool(grade(row, answer.text))
                if setting == FULL:
                    references.append(reference(encoded, row.prompt, answer.ids, answer.report.finish_reason == "stop"))
                found = agreement(references[number], encoded)
                answers.append(
                    {
                        "right": right,
                        "agree": int(found.agrees.sum()),
                        "tokens": len(found.agrees),
                        "kl": [round(value, 5) for value in found.kl.tolist()],
                    }
                )
            tflop = cost.of(answer.report)["tflop_3b"] if video.rows else None
            made.append({"clip": str(clip), "name": setting.name, "tflop_3b": tflop, "answers": answers})
        return made if video.rows else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--world", default="shapes")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--block", type=int, required=True)
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    # On a CPU, which prunes clips as small as these inside the tower too.
    model = ModelOptions(args.model, device="cpu", dtype="fp32", threads=1)
    add_lines(args, partial(start, model))


if __name__ == "__main__":
    main()

"""Accuracy against budget on a file of questions: `python -m evoprune.evaluation samples/questions.jsonl`.

Each line of the file has `video` (relative to the file), `question` and `answer`. An answer is right if it is the same but for
case, blanks at the ends and a final full stop. Every video is encoded once a budget, through the same pipeline as `evoprune ask`.
`python -m evoprune.evaluation --clips 100` asks about procedural clips of the validation range instead.
"""

import argparse
import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from evoprune.errors import UsageError
from evoprune.pipeline import VideoQA
from evoprune.pruning.budget import parse_budget


@dataclass(frozen=True)
class Item:
    id: str
    video: Path
    question: str
    answer: str


def load_items(path: Path) -> list[Item]:
    """The questions of a JSONL file.

    Raises:
        UsageError: a line that is not such an object, or no lines.
    """
    items = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot read {path}: {problem}", "give a JSONL file of questions") from problem
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            items.append(Item(str(row.get("id", number)), path.parent / row["video"], row["question"], row["answer"]))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UsageError(
                f"{path}, line {number} is not a question ({problem})", "a line has video, question and answer"
            ) from problem
    if not items:
        raise UsageError(f"{path} holds no questions")
    return items


def validation_items(clips: int, folder: Path, questions: int = 6) -> list[Item]:
    """Procedural clips of the validation range, written to `folder` as H.264, and what to ask about them."""
    import numpy as np

    from evoprune.demo.clips import make_clip, write_video
    from evoprune.demo.questions import ask

    items = []
    for seed in range(clips):
        clip, path = make_clip("validation", seed), folder / f"{seed}.mp4"
        write_video(clip, path)
        drawn = ask(clip, np.random.default_rng(seed), questions)
        items += [Item(f"{seed}-{i}", path, q.question, q.answer) for i, q in enumerate(drawn)]
    return items


def is_right(answer: str, expected: str) -> bool:
    """Exact match but for case, outer blanks and a final full stop."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def answer_all(qa: VideoQA, items: list[Item]) -> list[str]:
    """The answer to each item; neighbouring items about one video share its encoding."""
    answers = []
    for video, group in groupby(items, key=lambda item: item.video):
        encoded = qa.encode(video)
        answers += ["".join(encoded.ask(item.question, max_new_tokens=64)) for item in group]
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("samples/questions.jsonl"))
    parser.add_argument("--clips", type=int, help="so many clips of the validation range instead of a file")
    parser.add_argument("-b", "--budget", default="1.0,0.5,0.25,0.1", help="list of shares kept")
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--method", default="evoprune")
    parser.add_argument("--quantize", default="none", help="list of none, int8, int4")
    args = parser.parse_args()
    budgets, columns = [parse_budget(b) for b in args.budget.split(",")], {}
    with TemporaryDirectory() as folder:
        items = validation_items(args.clips, Path(folder)) if args.clips else load_items(args.data)
        for kind in args.quantize.split(","):
            loaded = VideoQA.load(args.model, quantize=kind).loaded
            for budget in budgets:
                name = f"-b {budget:g}" + (f" {kind}" if kind != "none" else "")
                columns[name] = answer_all(VideoQA(loaded, budget=budget, method=args.method), items)
    print(f"| video | question | answer | {' | '.join(columns)} |")
    print("|---" * (3 + len(columns)) + "|")
    for i, item in enumerate([] if args.clips else items):
        cells = [c[i].strip() if is_right(c[i], item.answer) else f"**{c[i].strip()}**" for c in columns.values()]
        print(f"| {item.video.name} | {item.question} | {item.answer} | {' | '.join(cells)} |")
    right = [sum(is_right(a, item.answer) for a, item in zip(c, items, strict=True)) for c in columns.values()]
    print(f"| | right of {len(items)} | | {' | '.join(map(str, right))} |")


if __name__ == "__main__":
    main()

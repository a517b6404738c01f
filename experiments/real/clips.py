"""Generate clips with multiple-choice questions for the tasks in `experiments/real/tasks`. Imported; not a script."""

import json
from collections.abc import Callable
from pathlib import Path

from evoprune.batch import Row
from experiments.demo.worlds import SCENES

SPLIT = "heldout"
LETTERS = "ABCD"


def write_clips(folder: Path, questions: int, progress: Callable[[int], None] = lambda count: None) -> None:
    """Write clips of the world of `demo-scenes` and at least `questions` questions about them to `folder`/questions.jsonl.

    Each question has four options. The subtitles are other questions about the clip, with their answers.

    Args:
        progress: Called with the number of questions so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    seed = 0
    while len(rows) < questions:
        clip = SCENES.make(SPLIT, seed)
        asked = SCENES.ask(clip, seed)
        chosen = [each for each in asked if len(each.options) == len(LETTERS)]
        if chosen:
            name = f"{seed:04}{SCENES.suffix(clip, SCENES.crf[0])}"
            SCENES.write(clip, folder / name, SCENES.crf[0])
            for each in chosen:
                said = [f"{other.question} {other.answer}." for other in asked if other is not each]
                rows.append(
                    {
                        "video": name,
                        "prompt": Row("", (), (), each.question, options=each.options).prompt,
                        "options": each.options,
                        "subtitles": "\n".join(said),
                        "answer": LETTERS[each.options.index(each.answer)],
                    }
                )
            progress(len(rows))
        seed += 1
    made = folder / "questions.jsonl.writing"
    made.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    made.replace(folder / "questions.jsonl")

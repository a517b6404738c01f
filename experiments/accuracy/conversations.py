"""Count right answers of a demo model after earlier turns of a conversation, with nothing pruned: a row of a table for each world.

    python -m experiments.accuracy.conversations --clips 60

Of each validation clip one question is asked: alone, and as the last of a conversation in which the model has answered others about
the same clip.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from evoprune.bench.questions import VideoQuestions, grade
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA
from experiments.demo.worlds import SCENES, SHAPES
from experiments.demo.write import clips_asked, demo_video

MODELS = {SHAPES.name: "demo", SCENES.name: "demo-scenes"}
TURNS = (0, 1, 3)  # before the question
TOKENS = 32


def right_after(qa: VideoQA, video: VideoQuestions, turns: Sequence[int] = TURNS) -> dict[int, bool]:
    """Return whether the answer to the same question of a clip is right, after each number of `turns`."""
    encoded = qa.encode(video.path)
    last = video.rows[max(turns)]
    found = {}
    for count in turns:
        chat = encoded.chat()
        for row in video.rows[:count]:
            chat.ask(row.prompt, max_new_tokens=TOKENS).text  # noqa: B018 (generates it)
        found[count] = bool(grade(last, chat.ask(last.prompt, max_new_tokens=TOKENS).text))
    return found


def counted(world: str, clips: int) -> tuple[int, Counter[int]]:
    """Return of how many clips, those with enough questions, and how many right answers there are after each number of turns."""
    qa = VideoQA(load_model(ModelOptions(MODELS[world])), budget=1.0)
    asked = 0
    right: Counter[int] = Counter()
    with TemporaryDirectory() as folder:
        for clip in clips_asked(world, "validation", 0, clips):
            with demo_video(clip, Path(folder)) as video:
                if len(video.rows) <= max(TURNS):
                    continue
                asked += 1
                right.update(turns for turns, is_right in right_after(qa, video).items() if is_right)
    return asked, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--world", choices=[*MODELS], action="append", help="repeatable; default: both")
    parser.add_argument("--clips", type=int, default=60)
    args = parser.parse_args()
    after = " | ".join(f"after {turns}" for turns in TURNS)
    print(f"| model | clips | {after} |")
    print("|---|--:|" + "--:|" * len(TURNS))
    for world in args.world or MODELS:
        asked, right = counted(world, args.clips)
        print(f"| `{MODELS[world]}` | {asked} | {' | '.join(str(right[turns]) for turns in TURNS)} |", flush=True)


if __name__ == "__main__":
    main()

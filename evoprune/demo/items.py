"""The demo model's own questions for `evoprune eval`: clips made, and written as video files, right before they are needed."""

from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np

from evoprune.demo.clips import Clip, make_clip, write_video
from evoprune.demo.questions import Question, ask
from evoprune.items import Item, Video

BLOCK = 100_000  # seeds of one block; a block that was reported on is used up
QUESTIONS = 6  # about a clip
GROUPS = {
    "detail": ("digit", "digit_colour", "colour", "shape", "size"),
    "time": ("event", "which", "order", "count_end", "motion"),
    "space": ("relation", "place", "count"),
    "rest": ("exists", "describe"),
}


def groups(clip: Clip, question: Question) -> tuple[str, ...]:
    """What a question is counted under: what it needs, whether it is about a flash, and what the camera does."""
    needs = tuple(name for name, types in GROUPS.items() if question.type in types)
    return (*needs, *(("flash",) if question.flash else ()), "panning" if any(clip.pan) else "static")


def demo_items(split: str, block: int, limit: int, folder: Path, skip: Container[str] = ()) -> Iterator[Video]:
    """Clips number `block` * 100,000 and following of a split, each a file in `folder` until the next is asked for.

    Args:
        split: `validation` to tune on, `heldout` to report, `portrait` for the family that is never tuned on.
        limit: how many clips.
        skip: names of clips that are not needed.
    """
    for seed in range(block * BLOCK, block * BLOCK + limit):
        if (name := f"{split}-{seed}") in skip:
            continue
        clip, path = make_clip(split, seed), folder / f"{name}.mp4"
        if not (asked := ask(clip, np.random.default_rng(seed), QUESTIONS)):
            continue
        items = (
            Item(f"{name}-{i}", q.question, q.answer, type=q.type, groups=groups(clip, q)) for i, q in enumerate(asked)
        )
        write_video(clip, path, crf=18 + seed % 11)
        try:
            yield Video(name, path, tuple(items))
        finally:
            path.unlink()

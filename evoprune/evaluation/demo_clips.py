"""The demo model's own questions for `evoprune eval`: clips made, and written as video files, right before they are needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from evoprune.demo.clips import Clip, make_clip, write_video
from evoprune.demo.questions import Question, ask
from evoprune.errors import UsageError
from evoprune.evaluation.questions import Item, Video

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


def seeds(block: int, limit: int) -> range:
    """The first `limit` seeds of a block."""
    return range(block * BLOCK, block * BLOCK + limit)


def clip_name(split: str, seed: int) -> str:
    return f"{split}-{seed}"


@contextmanager
def demo_video(split: str, seed: int, folder: Path, crf: int | None = None) -> Iterator[Video]:
    """The clip number `seed` of a split with its questions, as a file in `folder` for as long as it is needed.

    Args:
        split: `validation` to tune on, `heldout` to report, `portrait` for the family that is never tuned on.
        crf: how coarse x264 is; default: from 18 to 28, by the seed.

    Raises:
        UsageError: it cannot be written.
    """
    name, clip = clip_name(split, seed), make_clip(split, seed)
    asked = ask(clip, np.random.default_rng(seed), QUESTIONS)
    items = (
        Item(f"{name}-{i}", q.question, q.answer, type=q.type, groups=groups(clip, q)) for i, q in enumerate(asked)
    )
    path = folder / f"{name}.mp4"
    try:
        write_video(clip, path, crf=18 + seed % 11 if crf is None else crf, preset="veryfast")
    except OSError as problem:
        reason = problem.strerror or problem
        raise UsageError(f"cannot write a clip to {folder}: {reason}", "set TMPDIR to a folder with room") from problem
    try:
        yield Video(name, path, tuple(items))
    finally:
        path.unlink()

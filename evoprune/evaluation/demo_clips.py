"""The demo's own clips and questions for `evoprune eval`. Each clip is written as a video file right before it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from evoprune.batch.rows import Row
from evoprune.demo.clips import Clip, make_clip
from evoprune.demo.drawing import write_video
from evoprune.demo.questions import Question, ask
from evoprune.errors import UsageError
from evoprune.evaluation.questions import Video

BLOCK = 100_000  # seeds in one block; a block whose results were reported is not used again
QUESTIONS = 6  # about a clip
GROUPS = {
    "detail": ("digit", "digit_colour", "colour", "shape", "size"),
    "time": ("event", "which", "order", "count_end", "motion"),
    "space": ("relation", "place", "count"),
    "rest": ("exists", "describe"),
}


def groups(clip: Clip, question: Question) -> tuple[str, ...]:
    """The groups that a question counts in: what it needs, whether it is about a flash, and what the camera does."""
    needs = tuple(name for name, types in GROUPS.items() if question.type in types)
    return (*needs, *(("flash",) if question.flash else ()), "panning" if any(clip.pan) else "static")


def seeds(block: int, limit: int) -> range:
    """The first `limit` seeds of a block."""
    return range(block * BLOCK, block * BLOCK + limit)


def clip_name(split: str, seed: int) -> str:
    return f"{split}-{seed}"


@contextmanager
def demo_video(split: str, seed: int, folder: Path, crf: int | None = None) -> Iterator[Video]:
    """Clip number `seed` of a split with its questions, as a file in `folder` that is removed at the end.

    Args:
        split: `validation` to tune on, `heldout` to report, `portrait` for the family that is never tuned on.
        crf: x264's constant rate factor; default: from 18 to 28, by the seed.

    Raises:
        UsageError: the file cannot be written.
    """
    name, clip = clip_name(split, seed), make_clip(split, seed)
    path = folder / f"{name}.mp4"
    rows = tuple(
        Row(f"{name}-{i}", name, str(path), q.question, answer=q.answer, type=q.type, groups=groups(clip, q))
        for i, q in enumerate(ask(clip, np.random.default_rng(seed), QUESTIONS))
    )
    try:
        write_video(clip, path, crf=18 + seed % 11 if crf is None else crf, preset="veryfast")
    except OSError as problem:
        reason = problem.strerror or problem
        raise UsageError(f"cannot write a clip to {folder}: {reason}", "set TMPDIR to a folder with room") from problem
    try:
        yield Video(name, path, rows)
    finally:
        path.unlink()

"""Write clips from a demo model's world along with questions: `python -m experiments.demo.write FOLDER --clips 60`.

To ask the questions, run `evoprune eval --data FOLDER/questions.jsonl`; for clips of scenes, add `-m demo-scenes`. A clip is
determined by its split, block, and number, and its file is the same every time. Files are lossless by default. The figures in
results/ are measured on compressed files (`--compressed`), with a rate factor that depends on the clip's number. `frontier.py` and
other scripts create these files themselves.
"""

import argparse
import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

from evoprune.batch import Row
from evoprune.bench import VideoQuestions
from evoprune.errors import UsageError
from experiments.demo.painting import LOSSLESS
from experiments.demo.worlds import SHAPES, WORLDS

BLOCK = 100_000  # number of seeds in a block; a block is not reused once results on it have been reported


@dataclass(frozen=True)
class ClipName:
    """Identifies a clip in a world. Its string representation is the clip's name in results."""

    split: str
    seed: int
    world: str = SHAPES.name

    def __str__(self) -> str:
        return f"{'' if self.world == SHAPES.name else f'{self.world}-'}{self.split}-{self.seed}"


def seeds(block: int, limit: int) -> range:
    return range(block * BLOCK, block * BLOCK + limit)


def clips_asked(world: str, split: str, block: int, limit: int, groups: Collection[str] = ()) -> list[ClipName]:
    """Return the first `limit` clips in a block that support a question in one of the groups.

    Raises:
        UsageError: If the world has no such split, or the block has too few clips.
    """
    if split not in WORLDS[world].splits:
        raise UsageError(f"{world} has no split {split!r}", f"one of {', '.join(WORLDS[world].splits)}")
    fitting = (seed for seed in seeds(block, BLOCK) if not groups or WORLDS[world].may_hold(seed, groups))
    found = [ClipName(split, seed, world) for seed in islice(fitting, limit)]
    if len(found) < limit:
        raise UsageError(f"a block contains {len(found):,} such clips", "use fewer, or several blocks")
    return found


def data_text(world: str, split: str, block: int) -> str:
    """Return the name that evaluation results use for a set of clips."""
    return f"{world} ({split}, block {block})"


def write_clip(name: ClipName, folder: Path, crf: int | None = None, groups: Collection[str] = ()) -> VideoQuestions:
    """Write a clip to a file in `folder`, and return the video with its questions.

    Args:
        crf: x264's constant rate factor. 0 preserves every pixel exactly, and None means that the seed determines the factor.
        groups: If not empty, only questions in these groups are returned.

    Raises:
        UsageError: If the file cannot be written.
    """
    world = WORLDS[name.world]
    clip = world.make(name.split, name.seed)
    low, high = world.crf
    crf = low + name.seed % (high - low + 1) if crf is None else crf
    path = folder / f"{name}{world.suffix(clip, crf)}"
    asked = [q for q in world.ask(clip, name.seed) if not groups or set(groups) & set(q.groups)]
    rows = tuple(
        Row(
            f"{name}-{i}", (str(name),), (str(path),), q.question,
            options=q.options, answer=q.answer, type=q.type, groups=q.groups,
        )
        for i, q in enumerate(asked)
    )  # fmt: skip
    try:
        world.write(clip, path, crf)
        os.utime(path, (0, 0))  # a fixed modification time, so that a resumed run recognizes the file
    except OSError as problem:
        reason = problem.strerror or problem
        raise UsageError(
            f"cannot write a clip to {folder}: {reason}", "choose a folder with free space, or set TMPDIR"
        ) from problem
    return VideoQuestions(str(name), path, rows)


@contextmanager
def demo_video(
    name: ClipName, folder: Path, crf: int | None = None, groups: Collection[str] = ()
) -> Iterator[VideoQuestions]:
    """Context manager that writes a clip as in `write_clip` and removes the file on exit."""
    video = write_clip(name, folder, crf, groups)
    try:
        yield video
    finally:
        video.path.unlink()


@contextmanager
def demo_videos(clips: Iterable[ClipName], groups: Collection[str] = ()) -> Iterator[list[VideoQuestions]]:
    """Yield all clips with questions, as compressed files that are removed when the context exits."""
    with TemporaryDirectory(prefix="evoprune-clips-") as folder:
        yield [video for clip in clips if (video := write_clip(clip, Path(folder), groups=groups)).rows]


def write(clips: Iterable[ClipName], folder: Path, crf: int | None = LOSSLESS, groups: Collection[str] = ()) -> Path:
    """Write clips and their `questions.jsonl`, and return that file's path. See `write_clip` for arguments and exceptions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for clip in clips:
        video = write_clip(clip, folder, crf, groups)
        for row in video.rows:
            line = {"id": row.id, "video": video.path.name, "question": row.question, "answer": row.answer}
            line |= {"options": row.options} if row.options else {}
            lines.append(json.dumps(line | {"type": row.type, "groups": row.groups}) + "\n")
    path = folder / "questions.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo.write",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", default=SHAPES.name, choices=WORLDS, help="default: %(default)s")
    parser.add_argument("--split", default=SHAPES.splits[0], choices=SHAPES.splits, help="default: %(default)s")
    parser.add_argument("--block", type=int, default=0, help="blocks share no clip (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=100, help="default: %(default)s")
    parser.add_argument(
        "--group", default="", help="only questions of these groups, for example picture,open of scenes"
    )
    parser.add_argument(
        "--compressed",
        action="store_true",
        help="write the files that results/ was measured on",
    )
    asked = parser.parse_args(args)
    if asked.block < 0 or asked.clips < 1:
        parser.error("--block is 0 or more, --clips 1 or more")
    groups = list(filter(None, asked.group.split(",")))
    try:
        clips = clips_asked(asked.world, asked.split, asked.block, asked.clips, groups)
        print(write(clips, asked.folder, None if asked.compressed else LOSSLESS, groups))
    except UsageError as problem:
        sys.exit(f"error: {problem.message}\nhint: {problem.hint}")


if __name__ == "__main__":
    main()

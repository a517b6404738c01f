"""The demo's own clips and questions for `evoprune eval`. Each clip is written as a video file right before it is needed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evoprune.batch.rows import Row
from evoprune.bench.evaluation.questions import Video
from evoprune.bundled import SPLITS_OF
from evoprune.demo.worlds import SHAPES, WORLDS
from evoprune.errors import UsageError

BLOCK = 100_000  # seeds in one block; a block whose results were reported is not used again


@dataclass(frozen=True)
class ClipName:
    """Which clip of which world; as a text, its name in results."""

    split: str
    seed: int
    world: str = SHAPES.name

    def __str__(self) -> str:
        return f"{'' if self.world == SHAPES.name else f'{self.world}-'}{self.split}-{self.seed}"


def seeds(block: int, limit: int) -> range:
    return range(block * BLOCK, block * BLOCK + limit)


def clips_asked(
    worlds: Collection[str], split: str, block: int, limit: int, groups: Collection[str] = ()
) -> list[ClipName]:
    """The first clips of a block, up to `limit` of each world, that can have a question of one of the groups.

    Raises UsageError: a world without this split, or without so many clips in a block.
    """
    made: list[ClipName] = []
    for name in worlds:
        world = WORLDS[name]
        if split not in SPLITS_OF[name]:
            raise UsageError(f"{name} has no split {split!r}", f"one of {', '.join(SPLITS_OF[name])}")
        fitting = (seed for seed in seeds(block, BLOCK) if not groups or world.may_hold(seed, groups))
        found = [ClipName(split, seed, name) for seed in islice(fitting, limit)]
        if len(found) < limit:
            hint = "lower --limit, or take several blocks (--block)"
            raise UsageError(f"a block of the demo's clips holds {len(found):,}", hint)
        made += found
    return made


@contextmanager
def demo_video(name: ClipName, folder: Path, crf: int | None = None, groups: Collection[str] = ()) -> Iterator[Video]:
    """A clip with its questions of these groups, as a file in `folder` that is removed at the end.

    `crf`: x264's constant rate factor; default: by the seed. Raises UsageError: the file cannot be written.
    """
    world = WORLDS[name.world]
    clip = world.make(name.split, name.seed)
    path = folder / f"{name}{world.suffix(clip)}"
    asked = [q for q in world.ask(clip, name.seed) if not groups or set(groups) & set(q.groups)]
    rows = tuple(
        Row(
            f"{name}-{i}", (str(name),), (str(path),), q.question,
            options=q.options, answer=q.answer, type=q.type, groups=q.groups,
        )
        for i, q in enumerate(asked)
    )  # fmt: skip
    low, high = world.crf
    try:
        world.write(clip, path, low + name.seed % (high - low + 1) if crf is None else crf)
    except OSError as problem:
        reason = problem.strerror or problem
        raise UsageError(f"cannot write a clip to {folder}: {reason}", "set TMPDIR to a folder with room") from problem
    try:
        yield Video(str(name), path, rows)
    finally:
        path.unlink()

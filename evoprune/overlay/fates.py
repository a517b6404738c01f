"""What became of each unit of a video: it is read by the language model, reused, merged into another unit, or dropped.

`trace` encodes a video and keeps its frames; `overlay` draws them.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from evoprune.errors import UsageError
from evoprune.methods.types import ascending
from evoprune.session.encoding import Progress
from evoprune.session.engine import Engine
from evoprune.session.inputs import open_inputs
from evoprune.session.options import SamplingOptions
from evoprune.text import counted
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.plan import Plan
from evoprune.vision.encoded import EncodedRows, selected
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import resize

FATES = ("read", "reused", "merged", "dropped")  # each unit has one, the first that applies


@dataclass(frozen=True)
class Fates:
    """What became of the N units of a video. Units are numbered frame pair after frame pair, in raster order.

    A unit is *read*, if the language model reads a token at its place; else *reused*, if it was not encoded because it has not
    changed since an earlier frame pair; else *merged*, if its row became part of the row at another unit's place; else *dropped*.

    Attributes:
        chosen: bool `[N]`, whether the language model reads a token at the unit's place.
        source: int64 `[N]`, the unit whose pixels represent it: itself, or the same place in an earlier frame pair.
        owner: int64 `[N]`, the unit at whose place the row or token that represents it ends, -1 for none.
        rows: how many the encoder returns.
    """

    grid: tuple[int, int, int]
    chosen: torch.Tensor
    source: torch.Tensor
    owner: torch.Tensor
    rows: int

    @property
    def encoded(self) -> torch.Tensor:
        """bool `[N]`: not reused from an earlier frame pair. A unit that is read may have been reused."""
        return self.source == ascending(len(self.source), self.source.device)

    @property
    def fate(self) -> torch.Tensor:
        """int64 `[N]`: the index in `FATES` of each unit's fate."""
        moved = (self.owner >= 0) & (self.owner != ascending(len(self.owner), self.owner.device))
        applies = torch.stack([self.chosen, ~self.encoded, moved, torch.ones_like(moved)])
        return applies.int().argmax(0)

    def all_of(self, name: str) -> torch.Tensor:
        return self.fate == FATES.index(name)

    def counts(self) -> dict[str, int]:
        sums = {name: int(self.all_of(name).sum()) for name in FATES}
        return {"units": len(self.owner), **sums, "encoded": int(self.encoded.sum()), "rows": self.rows}


@torch.inference_mode()
def fates(video: EncodedRows) -> Fates:
    """What became of the units of an encoded video. The method must not read the question."""
    row, selection = video.tokens.owner.cpu(), selected(video)
    owner = torch.where(row >= 0, video.unit.cpu()[row.clamp(min=0)], -1)
    kept = selection.kept.cpu()
    if selection.owner is not None:  # otherwise the merging inside the encoder is what is drawn
        into = selection.owner.cpu()
        owner = torch.where(into >= 0, kept[into.clamp(min=0)], -1)
    chosen = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    chosen[kept] = True
    _, height, width = video.plan.grid
    source = (video.source.cpu() * height * width + ascending(height * width, "cpu")).flatten()
    return Fates(video.plan.grid, chosen, source, owner, len(video.unit))


@dataclass(frozen=True)
class TracedVideo:
    """A video's frames and what the encoder did with them.

    `frames`: uint8 `[F, H, W, 3]`, at the size that the encoder reads; two are a frame pair. `damaged`: packets not decoded.
    `warnings`: as in a report, and `demo_overlay` where a demo model read a video that it was not trained for.
    """

    plan: Plan
    frames: torch.Tensor
    fates: Fates
    warnings: list[str]
    damaged: int

    @property
    def summary(self) -> str:
        n, (count, height, width) = self.fates.counts(), self.plan.grid
        pairs = f"{counted(count, 'frame pair')} of {height}x{width} units"
        return f"{pairs}: {n['units']:,} units, {n['encoded']:,} encoded, {n['read']:,} tokens read"


def trace(
    engine: Engine,
    path: str,
    sampling: SamplingOptions | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> TracedVideo:
    """Encodes a video and keeps its frames and the fates of its units. Arguments as of `video_qa.open_inputs`.

    Raises UsageError: the method reads the question, or acts inside the language model alone. VideoError. OutOfMemory.
    """
    if engine.method.reads_question:
        what, instead = engine.method.reading
        raise UsageError(f"{what}, and an overlay has none", f"use {instead}")
    if engine.method.acts == "language":
        hint = (
            "use a method that acts before the language model; in a combination, the overlay shows what that one does"
        )
        raise UsageError(f"method {engine.options.method} drops tokens by the question, and an overlay has none", hint)
    frames, rows = [], []

    def read(*args, **settings) -> Iterator[FrameChunk]:
        frames.clear()  # where memory was short, the encoder begins anew
        with closing(read_frames(*args, **settings)) as made:
            for chunk in made:
                frames.append(resize(torch.from_numpy(chunk.frames), plan.height, plan.width))
                yield chunk

    def encode(*args, **settings) -> EncodedRows:
        rows[:] = [encode_rows(*args, **settings)]
        return rows[0]

    with closing(open_inputs(engine, [path], sampling, names=[name], read=read, encode_rows=encode)) as opened:
        (plan,) = opened.plans
        report = opened.encode(progress).report
    found = list(plan.info.warnings)
    found += [each for each in ("cut_short", "damaged_video", "equal_scores") if each in report.inputs[0].warnings]
    found += [] if engine.loaded.knows(plan.info) else ["demo_overlay"]
    return TracedVideo(plan, torch.cat(frames), fates(rows[0]), found, report.video.damaged or 0)

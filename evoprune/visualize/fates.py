"""What becomes of each part of a video: which units the language model reads, and which row of the encoder stands for the others.

`look_at` encodes a video and keeps its frames beside the bookkeeping; `drawing` makes pictures of it, `film` makes them files.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from evoprune.errors import UsageError
from evoprune.methods.base import Selection
from evoprune.model.memory import memory_guard
from evoprune.pipeline.opening import OpenVideo
from evoprune.pipeline.work import CHUNK_BYTES
from evoprune.video.decode import read_frames
from evoprune.video.info import is_demo_clip
from evoprune.video.plan import Plan
from evoprune.vision.encoder import Unchosen, encode_rows, selected
from evoprune.vision.preprocess import patchify, resize


@dataclass(frozen=True)
class Fates:
    """What became of the N units of a video; units are numbered grid after grid, in raster order.

    Attributes:
        grid: (T, H, W) in units.
        chosen: bool `[N]`, whether the language model reads a token at the unit's place.
        source: int64 `[N]`, the unit whose pixels stand for it: itself, or the same place in an earlier grid.
        owner: int64 `[N]`, the unit at whose place its row, or the token that it was averaged into, ended: itself where it was
            not merged; -1 where it is part of nothing.
        rows: with how many the encoder ended.
    """

    grid: tuple[int, int, int]
    chosen: torch.Tensor
    source: torch.Tensor
    owner: torch.Tensor
    rows: int

    @property
    def reused(self) -> torch.Tensor:
        """bool `[N]`: not encoded, since it has not changed since an earlier grid."""
        return self.source != torch.arange(len(self.source))

    @property
    def merged(self) -> torch.Tensor:
        """bool `[N]`: encoded at first, and then merged into what sits elsewhere."""
        return ~self.reused & (self.owner >= 0) & (self.owner != torch.arange(len(self.owner)))

    def counts(self) -> dict[str, int]:
        """All units; of these the ones that are chosen, reused and merged; and rows."""
        return {
            "units": len(self.owner),
            "chosen": int(self.chosen.sum()),
            "reused": int(self.reused.sum()),
            "merged": int(self.merged.sum()),
            "rows": self.rows,
        }


@torch.inference_mode()
def fates(video: Unchosen) -> Fates:
    """What becomes of the units of an encoded video; the method does not read the question."""
    units = len(video.tokens.owner)
    row = video.tokens.owner.cpu()
    owner = torch.where(row >= 0, video.home.cpu()[row.clamp(min=0)], -1)
    kept = selected(video)
    if isinstance(kept, Selection):
        into, kept = kept.owner.cpu(), kept.kept.cpu()
        if not video.inside:  # else what merged inside the encoder is what is shown
            owner = torch.where(into >= 0, kept[into.clamp(min=0)], -1)
    chosen = torch.zeros(units, dtype=torch.bool)
    chosen[kept.cpu()] = True
    count, height, width = video.tokens.grid
    places = torch.arange(height * width)
    source = (video.source * height * width + places).flatten()
    return Fates((count, height, width), chosen, source, owner, len(video.home))


@dataclass(frozen=True)
class Look:
    """A video as a model looked at it.

    Attributes:
        plan: what was looked at.
        frames: uint8 `[F, H, W, 3]`, of the size that the encoder saw; two are a grid.
        fates: of the units.
        warnings: as in a report, but `demo_overlay` where the demo model saw what it does not know.
        damaged: packets that could not be decoded.
    """

    plan: Plan
    frames: torch.Tensor
    fates: Fates
    warnings: list[str]
    damaged: int

    @property
    def summary(self) -> str:
        """One line of counts."""
        n, (count, height, width) = self.fates.counts(), self.plan.grid
        encoded = n["units"] - n["reused"]
        return (
            f"{count} grid{'' if count == 1 else 's'} of {height}x{width} units: {n['units']:,} units, {encoded:,} encoded, "
            f"{n['rows']:,} left at the end, {n['chosen']:,} tokens read"
        )


def look_at(opened: OpenVideo, progress: Callable[[str, int, int], None] | None = None) -> Look:
    """Encodes a video, one part after another, and keeps what is needed to show what was done.

    Args:
        opened: from `pipeline.opening.open_video`, not begun.
        progress: as of `VideoQA.encode`.

    Raises:
        UsageError: the method reads the question. VideoError: unreadable. OutOfMemory.
    """
    engine, view, plan = opened.engine, opened.view, opened.view.plan
    if engine.method.reads_question:
        hint = "choose a method that does without"
        raise UsageError(
            f"method {engine.options.method} chooses for a question, and there is none to draw it for", hint
        )
    limits, frames, damaged = engine.loaded.video, [], 0

    def patches() -> Iterator[torch.Tensor]:
        nonlocal damaged
        read = read_frames(view.info, plan.sampling.times_s, decoder=view.decoder, chunk_bytes=CHUNK_BYTES)
        with closing(read) as chunks:
            for chunk in chunks:
                damaged += chunk.damaged
                frames.append(resize(torch.from_numpy(chunk.frames), plan.height, plan.width))
                yield patchify(
                    frames[-1], limits.image_mean, limits.image_std, limits.patch_size, limits.temporal_patch_size,
                    limits.merge_size,
                )  # fmt: skip
                if progress:
                    progress("encode", chunk.first + len(chunk.frames), plan.sampling.frames)

    with memory_guard("encode"):
        video = encode_rows(
            engine.loaded.model.model.visual,
            patches(),
            plan.grid,
            engine.method,
            view.keep,
            seconds_per_grid=plan.sampling.seconds_per_grid(limits.temporal_patch_size),
            seed=engine.seed,
            on_layer=lambda done, total: progress("layers", done, total) if progress else None,
        )
        found = fates(video)
    told = {
        "cut_short": view.cut_short,
        "damaged_video": damaged > 0,
        "equal_scores": video.nothing().flat,
        "demo_overlay": engine.loaded.is_demo and not is_demo_clip(view.info),
    }
    warnings = [name for name, so in told.items() if so]
    return Look(plan, torch.cat(frames), found, warnings, damaged)

"""The third stage: patches become the tokens that the language model reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch

from evoprune.errors import OutOfMemory
from evoprune.model.clock import Clock
from evoprune.model.memory import memory_guard
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.patches import PatchReader
from evoprune.pipeline.planning import TEXT, units_at_once
from evoprune.video.plan import Plan
from evoprune.vision.encoded import Encoded, EncodedRows, select_tokens
from evoprune.vision.encoder import encode_rows

Progress = Callable[[str, int, int], None]  # "encode", frames done, in all; then perhaps "layers", of the tower
EncodeRows = Callable[..., EncodedRows]


@dataclass(frozen=True)
class Encoding:
    """An input that was encoded, and what that took.

    Attributes:
        plan: what was looked at.
        tokens: what the language model reads; none where a question is to come first.
        rows: where the method selects tokens for each question, what it selects from; else None.
        seconds: how long each stage was busy: "read", "preprocess" and "encode".
        wall_seconds: from the start of reading to the end of encoding.
        cache: "hit" (from disk), "miss" (encoded, then stored) or "off".
        warnings: names, as in reports.
        damaged: packets that could not be decoded.
    """

    plan: Plan
    tokens: Encoded
    rows: EncodedRows | None
    seconds: dict[str, float]
    wall_seconds: float
    cache: str = "off"
    warnings: tuple[str, ...] = ()
    damaged: int = 0

    @property
    def kept(self) -> int:
        """How many tokens the language model will read."""
        return self.plan.encoder.keep if self.rows else len(self.tokens.kept)

    def own(self) -> "Encoding":
        """The same one for another conversation, whose selections it times apart."""
        if not self.rows:
            return self
        rows = replace(self.rows, timer=self.rows.timer.copy())
        return replace(self, rows=rows, tokens=rows.nothing_selected())

    def selected(self, question: torch.Tensor) -> "Encoding":
        """With the tokens for a question, its embedding `[words, D]`, where the method selects them for each one."""
        return replace(self, tokens=select_tokens(self.rows, question)) if self.rows else self


def total_seconds(encodings: Sequence[Encoding]) -> tuple[dict[str, float], float]:
    """The busy seconds of each stage, and the wall-clock seconds, of all inputs together."""
    stages = {stage: sum(each.seconds[stage] for each in encodings) for stage in encodings[0].seconds}
    return stages, sum(each.wall_seconds for each in encodings)


def encode_input(
    engine: Engine,
    plan: Plan,
    reader: PatchReader,
    progress: Progress | None = None,
    rows_of: EncodeRows | None = None,
    around: int = TEXT,
    select: bool = True,
) -> tuple[Encoded | EncodedRows, dict[str, float]]:
    """Encodes a video, and the seconds that each stage was busy.

    Where there is not enough memory after all it begins anew, with half as many units in the tower at a time.

    Args:
        progress: called with "encode", frames done and frames in all, after every chunk; then, where all of the video goes
            through some of the tower's layers together, with "layers", those done and those in all.
        rows_of: instead of `vision.encoder.encode_rows`.
        around: tokens of the prompt around the video.
        select: whether tokens are selected, unless the method reads the question.

    Raises:
        VideoError: unreadable. OutOfMemory. ModelError: numbers that are NaN or infinite.
    """
    clock = Clock(engine.device)
    at_once, start = units_at_once(engine, plan, around), clock.now()
    while True:
        try:
            with memory_guard("encode"), closing(reader):
                result = _run(engine, plan, _patches(plan, reader, clock, progress), at_once, progress, rows_of, select)
            break
        except OutOfMemory as problem:
            least = plan.grid[1] * plan.grid[2]
            if problem.stage != "encode" or at_once <= least:
                raise
        torch.cuda.empty_cache()  # frees memory that is in pieces; does nothing where there is no CUDA
        at_once = max(least, at_once // 2)
    seconds = clock.now() - start - clock.seconds.pop("wait", 0.0)
    return result, {"encode": seconds} | reader.clock.seconds


def _patches(plan: Plan, reader: PatchReader, clock: Clock, progress: Progress | None) -> Iterator[torch.Tensor]:
    for frames_done, patches in clock.each("wait", reader.chunks()):
        yield patches
        if progress:
            progress("encode", frames_done, plan.sampling.frames)


def _run(
    engine: Engine,
    plan: Plan,
    patches: Iterator[torch.Tensor],
    at_once: int,
    progress: Progress | None,
    rows_of: EncodeRows | None,
    select: bool,
) -> Encoded | EncodedRows:
    loaded = engine.loaded
    more = {"on_layer": lambda done, total: progress("layers", done, total)} if progress else {}
    rows = (rows_of or encode_rows)(
        loaded.model.model.visual,
        patches,
        plan.encoder,
        seconds_per_pair=plan.sampling.seconds_per_pair(loaded.video.temporal_patch_size),
        seed=engine.seed,
        chunk_units=at_once,
        normal=loaded.limits[plan.kind].normal,
        **more,
    )
    return select_tokens(rows) if select and not (engine.method.reads_question and plan.encoder.prunes) else rows

"""The third stage: patches become the tokens that the language model reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import torch

from evoprune.errors import OutOfMemory
from evoprune.model.clock import Clock
from evoprune.model.memory import memory_guard
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.memory_check import TEXT, units_at_once
from evoprune.pipeline.patches import PatchReader
from evoprune.pipeline.view import View
from evoprune.vision.encoded import Encoded, EncodedRows, select_tokens
from evoprune.vision.encoder import encode_rows

Progress = Callable[[str, int, int], None]  # "encode", frames done, in all; then perhaps "layers", of the tower
EncodeRows = Callable[..., EncodedRows]


@dataclass(frozen=True)
class Encoding:
    """An input that was encoded, and what that took.

    Attributes:
        view: what was looked at.
        result: its tokens; or its rows, where the method selects for each question.
        seconds: how long each stage was busy: "read", "preprocess" and "encode".
        wall_seconds: from the start of reading to the end of encoding.
        cache: "hit" (from disk), "miss" (encoded, then stored) or "off".
        warnings: names, as in reports.
        damaged: packets that could not be decoded.
    """

    view: View
    result: Encoded | EncodedRows
    seconds: dict[str, float]
    wall_seconds: float
    cache: str = "off"
    warnings: tuple[str, ...] = field(default=())
    damaged: int = 0

    @property
    def selects(self) -> bool:
        """Whether tokens are selected for each question."""
        return isinstance(self.result, EncodedRows)

    @property
    def tokens(self) -> Encoded:
        """The tokens that the language model reads; none where a question is to come first."""
        return self.result.nothing_selected() if self.selects else self.result

    @property
    def kept(self) -> int:
        """How many tokens the language model will read."""
        return self.view.encoder.keep if self.selects else len(self.result.kept)

    def own(self) -> "Encoding":
        """The same one for another conversation, whose selections it times apart."""
        return replace(self, result=replace(self.result, timer=self.result.timer.copy())) if self.selects else self


def total_seconds(encodings: Sequence[Encoding]) -> tuple[dict[str, float], float]:
    """The busy seconds of each stage, and the wall-clock seconds, of all inputs together."""
    stages = {stage: sum(each.seconds[stage] for each in encodings) for stage in encodings[0].seconds}
    return stages, sum(each.wall_seconds for each in encodings)


def encode_view(
    engine: Engine,
    view: View,
    reader: PatchReader,
    progress: Progress | None = None,
    rows_of: EncodeRows | None = None,
    around: int = TEXT,
) -> tuple[Encoded | EncodedRows, dict[str, float]]:
    """Encodes a video, and the seconds that each stage was busy.

    Where there is not enough memory after all it begins anew, with half as many units in the tower at a time.

    Args:
        progress: called with "encode", frames done and frames in all, after every chunk; then, where all of the video goes
            through some of the tower's layers together, with "layers", those done and those in all.
        rows_of: instead of `vision.encoder.encode_rows`.
        around: tokens of the prompt around the video.

    Raises:
        VideoError: unreadable. OutOfMemory. ModelError: numbers that are NaN or infinite.
    """
    clock = Clock(engine.device)
    at_once, start = units_at_once(engine, view, around), clock.now()
    while True:
        try:
            with memory_guard("encode"), closing(reader):
                result = _run(engine, view, _patches(view, reader, clock, progress), at_once, progress, rows_of)
            break
        except OutOfMemory as problem:
            least = view.units_of_pair
            if problem.stage != "encode" or at_once <= least:
                raise
        torch.cuda.empty_cache()  # frees memory that is in pieces; does nothing where there is no CUDA
        at_once = max(least, at_once // 2)
    seconds = clock.now() - start - clock.seconds.pop("wait", 0.0)
    return result, {"encode": seconds} | reader.clock.seconds


def _patches(view: View, reader: PatchReader, clock: Clock, progress: Progress | None) -> Iterator[torch.Tensor]:
    for frames_done, patches in clock.each("wait", reader.chunks()):
        yield patches
        if progress:
            progress("encode", frames_done, view.plan.sampling.frames)


def _run(
    engine: Engine,
    view: View,
    patches: Iterator[torch.Tensor],
    at_once: int,
    progress: Progress | None,
    rows_of: EncodeRows | None,
) -> Encoded | EncodedRows:
    """The call of the encoder."""
    loaded = engine.loaded
    more = {"on_layer": lambda done, total: progress("layers", done, total)} if progress else {}
    rows = (rows_of or encode_rows)(
        loaded.model.model.visual,
        patches,
        view.encoder,
        seconds_per_pair=view.seconds_per_pair(loaded.video.temporal_patch_size),
        seed=engine.seed,
        chunk_units=at_once,
        normal=loaded.limits[view.kind].normal,
        **more,
    )
    return rows if engine.method.reads_question and view.encoder.prunes else select_tokens(rows)

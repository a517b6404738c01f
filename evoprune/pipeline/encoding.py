"""Encoding: frames are read, resized and cut into patches, and become the tokens that the language model reads."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch

from evoprune.errors import OutOfMemory, memory_guard
from evoprune.model.cost import Clock
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.planning import TEXT, fitting_chunk
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.plan import InputLimits, Plan
from evoprune.vision.encoded import Encoded, EncodedRows, select_tokens
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import patchify, resize

Progress = Callable[[str, int, int], None]  # "encode", frames done, in all; then perhaps "layers", of the tower
EncodeRows = Callable[..., EncodedRows]
ReadFrames = Callable[..., Iterator[FrameChunk]]

T = TypeVar("T")

DEPTH = 2
PATIENCE_S = 3.0  # how long closing waits for the item that is being made


def prefetched(items: Generator[T, None, None], depth: int = DEPTH) -> Iterator[T]:
    """Yields items in order while a thread makes the next ones, at most `depth` of them.

    The thread, which also closes `items`, starts with the first item that is asked for. When this iterator is exhausted, is closed
    or raises, the thread finishes the item it is making and ends. Where that takes longer than `PATIENCE_S`, as a read that hangs
    does, it is left to end by itself. Whatever making an item raises comes after all items before it.
    """
    made: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()
    room, stopped = threading.Semaphore(depth), threading.Event()

    def work() -> None:
        problem = None
        try:
            with closing(items):
                while room.acquire() and not stopped.is_set():
                    made.put(([next(items)], None))
        except StopIteration:
            pass
        except BaseException as found:
            problem = found
        made.put(([], problem))

    # A daemon thread that hangs does not keep the program from ending.
    thread = threading.Thread(target=work, name="evoprune-prefetch", daemon=True)
    try:
        thread.start()
        while True:
            item, problem = made.get()
            if problem is not None:
                raise problem
            if not item:
                return
            room.release()
            yield item.pop()
    finally:
        stopped.set()
        room.release()
        if thread.is_alive():
            thread.join(PATIENCE_S)


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits) -> torch.Tensor:
    """float32 `[rows, values]`: the patches of frames uint8 `[n, height, width, 3]`, resized as planned and normalised."""
    sizes = limits.patch_size, limits.temporal_patch_size, limits.merge_size
    resized = resize(torch.from_numpy(frames), plan.height, plan.width)
    return patchify(resized, limits.image_mean, limits.image_std, *sizes)


class PatchReader:
    """The patches of a video. `chunks` can be called again, which begins anew. To be closed.

    Args:
        clock: adds up the seconds of "read" and "preprocess".
        chunk_bytes: of decoded frames, held at a time.
        read: gives the frames, as `video.frames.read_frames`.
        threaded: whether a thread prepares the next chunks while one is used.

    Attributes:
        damaged: packets that could not be decoded, since `chunks` was last called.
    """

    def __init__(
        self,
        plan: Plan,
        limits: InputLimits,
        clock: Clock,
        chunk_bytes: int,
        read: ReadFrames = read_frames,
        threaded: bool = True,
    ):
        self.clock, self.damaged = clock, 0
        self.plan, self._limits, self._chunk_bytes = plan, limits, chunk_bytes
        self._read, self._threaded = read, threaded
        self._begun: Iterator[tuple[int, torch.Tensor]] | None = None
        self._open = ExitStack()

    def begin(self) -> None:
        """Has the first chunk ready when it returns; a thread goes on to the next two. Errors: as of `chunks`."""
        chunks = self._start()
        self._begun = chain(list(islice(chunks, 1)), chunks)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """For every chunk, how many frames there were up to its end, and its patches `[rows, values]`, float32.

        Raises VideoError: unreadable. OutOfMemory.
        """
        begun, self._begun = self._begun, None
        return begun or self._start()

    def close(self) -> None:
        """Reads no further."""
        self._begun = None
        self._open.close()

    def _start(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.damaged = 0
        made = self._make()
        return self._open.enter_context(closing(prefetched(made) if self._threaded else made))

    def _make(self) -> Generator[tuple[int, torch.Tensor], None, None]:
        plan, limits = self.plan, self._limits
        read = self._read(plan.source, plan.sampling.times_s, decoder=plan.decoder, chunk_bytes=self._chunk_bytes)
        with closing(read) as chunks:
            for chunk in self.clock.each("read", chunks):
                self.damaged += chunk.damaged
                with self.clock.stage("preprocess"):
                    patches = patches_of(chunk.frames, plan, limits)
                yield chunk.first + len(chunk.frames), patches


@dataclass(frozen=True)
class Encoding:
    """An input that was encoded, and what that took.

    Attributes:
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
    other_tokens: int = TEXT,
    select: bool = True,
) -> tuple[Encoded | EncodedRows, dict[str, float]]:
    """Encodes a video, and the seconds that each stage was busy.

    Where there is not enough memory after all it begins anew, with half as many units in the tower at a time.

    Args:
        progress: called with "encode", frames done and frames in all, after every chunk; then, where all of the video goes
            through some of the tower's layers together, with "layers", those done and in all.
        rows_of: instead of `vision.encoder.encode_rows`.
        other_tokens: tokens of the prompt beside the input's, of text and of other inputs.
        select: whether tokens are selected, unless the method reads the question.

    Raises VideoError: unreadable. OutOfMemory. ModelError: numbers that are NaN or infinite.
    """
    clock = Clock(engine.device)
    chunk_units, start = fitting_chunk(engine, plan, other_tokens), clock.now()
    while True:
        try:
            with memory_guard("encode"), closing(reader):
                patches = _patches(plan, reader, clock, progress)
                result = _run(engine, plan, patches, chunk_units, progress, rows_of, select)
            break
        except OutOfMemory as problem:
            least = plan.grid[1] * plan.grid[2]
            if problem.stage != "encode" or chunk_units <= least:
                raise
        torch.cuda.empty_cache()  # frees memory that is in pieces; does nothing where there is no CUDA
        chunk_units = max(least, min(chunk_units, plan.encoder.units) // 2)
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
    chunk_units: int,
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
        chunk_units=chunk_units,
        normal=loaded.limits[plan.kind].normal,
        **more,
    )
    return select_tokens(rows) if select and not (engine.method.reads_question and plan.encoder.prunes) else rows

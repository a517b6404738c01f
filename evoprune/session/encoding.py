"""Encoding: frames are read, resized and cut into patches, and become the tokens that the language model reads."""

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from evoprune.backend.devices import empty_cache, to_device
from evoprune.errors import OutOfMemory, memory_guard
from evoprune.methods.plans import keep_tokens
from evoprune.model.cost import Clock
from evoprune.session.engine import Engine
from evoprune.session.planning import TEXT, chunk_bytes, fitting_chunk
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.info import PICTURE
from evoprune.video.plan import InputLimits, Plan
from evoprune.vision.encoded import Encoded, EncodedRows, select_tokens
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import Patches, pixel_patches, resize

if TYPE_CHECKING:
    from evoprune.session.cache import Cache

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


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits, device: torch.device) -> Patches:
    """uint8 `[rows, values]` on `device`: the patches of frames uint8 `[n, height, width, 3]`, resized as planned."""
    resized = to_device(resize(torch.from_numpy(frames), plan.height, plan.width), device)
    pixels = pixel_patches(resized, limits.patch_size, limits.temporal_patch_size, limits.merge_size)
    return Patches(pixels, *limits.normal)


@dataclass(eq=False)
class OpenInput:
    """A video or picture that is being read: its patches, or what the cache has of it. To be encoded once, and closed."""

    engine: Engine
    plan: Plan
    clock: Clock  # adds up the seconds of "read" and "preprocess"
    read: ReadFrames = read_frames  # gives the frames, as `video.frames.read_frames`
    encode_rows: EncodeRows | None = None  # in the place of that of `vision.encoder`
    threaded: bool = True  # whether a thread prepares the next chunks while one is used
    cache: "Cache | None" = None

    def __post_init__(self):
        self.damaged, self._early, self._open = 0, False, ExitStack()
        self._begun: Iterator[tuple[int, Patches]] | None = None

    @cached_property
    def key(self) -> str | None:
        """Of its entry in the cache; None without one."""
        with self.clock.stage("read"):
            return self.cache.key(self.engine, self.plan) if self.cache else None

    @cached_property
    def stored(self) -> Encoded | None:
        """What the cache has."""
        if not self.key:
            return None
        with self.clock.stage("read"):
            return self.cache.load(self.key, self.engine.device)

    def begin(self) -> None:
        """Has the first chunk ready when it returns; a thread goes on to the next two. Raises VideoError. OutOfMemory."""
        self._early = True
        if self.stored is None:
            chunks = self._start()
            self._begun = chain(list(islice(chunks, 1)), chunks)

    def close(self) -> None:
        self._begun = None
        self._open.close()

    def encode(self, progress: Progress | None = None, other_tokens: int = TEXT) -> "Encoding":
        """Reads, preprocesses and encodes it, or takes it from the cache.

        Args:
            progress: called with "encode", frames done and frames in all, after every chunk; then, where all of the video goes
                through some of the tower's layers together, with "layers", those done and in all.
            other_tokens: of the prompt beside the input's, of text and of other inputs.

        Raises VideoError: unreadable. OutOfMemory. ModelError: numbers that are NaN or infinite.
        """
        engine, plan, clock = self.engine, self.plan, Clock(self.engine.device)
        start, earlier = clock.now(), 0.0 if self._early else self.clock.seconds.get("read", 0.0)
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        warnings += plan.info.warnings
        if self.stored:
            result, clock.seconds = self.stored, {"preprocess": 0.0, "encode": 0.0}
        else:
            result = self._encode(clock, progress, other_tokens)
            if self.damaged:  # not stored, or the next run would not warn
                warnings.append("damaged_video")
            # Another file may have been put in its place while it was read.
            elif self.key and self.cache.key(engine, plan) == self.key and not self.cache.store(self.key, result):
                warnings.append("cache_not_written")
        wall = earlier + clock.now() - start
        rows, tokens = (None, result) if isinstance(result, Encoded) else (result, result.nothing_selected())
        wanted = engine.method.acts_at(engine.share) and keep_tokens(engine.share, plan.full.grid) < plan.units
        if plan.kind == PICTURE and rows is None and wanted and len(tokens.kept) == plan.units:
            warnings.append("whole_picture")  # the method keeps at least one whole frame pair
        cache, seconds = "hit" if self.stored else "miss" if self.key else "off", clock.seconds | self.clock.seconds
        return Encoding(plan, tokens, rows, seconds, wall, cache, tuple(warnings), self.damaged)

    def _encode(self, clock: Clock, progress: Progress | None, other_tokens: int) -> Encoded | EncodedRows:
        """The tokens, or the rows where the method reads the question. Writes the seconds of "encode" into `clock`.

        Where there is not enough memory after all it begins anew, with half as many units in the tower at a time.
        """
        plan, loaded = self.plan, self.engine.loaded
        loaded.ready()
        chunk_units, start = fitting_chunk(self.engine, plan, other_tokens), clock.now()
        run, tower = self.encode_rows or encode_rows, loaded.model.model.visual
        how = {"seed": self.engine.seed}
        if progress:
            how["on_layer"] = partial(progress, "layers")
        late = self.engine.method.reads_question and plan.encoder.prunes
        while True:
            try:
                with memory_guard("encode"), closing(self):
                    patches = self._patches(clock, progress)
                    rows = run(tower, patches, plan.encoder, chunk_units=chunk_units, **how)
                    result = rows if late else select_tokens(rows)
                break
            except OutOfMemory as problem:
                least = plan.grid[1] * plan.grid[2]
                if problem.stage != "encode" or chunk_units <= least:
                    raise
            empty_cache()
            chunk_units = max(least, min(chunk_units, plan.encoder.units) // 2)
        clock.seconds["encode"] = clock.now() - start - clock.seconds.pop("wait", 0.0)
        return result

    def _patches(self, clock: Clock, progress: Progress | None) -> Iterator[Patches]:
        begun, self._begun = self._begun, None
        for frames_done, patches in clock.each("wait", begun or self._start()):
            yield patches
            if progress:
                progress("encode", frames_done, self.plan.sampling.frames)

    def _start(self) -> Iterator[tuple[int, Patches]]:
        self.damaged = 0
        made = self._make()
        return self._open.enter_context(closing(prefetched(made) if self.threaded else made))

    def _make(self) -> Generator[tuple[int, Patches], None, None]:
        """For every chunk, how many frames there were up to its end, and its patches `[rows, values]`, uint8."""
        plan, limits = self.plan, self.engine.loaded.limits[self.plan.kind]
        size = chunk_bytes(self.engine, plan)
        with closing(self.read(plan.source, plan.sampling.times_s, decoder=plan.decoder, chunk_bytes=size)) as chunks:
            for chunk in self.clock.each("read", chunks):
                self.damaged += chunk.damaged
                with self.clock.stage("preprocess"):
                    patches = patches_of(chunk.frames, plan, limits, self.engine.device)
                yield chunk.first + len(chunk.frames), patches


@dataclass(frozen=True)
class Encoding:
    """An input that was encoded, and what that took."""

    plan: Plan
    tokens: Encoded  # what the language model reads; none where a question is to come first
    rows: EncodedRows | None  # where the method selects tokens for each question, what it selects from
    seconds: dict[str, float]  # how long each stage was busy: "read", "preprocess" and "encode"
    wall_seconds: float  # from the start of reading to the end of encoding
    cache: str  # "hit" (from disk), "miss" (encoded, then stored) or "off"
    warnings: tuple[str, ...]  # names, as in reports
    damaged: int  # packets that could not be decoded

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

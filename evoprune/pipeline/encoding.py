"""A video on its way through the first stages: read, preprocess, encode."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING

import torch

from evoprune.errors import LESS, OutOfMemory
from evoprune.model.clock import Clock
from evoprune.model.memory import memory_guard, shortage, working_memory
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.cache import Cache, entry_key
from evoprune.pipeline.prefetch import ahead
from evoprune.pruning.budget import keep_count
from evoprune.video.decode import FrameChunk, read_frames
from evoprune.video.plan import Plan
from evoprune.video.probe import VideoInfo
from evoprune.vision.devices import units_at_a_time
from evoprune.vision.encoded import Encoded
from evoprune.vision.encoder import Unchosen, choose, encode_rows
from evoprune.vision.preprocess import patchify, resize
from evoprune.vision.tower import tower_shape

if TYPE_CHECKING:
    from evoprune.pipeline.video_qa import VideoQA

CHUNK_BYTES = 64 * 2**20  # frames as decoded, held at a time
TEXT = 64  # tokens of a prompt around the video, roughly
Progress = Callable[[str, int, int], None]  # "encode", frames done, in all; then perhaps "layers", of the tower


class PreparedVideo:
    """A video of which it is known what will be looked at: `encode` looks, once. To be closed.

    Attributes:
        full: what would be looked at with nothing pruned. `plan`: what will be; `keep` of its visual tokens are kept.
    """

    def __init__(
        self,
        qa: "VideoQA",
        info: VideoInfo,
        decoder: str,
        full: Plan,
        host: Clock,
        *,
        name: str | None,
        overlap: bool,
        cache: Cache | None,
        read: Callable[..., Iterator[FrameChunk]],
        tower: Callable[..., Unchosen] | None,
    ):
        keep = keep_count(qa.budget, full.visual_tokens)
        self.qa, self.info, self.decoder, self.full = qa, info, decoder, full
        self.plan = full.shrunk(qa.method.plan(full.grid, keep), qa.loaded.video)
        self.keep = min(keep, self.plan.visual_tokens)
        self._name, self._overlap, self._read, self._tower = name or info.path, overlap, read, tower
        self._cache = cache if read is read_frames and not qa.method.reads_question else None
        self._host, self._wall, self._begun = host, host.seconds["read"], False
        self._key: str | None = None
        self._cached: Encoded | None = None
        self._pieces: Iterator[tuple[int, torch.Tensor]] | None = None
        self._open = ExitStack()
        self._damaged = 0

    def begin(self) -> None:
        """Has the first chunk ready when it returns, and a thread go on to the next two; or what the cache holds.

        For whoever does something else meanwhile: what the clock on the wall says counts from `encode` on.

        Raises:
            VideoError: unreadable. OutOfMemory.
        """
        self._begun, self._wall = True, 0.0
        self._look_up()
        if self._cached is None:
            pieces = self._prepared()
            self._pieces = chain(list(islice(pieces, 1)), pieces)

    def close(self) -> None:
        """Reads no further."""
        self._pieces = None
        self._open.close()

    def encode(
        self, *, progress: Progress | None = None, on_encode: Callable[[Plan], None] | None = None
    ) -> EncodedVideo:
        """Arguments and errors as `VideoQA.encode`."""
        qa, clock = self.qa, Clock(self.qa.loaded.model.model.visual.patch_embed.proj.weight.device)
        begun = clock.now() - self._wall
        if not self._begun:
            self._look_up()
        encoded, found = self._cached, "hit" if self._cached else "miss" if self._key else "off"
        warnings = ["cut_short"] if self.info.cut_short and self.plan.sampling.end_s == self.info.duration_s else []
        if encoded:
            clock.seconds = {"read": 0.0, "preprocess": 0.0, "encode": 0.0} | self._host.seconds
        else:
            asked = clock.now()
            if on_encode:
                on_encode(self.full)
            begun += clock.now() - asked  # the caller's time is no part of the work
            encoded = self._encode(clock, progress)
            if self._damaged:  # it is not kept, or the warning would be lost
                warnings.append("damaged_video")
            elif self._key and not self._cache.store(self._key, encoded):
                warnings.append("cache_not_written")
        wall = clock.now() - begun
        info, units = replace(self.info, path=self._name), self.full.visual_tokens
        return EncodedVideo(
            qa, info, self.decoder, self.plan, units, encoded, clock, wall, found, warnings, self._damaged
        )

    def _look_up(self) -> None:
        if not self._cache:
            return
        qa = self.qa
        with self._host.stage("read"):
            self._key = entry_key(self.info.path, qa.loaded, self.plan, self.decoder, qa.method, self.keep, qa.seed)
            self._cached = self._cache.load(self._key, qa.loaded.model.device) if self._key else None

    def _prepared(self) -> Iterator[tuple[int, torch.Tensor]]:
        """For every chunk, how many frames there were up to its end, and its patches. `close` ends it."""
        limits, plan, host = self.qa.loaded.video, self.plan, self._host
        # No more frames at a time than the encoder takes, and no more bytes than a few large frames.
        grids = -(-units_at_a_time(self.qa.loaded.model.device) // (plan.grid[1] * plan.grid[2]))
        chunk_bytes = min(CHUNK_BYTES, grids * limits.temporal_patch_size * self.info.width * self.info.height * 3)

        def prepare() -> Generator[tuple[int, torch.Tensor], None, None]:
            read = self._read(self.info, plan.sampling.times_s, decoder=self.decoder, chunk_bytes=chunk_bytes)
            with closing(read) as chunks:
                for chunk in host.each("read", chunks):
                    self._damaged += chunk.damaged
                    with host.stage("preprocess"):
                        small = resize(torch.from_numpy(chunk.frames), plan.height, plan.width)
                        piece = patchify(
                            small,
                            limits.image_mean,
                            limits.image_std,
                            limits.patch_size,
                            limits.temporal_patch_size,
                            limits.merge_size,
                        )
                    yield chunk.first + len(chunk.frames), piece

        return self._open.enter_context(closing(ahead(prepare()) if self._overlap else prepare()))

    def _encode(self, clock: Clock, progress: Progress | None) -> Encoded | Unchosen:
        """The stages from reading to encoding; `clock` gets the seconds of all. Who reads the question has still to choose.

        Where there is not enough memory after all the video is begun anew, with half as much of it in the tower at a time.
        """
        at_once, start = self._at_once(), clock.now()
        while True:
            try:
                encoded = self._try_to_encode(clock, progress, at_once)
                break
            except OutOfMemory as problem:
                if problem.stage != "encode" or at_once <= self._least:
                    raise
            torch.cuda.empty_cache()  # what is free, but in pieces; nothing where there is no CUDA
            at_once, self._damaged = max(self._least, at_once // 2), 0
        clock.seconds["encode"] = clock.now() - start - clock.seconds.pop("wait", 0.0)
        clock.seconds |= self._host.seconds
        return encoded

    @property
    def _least(self) -> int:
        """Units of a block: the tower takes no fewer at a time."""
        method, (_, height, width) = self.qa.method, self.plan.grid
        block = method.block if method.merges(self.keep / self.plan.visual_tokens) else 1
        return block * height * width

    @property
    def _late(self) -> int:
        """Rows that are chosen inside the tower, at most; 0 where none are."""
        method, units = self.qa.method, self.plan.visual_tokens
        budget = self.keep / units
        if (
            not method.merges(budget)
            or method.narrows_after(tower_shape(self.qa.loaded.model.model.visual), budget) is None
        ):
            return 0
        return min(units, max(self.keep, round(method.encoder_share(budget) * units)))

    def _at_once(self) -> int:
        """How many units to encode at a time: fewer than is usual here where memory is short.

        Raises:
            OutOfMemory: there is not enough even for a block, or for the prompt.
        """
        model, plan, least = self.qa.loaded.model, self.plan, self._least
        at_once = units_at_a_time(model.device)
        sizes = self.keep + TEXT, model.dtype.itemsize, self._late
        while short := shortage(
            working_memory(model.config, plan.visual_tokens, max(least, at_once), *sizes), str(model.device)
        ):
            if at_once <= least:
                size = f"{plan.sampling.frames} frames of {plan.width}x{plan.height} pixels, {self.keep:,} visual tokens kept"
                raise OutOfMemory(f"{self._name} {short}: {size}", LESS, stage="encode")
            at_once = max(least, at_once // 2)
        return at_once

    def _try_to_encode(self, clock: Clock, progress: Progress | None, at_once: int) -> Encoded | Unchosen:
        qa, plan = self.qa, self.plan

        def patches() -> Iterator[torch.Tensor]:
            for frames_done, piece in clock.each("wait", self._pieces or self._prepared()):
                yield piece
                if progress:
                    progress("encode", frames_done, plan.sampling.frames)

        with memory_guard("encode"), closing(self):
            told = {"on_layer": lambda done, total: progress("layers", done, total)} if progress else {}
            rows = (self._tower or encode_rows)(
                qa.loaded.model.model.visual,
                patches(),
                plan.grid,
                qa.method,
                self.keep,
                seconds_per_grid=plan.sampling.seconds_per_grid(qa.loaded.video.temporal_patch_size),
                seed=qa.seed,
                chunk_units=at_once,
                **told,
            )
            return rows if qa.method.reads_question else choose(rows)

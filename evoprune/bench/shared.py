"""What the variants of one evaluated video share: its frames, and the encoder's rows where they give the tower the same work."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch

from evoprune.methods.plans import EncoderPlan, SetAside
from evoprune.model.cost import Clock
from evoprune.session.encoding import OpenInput
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.info import Video
from evoprune.vision.encoder import EncodedRows, encode_rows

# Encodings held: enough for the selectors behind `reuse`, which need attention, keys, both or nothing, at three budgets, whatever
# other methods run between them.
MAX_ENCODINGS = 32


class SharedFrames:
    def __init__(self):
        self._held: dict[tuple, list[FrameChunk]] = {}

    def read(self, info: Video, times_s: Sequence[float], **options) -> Iterator[FrameChunk]:
        """As `read_frames`. Frames that come in several chunks are too large to hold, and are read again each time."""
        key = (tuple(times_s), *sorted(options.items()))
        if key in self._held:
            yield from self._held[key]
            return
        chunks = []
        with closing(read_frames(info, times_s, **options)) as read:
            for chunk in read:
                chunks = [*chunks, chunk][:2]
                yield chunk
        if len(chunks) == 1:
            self._held[key] = chunks


class SharedRows:
    """The tower's rows of one video in one model. Methods that act after the encoder differ only in what they select.

    `saved` is the seconds that the latest call would have taken more if its rows had not been there.
    """

    def __init__(self):
        self.saved = 0.0
        self._held: OrderedDict[tuple, tuple[EncodedRows, float]] = OrderedDict()

    def encode_rows(self, visual, patches: Iterable[torch.Tensor], plan: EncoderPlan, **options) -> EncodedRows:
        """As `vision.encoder.encode_rows`."""
        key = (_tower_work(plan), *sorted((name, value) for name, value in options.items() if name != "on_layer"))
        if key in self._held:
            for _ in patches:  # the reader of the patches counts damaged frames
                pass
            self._held.move_to_end(key)
            rows, self.saved = self._held[key]
        else:
            clock, self.saved = Clock(visual.patch_embed.proj.weight.device), 0.0
            start = clock.now()
            rows = encode_rows(visual, clock.each("wait", patches), plan, **options)
            self._held[key] = rows, clock.now() - start - clock.seconds["wait"]
            if len(self._held) > MAX_ENCODINGS:
                self._held.popitem(last=False)
        return replace(rows, plan=plan, timer=rows.timer.copy())  # each caller adds its own times


@dataclass(eq=False)
class SharedInput(OpenInput):
    """An input with shared frames, and shared rows if there are any."""

    shared_frames: SharedFrames
    shared_rows: SharedRows | None = None

    def frames(self, chunk_bytes: int) -> Iterator[FrameChunk]:
        plan = self.plan
        given = plan.source, plan.sampling.times_s
        return self.shared_frames.read(*given, decoder=plan.decoder, chunk_bytes=chunk_bytes)

    def rows(self, patches: Iterator[torch.Tensor], **options) -> EncodedRows:
        if self.shared_rows is None:
            return super().rows(patches, **options)
        visual = self.session.loaded.model.model.visual
        return self.shared_rows.encode_rows(visual, patches, self.plan.encoder, **options)


class GreyInput(OpenInput):
    """Every frame is grey: the size and the length of a video without its content."""

    def frames(self, chunk_bytes: int) -> Iterator[FrameChunk]:
        source, times_s = self.plan.source, self.plan.sampling.times_s
        at_once = max(2, chunk_bytes // (source.width * source.height * 3) // 2 * 2)
        for first in range(0, len(times_s), at_once):
            times = tuple(times_s[first : first + at_once])
            yield FrameChunk(first, np.full((len(times), source.height, source.width, 3), 128, np.uint8), times)


def _tower_work(plan: EncoderPlan) -> tuple:
    """What the tower's rows depend on: everything if tokens may be selected inside, else what is collected."""
    inside = plan.stages[:-1] if plan.token_stage else plan.stages
    if any(not isinstance(stage.reduce, SetAside) for stage in inside):
        return (plan,)
    needs = plan.token_stage.selector.needs if plan.token_stage else frozenset()
    return plan.grid, plan.reuse, inside, needs, plan.prunes

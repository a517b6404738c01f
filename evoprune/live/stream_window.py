"""A window of a stream, encoded as a short video is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor, prod

import numpy as np
import torch

from evoprune.language.prompt import timestamps
from evoprune.live.stream_memory import Unread, columns_of, staying_order
from evoprune.methods.plans import keep_count
from evoprune.model.cost import Clock
from evoprune.session.encoding import Encoding, OpenInput
from evoprune.session.engine import Engine
from evoprune.video.frames import FrameChunk
from evoprune.video.plan import Plan
from evoprune.video.sampling import SamplingPlan
from evoprune.vision.encoded import EncodedRows
from evoprune.vision.encoder import encode_rows
from evoprune.vision.segments import NothingNew, Segment
from evoprune.vision.tower import tower_shape


@dataclass(frozen=True)
class EncodedWindow:
    """A window of so many `frames`, which ends before slot `end`. `segment`: what the next one is."""

    frames: int
    end: int
    encoding: Encoding
    unread: Unread
    segment: Segment


def encode_window(
    engine: Engine,
    base: Plan,
    origin_s: float,
    slots: Sequence[int],
    frames: Sequence[np.ndarray],
    span: range,
    segment: Segment,
    following: int,
    pause: Callable[[], None],
) -> EncodedWindow:
    """Encodes the `frames` of a window, each of which is that of a slot, a step of the stream's rate.

    Args:
        base: of a full window. `origin_s`: the time of slot 0. `span`: all slots of the window, with a frame or without.
        segment: what it takes over from the window before, which is left as it is. `following`: the position after that window.
        pause: called before each layer of the encoder.
    """
    count, step_s = len(frames), base.sampling.seconds_per_frame
    if count % 2:  # as Hugging Face fills up an odd number
        slots, frames = [*slots, slots[-1]], [*frames, frames[-1]]
    plan = _plan(engine, base, origin_s, slots, span)
    encoding, order, left = _encode(engine, plan, np.stack(frames), Segment(segment.earlier), pause)
    config = engine.loaded.model.config.vision_config
    times = timestamps([(slot + 0.5) * step_s for slot in slots]) if config.traits.timestamps else []
    step = 2 * step_s * config.tokens_per_second if config.tokens_per_second else 1.0
    at = [floor(slot / 2 * step) for slot in slots[::2]]
    unread = columns_of(engine.loaded, encoding.tokens, order, plan.sampling, at, times, following)
    return EncodedWindow(count, span.stop, encoding, unread, left)


def _plan(engine: Engine, base: Plan, origin_s: float, slots: Sequence[int], span: range) -> Plan:
    grid = len(slots) // 2, *base.grid[1:]
    keep = keep_count(engine.share, prod(grid))
    encoder = engine.method.plan(tower_shape(engine.loaded.model.model.visual), grid, keep)
    start_s, end_s, *times = (
        origin_s + slot * base.sampling.seconds_per_frame for slot in (span.start, span.stop, *slots)
    )
    sampling = SamplingPlan(start_s, end_s, tuple(times), base.sampling.wanted)
    return replace(base, sampling=sampling, grid=grid, encoder=encoder, unshrunk=None, limited=False)


def _encode(
    engine: Engine, plan: Plan, frames: np.ndarray, segment: Segment, pause: Callable[[], None]
) -> tuple[Encoding, torch.Tensor, Segment]:
    """A window, encoded as a segment of a file, the order in which its tokens stay, and what the next segment is."""
    made = []

    def read(source, times_s, **_) -> Iterator[FrameChunk]:
        yield FrameChunk(0, frames, tuple(times_s))

    def rows_of(*given, **how) -> EncodedRows:
        made.append(encode_rows(*given, **how, pause=pause, segment=segment))
        return made[-1]

    try:
        encoding = OpenInput(engine, plan, Clock(torch.device("cpu")), read, rows_of, threaded=False).encode()
    except NothingNew:  # then all of it is encoded anew
        return _encode(engine, plan, frames, Segment(), pause)
    return encoding, staying_order(made[-1], encoding.tokens), Segment(segment.left)

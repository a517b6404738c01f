"""Live video: frames are fed as they come, and questions about what was seen are asked at any time.

Frames are collected in windows of time. A finished window is encoded as a short video is, and its tokens are read into the KV cache
at once, so that a question costs its own text. Its columns are cut off again when the answer has ended. For the model all windows
are one video: a token has the position of its frame pair by Qwen's rule, counted from the first frame of the stream.

The newest half of the memory is whole, windows before it are thinned (stream_memory.py). What is left keeps its position. Before
positions leave the range that the model knows, keys are rotated back, so that the video begins at the oldest window that is left.

What has not changed since the window before is not encoded again, but may become a token of each window (vision/segments.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from math import floor, prod
from threading import RLock

import numpy as np
import torch

from evoprune.errors import UsageError, names_plugins
from evoprune.language.generate import PrefillState, embed_ids, prefill
from evoprune.language.prompt import build_prompt, timestamps
from evoprune.model.cost import Clock
from evoprune.model.machine import end_team
from evoprune.pipeline.answering import Askable
from evoprune.pipeline.encoding import Encoding, OpenInput
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.fill_report import inputs_report
from evoprune.pipeline.options import GenerationOptions, SamplingOptions, StreamOptions
from evoprune.pipeline.planning import check_carried, plan_input
from evoprune.pipeline.prompting import check_context, check_memory, check_question
from evoprune.pipeline.stream_memory import Seen, StreamMemory, Unread, columns_of, staying_order
from evoprune.pipeline.turns import Turns
from evoprune.pruning.budget import keep_count
from evoprune.pruning.indices import ascending
from evoprune.report.records import Report, TokenCounts
from evoprune.video.frames import FrameChunk, check_frame
from evoprune.video.info import VIDEO, Video
from evoprune.video.plan import Plan
from evoprune.video.sampling import SamplingPlan
from evoprune.vision.encoded import EncodedRows
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import resize
from evoprune.vision.segments import NothingNew, Segment
from evoprune.vision.tower import tower_shape

CONTEXT = 32_768  # positions of a model that states no context
ROOM = 0.75  # share of the context that the video may take; the rest is for questions and answers
WAITING = 4  # windows that wait for an answer to be read to its end


class _Overtaken(Exception):
    """A question goes first: a window is read later."""


class VideoStream(Askable):
    """A stream of frames that can be asked about: made by `VideoQA.stream`, closed by `with`.

    One thread feeds frames, others may ask meanwhile: the encoder waits while a question is read, and goes on layer by layer while
    the answer is generated. A window that is finished during an answer, or interrupted by a question, is read after it.
    Whatever feeds the frames sets `skipped` and `lag_s`, which `seen` says of the source, and `facts`, fields of its `Video`.
    `encoded`: how many windows were.

    Raises UsageError: the method reads the question, changes the input, or acts inside the language model.
    """

    OVERTAKEN = "another question was asked meanwhile, or the stream went on for too long"

    def __init__(
        self, engine: Engine, options: "StreamOptions", sampling: "SamplingOptions", system: str | None, name: str
    ):
        super().__init__(engine)
        self._lock, method = Turns(), engine.method
        if method.reads_question or method.language or method.input:
            hint = "take one that acts inside the encoder or selects tokens without the question, such as evoprune"
            raise UsageError(f"method {engine.options.method} cannot prune a stream", hint)
        self._options, self._sampling, self._system, self._name = options, sampling, system, name
        self._paid, self._feeding = True, RLock()  # encoding is no question's
        self.skipped, self.lag_s, self.facts, self.encoded = 0, None, {}, 0
        self._plan: Plan | None = None
        self._slots, self._frames = [], []
        self._origin_s = self._last_s = 0.0
        self._memory: StreamMemory | None = None
        self._waiting: list[Unread] = []
        self._following = 0  # position after the latest window, counted from the beginning of the stream
        self._latest, self._segment = None, Segment()  # the encoding of the latest window; what the next one is
        self._count = self._done = 0  # frames that were looked at; the slot after the last finished window
        self._open: int | None = None  # the number of the answer that is being read
        self._problem: str | None = None

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *problem) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<VideoStream {self._name!r}: {self.seen or 'nothing seen'}>"

    @property
    def seen(self) -> Seen | None:
        """What the next question is about; None before the first window is read. Waits for nothing."""
        return self._memory and self._memory.seen(self._count, self.skipped, self.lag_s)

    @property
    def report(self) -> Report:
        """Of its latest window; it describes no answer."""
        return self._blank_report()

    def add(self, frame: np.ndarray, time_s: float) -> bool:
        """Feeds a frame. If it is the first one of another window, the window before is encoded and read first.

        Args:
            frame: uint8 `[H, W, 3]`, RGB. The size of the first one decides what the model sees; others are scaled to it.
            time_s: when it was taken, in seconds from anywhere, not before the frame before it.

        Returns whether it is looked at: frames that come faster than the stream's rate are not.

        Raises UsageError: no such array, a time that goes back, or a closed stream. OutOfMemory. ModelError.
        """
        with self._feeding:
            self._check_open()
            check_frame(frame, time_s)
            if self._plan is None:
                self._begin(frame, time_s)
            if time_s < self._last_s:
                raise UsageError(f"a frame of {time_s:g} s comes after one of {self._last_s:g} s", "feed them in order")
            self._last_s = time_s
            slot = floor((time_s - self._origin_s) / self.step_s + 1e-6)
            size = self._plan.sampling.frames
            if self._slots and slot // size > self._slots[-1] // size:
                self._finish((self._slots[-1] // size + 1) * size)
            if slot < self._done or (self._slots and slot <= self._slots[-1]):
                return False
            self._slots.append(slot)
            self._frames.append(self.scaled(frame))
            self._count += 1
            if slot % size == size - 1:
                self._finish(slot + 1)
            return True

    def scaled(self, frame: np.ndarray) -> np.ndarray:
        """A frame of its own as the encoder reads it, which `add` takes too; of any size before the first one was added."""
        if self._plan is None:
            return frame
        pixels = torch.from_numpy(np.ascontiguousarray(frame))[None]
        return resize(pixels, self._plan.height, self._plan.width)[0].clone().numpy()

    def flush(self) -> None:
        """Encodes and reads the frames of the unfinished window, which then ends here. Raises as `add`."""
        with self._feeding:
            self._check_open()
            if self._slots:
                self._finish(self._slots[-1] + 1)

    def catch_up(self) -> None:
        """Reads windows that waited for an answer to end; to be called now and then where no frame comes. Raises as `add`."""
        if self._waiting:
            with self._feeding, self._lock.lock:
                if self._open is None:
                    self._read_waiting(polite=True)

    def close(self) -> None:
        """Frees the memory. An answer that is being read ends."""
        self._problem = self._problem or "the stream is closed"  # which ends what is being encoded
        with self._feeding, self._lock.lock:
            self._turn += 1
            self._memory, self._latest, self._segment = None, None, None
            self._waiting, self._slots, self._frames = [], [], []

    @property
    def step_s(self) -> float | None:
        """Seconds from one frame that is looked at to the next; None before the first one."""
        return self._plan and self._plan.sampling.seconds_per_frame

    @names_plugins()
    def _begin(self, frame: np.ndarray, time_s: float) -> None:
        """Plans a window as a video of its length, and reads what precedes the video in the prompt, which packs weights."""
        height, width, _ = frame.shape
        window = Video(
            self._name, self._options.window_s, width, height, 0, "raw", None, "stream", None, None, None, 0.0
        )
        self._plan = plan_input(self._engine, replace(window, **self.facts), self._sampling, self._name)
        self._origin_s = self._last_s = time_s
        try:
            if self._limit < 2 * self._plan.encoder.keep:
                problem = f"a memory of {self._limit:,} tokens is less than two windows of {self._plan.encoder.keep:,}"
                raise UsageError(problem, "a longer memory, shorter windows (window_s, --window) or a lower budget")
            check_carried(self._engine, self._plan)
            loaded, head = self._engine.loaded, self._around("?")[0]
            room = loaded.demo.span if loaded.demo else self._room
            with self._lock.lock:
                self._memory = StreamMemory(loaded.model, head, self._limit, self._plan.encoder.keep, room)
        except BaseException:
            self._plan = None
            raise

    @property
    def _limit(self) -> int:
        """The largest number of visual tokens that are held."""
        most, options = self._plan.encoder.keep, self._options
        wanted = options.memory_tokens or floor(options.memory_s / options.window_s * most)
        return min(wanted, self._room)

    @property
    def _room(self) -> int:
        """Positions, and tokens, that a video may take by the model's context."""
        return floor(ROOM * (self._engine.loaded.model.config.text_config.max_position_embeddings or CONTEXT))

    @names_plugins()
    def _finish(self, end: int) -> None:
        """Encodes the frames of a window that ends before slot `end`, and reads it unless an answer is being read."""
        slots, frames = self._slots, self._frames
        first = max(self._done, slots[0] // self._plan.sampling.frames * self._plan.sampling.frames)
        self._slots, self._frames, self._done = [], [], end
        if len(frames) % 2:  # as Hugging Face fills up an odd number
            slots, frames = [*slots, slots[-1]], [*frames, frames[-1]]
        plan = self._window_plan(slots, first, end)
        encoding, order = self._encode(plan, np.stack(frames))
        config = self._engine.loaded.model.config.vision_config
        times = timestamps([(slot + 0.5) * self.step_s for slot in slots]) if config.traits.timestamps else []
        step = 2 * self.step_s * config.tokens_per_second if config.tokens_per_second else 1.0
        at = [floor(slot / 2 * step) for slot in slots[::2]]
        unread = columns_of(self._engine.loaded, encoding.tokens, order, plan.sampling, at, times, self._following)
        self._following = int(unread.last.max()) + 1
        with self._lock.lock:
            self._check_open()
            self._waiting.append(unread)
            self._latest, self.encoded = encoding, self.encoded + 1
            if self._open is not None and len(self._waiting) > WAITING:
                self._turn, self._open, self._lock.generating = self._turn + 1, None, False
            if self._open is None:
                self._read_waiting(polite=len(self._waiting) <= WAITING)

    def _window_plan(self, slots: Sequence[int], first: int, end: int) -> Plan:
        """The plan of a window from slot `first` to `end`, of which these slots have a frame."""
        base, engine = self._plan, self._engine
        grid = len(slots) // 2, *base.grid[1:]
        keep = keep_count(engine.share, prod(grid))
        encoder = engine.method.plan(tower_shape(engine.loaded.model.model.visual), grid, keep)
        start_s, end_s, *times = (self._origin_s + slot * self.step_s for slot in (first, end, *slots))
        sampling = SamplingPlan(start_s, end_s, tuple(times), base.sampling.wanted)
        return replace(base, sampling=sampling, grid=grid, encoder=encoder, unshrunk=None, limited=False)

    def _encode(self, plan: Plan, frames: np.ndarray) -> tuple[Encoding, torch.Tensor]:
        """A window, encoded as a segment of a file, and the order in which its tokens stay."""
        made, segment = [], self._segment

        def read(source, times_s, **_) -> Iterator[FrameChunk]:
            yield FrameChunk(0, frames, tuple(times_s))

        def pause() -> None:
            self._lock.pause()
            self._check_open()

        def rows_of(*given, **how) -> EncodedRows:
            made.append(encode_rows(*given, **how, pause=pause, segment=segment))
            return made[-1]

        try:
            opened = OpenInput(self._engine, plan, Clock(torch.device("cpu")), read, rows_of, threaded=False)
            encoding = opened.encode()
        except NothingNew:  # then all of it is encoded anew
            self._segment = Segment()
            return self._encode(plan, frames)
        self._segment = Segment(segment.left)
        return encoding, staying_order(made[-1], encoding.tokens)

    def _read_waiting(self, polite: bool = False) -> None:
        """Reads the windows that wait; with `polite`, none that a question would have to wait for."""
        self._memory.cache.crop(self._memory.columns)
        while self._waiting:
            try:
                self._memory.read(self._waiting[0], self._give_way if polite else lambda: None)
            except _Overtaken:
                return
            except BaseException:  # also Ctrl-C: the cache may be half changed
                self._problem = "reading a window was broken off"
                raise
            self._waiting.pop(0)

    def _give_way(self) -> None:
        if self._lock.wanted or self._problem:
            raise _Overtaken

    def _check_open(self) -> None:
        if self._problem:
            raise UsageError(self._problem, "begin another one: VideoQA.stream()")

    def _around(self, question: str) -> tuple[torch.Tensor, torch.Tensor]:
        """int64: the ids of a prompt before the video and after it."""
        loaded = self._engine.loaded
        times = [[""]] if loaded.model.config.vision_config.traits.timestamps else ()  # markers go with the frame pairs
        prompt = build_prompt(loaded.tokenizer, question, [(VIDEO, 1)], system=self._system, times=times)
        (video,) = prompt.places[0].around or prompt.places[0].runs
        return prompt.input_ids[: video.start], prompt.input_ids[video.stop :]

    def _blank_report(self) -> Report:
        self._check_open()
        if self._latest is None:
            self.flush()
        with self._lock:
            if self._latest is None:
                raise UsageError("nothing was seen yet", "feed frames first: add(frame, time_s)")
            if self.seen is None:
                self._read_waiting()
            report = inputs_report(self._engine, [self._latest])
            report.stream, report.video.duration_s = asdict(self.seen), self.seen.end_s
            return report

    @torch.inference_mode()
    def _read(self, question: str, options: GenerationOptions, report: Report, clock: Clock) -> PrefillState:
        self._check_open()
        if options.system not in (None, self._system):
            raise UsageError("the system prompt was read when the stream began", "give it to VideoQA.stream()")
        loaded = self._engine.loaded
        with clock.stage("prefill"):
            if self._feeding.acquire(blocking=False):  # else a thread feeds, and reads what waits after the answer
                self._feeding.release()
                self._read_waiting()
            elif self.seen is None:
                self._read_waiting()
            check_question(loaded, question)
            ids, seen, memory = self._around(question)[1], self.seen, self._memory
            memory.cache.crop(memory.columns)
            text = memory.columns - seen.tokens + len(ids)
            check_context(loaded, text, seen.tokens, options.max_new_tokens)
            check_memory(self._engine, text, seen.tokens)
            report.tokens, report.stream = TokenCounts(text, seen.tokens, text + seen.tokens, 0), asdict(seen)
            positions = (ascending(len(ids), "cpu") + memory.following).expand(3, -1)
            following = memory.following + len(ids)
            state = prefill(loaded.model, embed_ids(loaded.model, ids), positions, following, memory.cache)
        self._open, self._lock.generating = self._turn, True
        return state

    def _ended(self, turn: int) -> None:
        end_team()  # the encoder computes in another thread
        if self._open == turn:
            self._open, self._lock.generating = None, False

"""Live video: frames are fed as they come, and questions about what was seen are asked at any time.

Frames are collected in windows of time. A finished window is encoded as a short video is, and its tokens are read into the KV cache
at once. A question also sees the frames of the unfinished window, which are encoded for it. What is read for a question is cut off
again when the answer has ended. For the model all windows are one video: a token has the position of its frame pair by Qwen's rule,
counted from the first frame of the stream.

The newest half of the memory is whole, windows before it are thinned (stream_memory.py). What is left keeps its position. Before
positions leave the range that the model knows, keys are rotated back, so that the video begins at the oldest window that is left.

What has not changed since the window before is not encoded again, but may become a token of each window (vision/segments.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import floor
from threading import Lock, RLock

import numpy as np
import torch

from evoprune.cpu.machine import end_team
from evoprune.errors import UsageError, names_plugins
from evoprune.language.generate import PrefillState, embed_ids, prefill
from evoprune.language.prompt import build_prompt
from evoprune.live.stream_memory import Seen, StreamMemory, Unread
from evoprune.live.stream_window import EncodedWindow, encode_window
from evoprune.live.turns import Turns
from evoprune.methods.types import ascending
from evoprune.model.cost import Clock
from evoprune.report.records import Report, TokenCounts
from evoprune.session.answering import Askable
from evoprune.session.encoding import Encoding
from evoprune.session.engine import Engine
from evoprune.session.fill_report import inputs_report
from evoprune.session.options import GenerationOptions, SamplingOptions, StreamOptions
from evoprune.session.planning import check_carried, plan_input
from evoprune.session.prompting import check_context, check_memory, check_question
from evoprune.video.frames import check_frame
from evoprune.video.info import VIDEO, Video
from evoprune.video.plan import Plan
from evoprune.vision.preprocess import resize
from evoprune.vision.segments import Segment

CONTEXT = 32_768  # positions of a model that states no context
ROOM = 0.75  # share of the context that the video may take; the rest is for questions and answers
WAITING = 4  # windows that wait for an answer to be read to its end


class _Overtaken(Exception):
    """A question goes first: a window is read later."""


class VideoStream(Askable):
    """A stream of frames that can be asked about: made by `VideoQA.stream`, closed by `with`.

    One thread feeds frames, others may ask meanwhile: a question waits for the window that is being encoded, the encoder waits
    while the question is read, and goes on layer by layer while the answer is generated. A window that is finished during an
    answer, or interrupted by a question, is read after it.
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
        self._paid = True  # encoding is no question's, but for the unfinished window
        self._gate, self._feeding = Lock(), RLock()
        self.skipped, self.lag_s, self.facts, self.encoded = 0, None, {}, 0
        self._plan: Plan | None = None
        self._slots, self._frames = [], []
        self._origin_s = self._last_s = 0.0
        self._memory: StreamMemory | None = None
        self._waiting: list[Unread] = []
        self._following = 0  # position after the latest window, counted from the beginning of the stream
        self._latest, self._segment = None, Segment()  # the encoding of the latest window; what the next one is
        self._unfinished: EncodedWindow | None = None  # as the latest question saw it
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
        """The finished windows that were read; None before the first one. Waits for nothing."""
        return self._memory and self._seen(())

    @property
    def until_s(self) -> float | None:
        """Up to which time a question sees, as `seen.end_s` where no window is unfinished. Waits for nothing."""
        if slots := self._slots:
            return self._origin_s + (slots[-1] + 1) * self.step_s
        return self.seen and self.seen.end_s

    @property
    def report(self) -> Report:
        """Of its latest window, the unfinished one before the first was finished; it describes no answer."""
        return self._report(self._latest or self._look() or self._latest)  # it may have been finished meanwhile

    def add(self, frame: np.ndarray, time_s: float) -> bool:
        """Feeds a frame. If it is the first one of another window, the window before is encoded and read first.

        Args:
            frame: uint8 `[H, W, 3]`, RGB. The size of the first one decides what the model sees; others are scaled to it.
            time_s: when it was taken, in seconds from anywhere, not before the frame before it.

        Returns whether it is looked at: frames that come faster than the stream's rate are not.

        Raises UsageError: no such array, a time that goes back, or a closed stream. OutOfMemory. ModelError.
        """
        with self._gate:  # or this thread would come before a question that waits
            pass
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
            self._memory, self._latest, self._segment, self._unfinished = None, None, None, None
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
        slots, frames, done, window = self._slots, self._frames, self._done, self._unfinished
        self._slots, self._frames, self._done = [], [], end
        if not (window and (window.frames, window.end) == (len(slots), end)):
            window = self._encode(slots, frames, done, end, self._pause)
        self._segment, self._following = window.segment, int(window.unread.last.max()) + 1
        with self._lock.lock:
            self._check_open()
            self._waiting.append(window.unread)
            self._latest, self._unfinished, self.encoded = window.encoding, None, self.encoded + 1
            if self._open is not None and len(self._waiting) > WAITING:
                self._turn, self._open, self._lock.generating = self._turn + 1, None, False
            if self._open is None:
                self._read_waiting(polite=len(self._waiting) <= WAITING)

    @names_plugins()
    def _look(self) -> Encoding | None:
        """Encodes the frames of the unfinished window for a question, unless the latest one saw the same; None for no frames."""
        with self._gate, self._feeding:
            self._check_open()
            if not self._slots:
                return None
            frames, end, window = len(self._slots), self._slots[-1] + 1, self._unfinished
            if not (window and (window.frames, window.end) == (frames, end)):
                window = self._encode(self._slots, self._frames, self._done, end, self._check_open)
                self._spent = dict(window.encoding.seconds), window.encoding.wall_seconds
                self._unfinished, self._paid = window, False
            return window.encoding

    def _encode(
        self, slots: Sequence[int], frames: Sequence[np.ndarray], done: int, end: int, pause: Callable[[], None]
    ) -> EncodedWindow:
        """A window that ends before slot `end`; `done`: where the one before ended."""
        size = self._plan.sampling.frames
        span = range(max(done, slots[0] // size * size), end)
        given = self._origin_s, slots, frames, span, self._segment, self._following
        return encode_window(self._engine, self._plan, *given, pause)

    def _pause(self) -> None:
        """Called before each layer of the encoder."""
        self._lock.pause()
        self._check_open()

    def _read_waiting(self, polite: bool = False, after: Sequence[Unread] = ()) -> None:
        """Reads the windows that wait; with `polite`, none that a question would have to wait for. Makes room for those `after`."""
        self._memory.cache.crop(self._memory.columns)
        try:
            while self._waiting:
                self._memory.read(self._waiting[0], self._give_way if polite else lambda: None)
                self._waiting.pop(0)
            for each in after:
                self._memory.make_room(each)
        except _Overtaken:
            return
        except BaseException:  # also Ctrl-C: the cache may be half changed
            self._problem = "reading a window was broken off"
            raise

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
        return self._report(self._look() or self._latest)

    def _report(self, encoding: Encoding | None) -> Report:
        with self._lock:
            self._check_open()
            if encoding is None:
                raise UsageError("nothing was seen yet", "feed frames first: add(frame, time_s)")
            report, seen = inputs_report(self._engine, [encoding]), self._seen(self._unread)
            report.stream, report.video.duration_s = seen and asdict(seen), encoding.plan.sampling.end_s
            return report

    @property
    def _unread(self) -> list[Unread]:
        """The unfinished window, as the latest question sees it, or nothing."""
        return [self._unfinished.unread] if self._unfinished else []

    def _seen(self, unread: Sequence[Unread]) -> Seen | None:
        return self._memory.seen(self._count, self.skipped, self.lag_s, [each.window for each in unread])

    @torch.inference_mode()
    def _read(self, question: str, options: GenerationOptions, report: Report, clock: Clock) -> PrefillState:
        self._check_open()
        if options.system not in (None, self._system):
            raise UsageError("the system prompt was read when the stream began", "give it to VideoQA.stream()")
        loaded = self._engine.loaded
        with clock.stage("prefill"):
            unread = self._unread
            self._read_waiting(after=unread)
            check_question(loaded, question)
            (before, ids), seen, memory = self._around(question), self._seen(unread), self._memory
            text = memory.columns + sum(len(each.embeds) for each in unread) - seen.tokens + len(ids)
            check_context(loaded, text, seen.tokens, options.max_new_tokens)
            check_memory(self._engine, text, seen.tokens)
            report.tokens, report.stream = TokenCounts(text, seen.tokens, text + seen.tokens, 0), asdict(seen)
            following = memory.look(*unread) if unread else memory.following
            positions = (ascending(len(ids), "cpu") + following).expand(3, -1)
            state = prefill(loaded.model, embed_ids(loaded.model, ids), positions, following + len(ids), memory.cache)
            state.prompt_ids = torch.cat([before, ids])
        self._open, self._lock.generating = self._turn, True
        return state

    def _ended(self, turn: int) -> None:
        end_team()  # the encoder computes in another thread
        if self._open == turn:
            self._open, self._lock.generating = None, False

"""Answers questions about live video. Frames are fed as they arrive, and questions about the video so far can be asked at any time.

Frames are collected in time windows. As soon as a window is complete, it is encoded like a short video, and its tokens are
prefilled into the KV cache. A question also covers the frames in the unfinished window, which are encoded just for this question.
After the answer, everything prefilled for the question is cropped from the cache. To the model, all windows look like a single
video, because tokens get the positions that Qwen assigns to their frame pairs, counted from the stream's first frame.

Windows in the newest half of the memory keep all their tokens, whereas older windows are thinned (see `kept_counts`). The remaining
tokens keep their positions. Recurrent states (Qwen3.5) are not thinned: they have a fixed size, so they include every window so
far, and older windows fade by the model's own decay. If a new position would exceed the model's supported range, the cached keys
are rotated back first, so that the video starts at the oldest remaining window.

Units that haven't changed since the previous window are not encoded again, but they may still become tokens in the new window (see
segments.py).

A frame is processed in four steps: a `Windower` collects it and encodes its window, `window_columns` turns the window's tokens into
prompt columns (windows.py), and `StreamMemory.read` prefills these columns into the KV cache. One thread feeds frames while other
threads ask questions; a `Gate` decides which of them goes on (gate.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import floor

import numpy as np
import torch

from evoprune.errors import UsageError
from evoprune.language import (
    GenerationOptions,
    LanguageModel,
    PrefillState,
    Prompt,
    Turn,
)
from evoprune.live.gate import Gate, GiveWay, State
from evoprune.live.omp import release_omp_threads
from evoprune.live.windows import EncodedWindow, Window, Windower
from evoprune.methods import arange_on
from evoprune.model import Clock
from evoprune.report import EncodingTimes, Report, TokenCounts
from evoprune.session import (
    Askable,
    InputResult,
    Session,
    StreamOptions,
)
from evoprune.util import brief, check_type
from evoprune.video import SamplingOptions, Video

CONTEXT = 32_768  # default context length if a model's config does not specify one
ROOM = 0.75  # fraction of the context available to the video, leaving room for questions and answers
MAX_TIME_S = 1e11  # maximum timestamp of a frame; larger floats would soon be too coarse
MAX_WAITING = 4  # maximum number of queued windows while an answer is being generated


@dataclass(frozen=True)
class Seen:
    """Describes the part of a stream that is in memory or covered by a question. Times are frame timestamps in seconds."""

    start_s: float  # start of the oldest window with remaining tokens
    end_s: float
    windows: int
    tokens: int
    frames: int  # number of frames used since the stream began, including frames no longer in memory
    thinned: int  # number of windows that have lost tokens
    skipped: int = 0  # number of due frames from a live source that were skipped because the machine was too slow
    lag_s: float | None = None  # lag of the latest frame behind its live source, in seconds; None without a live source


class VideoStream(Askable):
    """Answers questions about a stream of frames. Create it using `VideoQA.stream` and use it as a context manager.

    One thread feeds frames while other threads ask questions. If a window is being encoded, a question waits until the encoder is
    finished. The encoder pauses while a question is being prefilled and continues layer by layer while the answer is being
    generated. If a window is encoded during an answer, or if its prefill is interrupted by a question, the window is prefilled
    after the answer.

    Attributes:
        skipped, lag_s: Number of skipped frames and current lag in seconds, as reported by `seen`. Both are set by the code that
            feeds the frames.
        facts: A dict with some of the fields of the source's `Video`, set by the code that feeds the frames.
        encoded: Number of windows encoded so far.

    Raises:
        UsageError: The pruning method uses the question, modifies the input, or operates inside the language model.
    """

    OVERTAKEN = "another question was asked meanwhile, or the stream went on for too long"

    def __init__(
        self, session: Session, options: StreamOptions, sampling: SamplingOptions, system: str | None, name: str
    ):
        super().__init__(session)
        session.loaded.description.check_streams(session.pruning.method)
        self._gate = self._lock = Gate()
        self._options = options
        self._sampling = sampling
        self._system = system
        self._name = name
        self._unreported = EncodingTimes()  # time spent for questions since the latest report, on the unfinished window
        self.skipped = 0
        self.lag_s = None
        self.facts = {}
        self.encoded = 0
        # Created with the first frame.
        self._windows: Windower | None = None
        self._memory: StreamMemory | None = None
        # Changed only by threads that use the memory, except for `_unfinished`, which is set by questions.
        self._waiting: list[EncodedWindow] = []
        self._latest: InputResult | None = None  # encoding of the latest finished window
        self._unfinished: EncodedWindow | None = None  # the unfinished window as seen by the latest question

    def __enter__(self) -> "VideoStream":
        return self

    def __exit__(self, *problem) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<VideoStream {self._name!r}: {self.seen or 'nothing seen'}>"

    @property
    def seen(self) -> Seen | None:
        """A description of the finished windows in memory, or None before the first window is finished. Does not block."""
        return self._memory and self._seen([])

    @property
    def until_s(self) -> float | None:
        """Timestamp in seconds up to which a question would see the video now, including the unfinished window. Does not block."""
        until_s = self._windows and self._windows.until_s
        if until_s is not None:
            return until_s
        return self.seen and self.seen.end_s

    @property
    def report(self) -> Report:
        """Report on the latest finished window, or on the unfinished window if none is finished yet. Contains no answer."""
        # Read `_latest` again at the end, because the unfinished window may have been finished in the meantime.
        return self._report(self._latest or self._look() or self._latest)

    def add(self, frame: np.ndarray, time_s: float) -> bool:
        """Feed a frame to the stream. If the frame starts a new window, the previous window is encoded and prefilled first.

        Args:
            frame: uint8 `[H, W, 3]`, RGB. The first frame determines the size that the model sees. Later frames are scaled to this
                size, with black borders if their aspect ratio differs.
            time_s: Timestamp in seconds relative to an arbitrary origin. It must not be earlier than the previous frame's
                timestamp.

        Returns:
            True if the frame is used. If frames arrive at a higher rate than the stream's frame rate, some of them are skipped.

        Raises:
            UsageError: The array is not a frame, the timestamp goes backward, or the stream is closed.
            OutOfMemory: There is not enough memory.
            ModelError: The model fails.
        """
        with self._gate.window():
            self._check_open()
            if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
                raise UsageError(f"a frame is {brief(frame)}, not uint8 [H, W, 3]", "give RGB pixels as a numpy array")
            if not frame.size:
                raise UsageError(f"a frame of shape {list(frame.shape)} has no pixels", "leave it out")
            check_type("time_s", time_s, float)
            if not abs(time_s) <= MAX_TIME_S:  # also if it is NaN
                raise UsageError(f"the time of a frame is {time_s:g}, not a number of seconds", "give seconds")
            if self._windows is None:
                self._begin(frame, time_s)
            self._windows.facts = self.facts
            return self._windows.add(frame, time_s, self._pause, self._finished)

    def scaled(self, frame: np.ndarray) -> np.ndarray:
        """Scale a frame to the encoder's input size. Scaled frames can also be passed to `add`.

        Until the first frame has been added, the size is unknown, so the frame is returned unchanged.
        """
        return self._windows.scaled(frame) if self._windows else frame

    def flush(self) -> None:
        """End the unfinished window early, and encode and prefill its frames. Raises the same errors as `add`."""
        with self._gate.window():
            self._check_open()
            if self._windows:
                self._windows.facts = self.facts
                self._windows.flush(self._pause, self._finished)

    def catch_up(self) -> None:
        """Prefill windows that have been waiting for an answer to finish. Call this method periodically while no frames arrive.

        Raises the same errors as `add`.
        """
        if self._waiting:
            with self._gate.memory():
                if self._waiting and self._gate.state is not State.GENERATING:
                    self._read_waiting(polite=True)

    def close(self) -> None:
        """Free the stream's memory and stop any answer being generated."""
        self._gate.close("the stream is closed")  # if the encoder is running, this stops it at its next layer
        with self._gate.window(), self._gate.memory():
            self._turn += 1
            self._memory, self._latest, self._unfinished, self._waiting = None, None, None, []
            if self._windows:
                self._windows.clear()

    @property
    def step_s(self) -> float | None:
        """Interval in seconds between the frames used by the stream, or None before the first frame."""
        return self._windows and self._windows.step_s

    def _begin(self, frame: np.ndarray, time_s: float) -> None:
        """Plan windows like videos of the same length, and prefill the prompt before the video, which also packs the weights."""
        height, width, _ = frame.shape
        window = Video(
            self._name, self._options.window_s, width, height, 0, "raw", None, "stream", None, None, None, 0.0
        )
        info = replace(window, **self.facts)
        session = self._session
        plan = session.loaded.description.plan(info, self._sampling, session.pruning, self._name)
        loaded = session.loaded
        options = self._options
        window_tokens = plan.encoder.keep
        room = floor(ROOM * (loaded.model.config.text_config.max_position_embeddings or CONTEXT))
        wanted = options.memory_tokens or floor(options.memory_s / options.window_s * window_tokens)
        limit = min(wanted, room)  # maximum number of tokens in memory
        if limit < 2 * window_tokens:
            problem = f"a memory of {limit:,} tokens is smaller than two windows of {window_tokens:,}"
            raise UsageError(problem, "use a longer memory, shorter windows (window_s, --window) or a lower budget")
        session.check_stream_memory(plan)
        head, _ = self._ids_around_video("?")
        positions = loaded.span or room
        with self._gate.memory():
            self._memory = StreamMemory(loaded.language, head, limit, window_tokens, positions)
        self._windows = Windower(session, plan, time_s)

    def _finished(self, window: EncodedWindow) -> None:
        """Prefill a finished window, unless an answer is being generated. The answer is stopped if too many windows wait."""
        with self._gate.memory():
            self._check_open()
            self._waiting.append(window)
            self._latest, self._unfinished, self.encoded = window.encoding, None, self.encoded + 1
            too_many = len(self._waiting) > MAX_WAITING
            if too_many and self._gate.state is State.GENERATING:
                self._turn += 1
                self._gate.end_answer()
            if self._gate.state is not State.GENERATING:
                self._read_waiting(polite=not too_many)

    def _look(self) -> InputResult | None:
        """Encode the unfinished window for a question, unless the latest question saw the same frames.

        The elapsed time, including any wait for another window to be encoded, is charged to the next prefilled question.

        Returns:
            The encoded window, or None if it has no frames.
        """
        clock = Clock(self._session.device)
        fresh = None
        start = clock.now()
        with self._gate.window():
            self._check_open()
            window = None
            if self._windows:
                self._windows.facts = self.facts
                window, encoded_now = self._windows.look(self._check_open)
                if window:
                    self._unfinished = window
                fresh = window if encoded_now else None
            wall = clock.now() - start
            if fresh:
                encoded = fresh.encoding
                rest = encoded.seconds["plan"] + wall - encoded.wall_seconds
                stages = encoded.seconds | {"plan": rest}
                self._unreported.add(EncodingTimes(stages, wall, encoded.encoded.prune_seconds))
            else:
                self._unreported.add(EncodingTimes({"plan": wall}, wall))
            return window and window.encoding

    def _claim_times(self) -> tuple[EncodingTimes, Callable[[], None]]:
        claimed = self._unreported
        self._unreported = EncodingTimes()
        before = replace(claimed, stages=dict(claimed.stages))  # `claimed` will be changed by its report

        def give_up() -> None:
            self._unreported.add(before)

        return claimed, give_up

    def _pause(self) -> None:
        """Let answers go first, and raise UsageError if the stream has been closed. Called before each encoder layer."""
        self._session.check_process()
        self._gate.pause()

    def _read_waiting(self, polite: bool = False, after: Sequence[EncodedWindow] = ()) -> None:
        """Prefill the queued windows.

        Args:
            polite: Whether to stop as soon as a question is waiting.
            after: Windows to make room for in the cache after prefilling the queued windows.
        """
        self._memory.cache.crop(self._memory.columns)
        pause = self._gate.give_way if polite else lambda: None
        try:
            while self._waiting:
                self._memory.read(self._waiting[0], pause)
                self._waiting.pop(0)
            for window in after:
                self._memory.make_room(window)
        except GiveWay:
            return
        except BaseException:  # including Ctrl-C, because the cache may be inconsistent now
            self._gate.close("reading a window was interrupted")
            raise

    def _check_open(self) -> None:
        self._session.check_process()
        self._gate.check()

    def _ids_around_video(
        self, question: str, thinking: bool = False, earlier: Sequence[Turn] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token IDs of the prompt before and after the video, both as int64 tensors."""
        loaded = self._session.loaded
        # The markers around the video belong to the frame pairs.
        times = [[""]] if loaded.model.config.vision_config.traits.timestamps else ()
        prompt = Prompt.build(
            loaded.tokenizer,
            question,
            [("video", 1)],
            system=self._system,
            times=times,
            thinking=thinking,
            earlier=earlier,
        )
        (video,) = prompt.places[0].around or prompt.places[0].runs
        return prompt.input_ids[: video.start], prompt.input_ids[video.stop :]

    def _blank_report(self) -> Report:
        return self._report(self._look() or self._latest)

    def _report(self, encoding: InputResult | None) -> Report:
        with self._gate:
            self._check_open()
            if encoding is None:
                raise UsageError("the stream has no frames yet", "feed frames first: add(frame, time_s)")
            report = self._report_of_inputs([encoding])
            seen = self._seen(self._unread)
            report.stream = seen and asdict(seen)
            report.video.duration_s = encoding.plan.sampling.end_s
            return report

    @property
    def _unread(self) -> list[EncodedWindow]:
        """A list containing the unfinished window as seen by the latest question, or an empty list if there is no such window."""
        return [self._unfinished] if self._unfinished else []

    def _seen(self, unread: Sequence[EncodedWindow]) -> Seen | None:
        """Describe the windows in memory together with the windows in `unread`. Returns None if there are no windows."""
        windows = [*self._memory.windows, *(encoded.window for encoded in unread)]
        if not windows:
            return None
        tokens = [window.tokens for window in windows]
        thinned = sum(count < window.whole for count, window in zip(tokens, windows, strict=True))
        start_s = windows[0].start_s
        end_s = windows[-1].end_s
        return Seen(start_s, end_s, len(windows), sum(tokens), self._windows.count, thinned, self.skipped, self.lag_s)

    @torch.inference_mode()
    def _read(self, answering, clock: Clock) -> PrefillState:
        options, earlier, report = answering.options, answering.earlier, answering.report
        self._check_open()
        if options.system not in (None, self._system):
            raise UsageError("the system prompt is fixed when a stream starts", "give it to VideoQA.stream()")
        loaded = self._session.loaded
        with clock.stage("prefill"):
            unread = self._unread
            self._read_waiting(after=unread)
            loaded.check_texts(answering.question, earlier=earlier or ())
            before, ids = self._ids_around_video(answering.question, options.thinking, earlier or ())
            seen = self._seen(unread)
            memory = self._memory
            text = memory.columns + sum(len(window.prompt) for window in unread) - seen.tokens + len(ids)
            loaded.check_context(text, seen.tokens, options.max_new_tokens)
            self._session.check_memory(text, seen.tokens)
            report.tokens = TokenCounts(text, seen.tokens, text + seen.tokens, 0)
            report.stream = asdict(seen)
            following = memory.look(*unread) if unread else memory.following
            positions = (arange_on(len(ids), "cpu") + following).expand(3, -1)
            language = loaded.language
            state = language.prefill(language.embed(ids), positions, following + len(ids), memory.cache)
            windows = [*memory.windows, *(encoded.window for encoded in unread)]
            state.prompt_ids = torch.cat([before, *(window.ids for window in windows), ids])
        self._gate.begin_answer(self._turn)
        return state

    def _check_fits(self, question: str, options: GenerationOptions, earlier: Sequence[Turn]) -> None:
        """Check that a question would fit even in a full memory, because it may fill up before the question is prefilled."""
        self._session.loaded.check_texts(question, earlier=earlier)
        _, ids = self._ids_around_video(question, options.thinking, earlier)
        with self._gate:
            self._check_open()
            columns = self._memory.most_columns if self._memory else 0
        self._session.loaded.check_context(len(ids), columns, options.max_new_tokens)

    def _ended(self, turn: int) -> None:
        release_omp_threads()  # the encoder runs in a different thread
        self._gate.end_answer(turn)


class StreamMemory:
    """A stream's memory: a KV cache with the prompt that precedes the video, followed by the video's windows.

    Args:
        ids: int64 `[n]`, token IDs of the prompt that precedes the video.
        limit: Maximum number of tokens in memory.
        window_tokens: Number of tokens in a full window.
        room: Number of positions available to the video.

    Attributes:
        windows: Windows with remaining tokens, oldest first.
        following: Position of the first text token after the video.
    """

    @torch.inference_mode()
    def __init__(self, language: LanguageModel, ids: torch.Tensor, limit: int, window_tokens: int, room: int):
        self.cache = language.new_cache(len(ids) + limit + window_tokens)
        self.windows: list[Window] = []
        self.following = len(ids)
        self._language = language
        self._head = len(ids)
        self._limit = limit
        self._window = window_tokens
        self._room = room
        self._moved = 0  # number of positions by which the video's start has been moved
        # If the prompt contains timestamps, the row and column positions of a frame pair also continue from the text before it.
        alike = int(language.model.config.vision_config.traits.timestamps)
        self._axes = torch.tensor([[1], [alike], [alike]], dtype=torch.int64, device="cpu")
        language.forward(language.embed(ids), arange_on(len(ids), "cpu").expand(3, -1), self.cache)
        self.cache.hold()

    @property
    def columns(self) -> int:
        """Number of columns in the KV cache up to the end of the video."""
        return self._head + sum(len(window.order) for window in self.windows)

    @property
    def most_columns(self) -> int:
        """Maximum number of columns in the KV cache up to the end of the video: a full memory plus an unfinished window."""
        return max(self.columns, self._head + self._limit) + self._window

    @torch.inference_mode()
    def read(self, encoded: EncodedWindow, pause: Callable[[], None]) -> None:
        """Prefill a window and thin earlier windows. If an error occurs in the process, the cache is no longer usable.

        `pause` is called before each language model layer. If it raises an exception, the cache remains unchanged.
        """
        self.make_room(encoded)
        self.following = self.look(encoded, pause)
        self.windows.append(encoded.window)
        self._thin(kept_counts([(window.tokens, window.whole) for window in self.windows], self._limit))
        self.cache.hold()

    @torch.inference_mode()
    def look(self, encoded: EncodedWindow, pause: Callable[[], None] = lambda: None) -> int:
        """Prefill a window after the windows in memory. There must be enough room. To undo this, crop the cache to `columns`.

        Returns:
            The position of the first text token after the window.
        """
        by = self._head - self._moved * self._axes
        prompt = encoded.prompt
        self._language.forward(
            prompt.embeds,
            prompt.positions + by,
            self.cache,
            prompt.sizes,
            deepstack=prompt.deepstack,
            pause=pause,
        )
        return int((prompt.last + by).max()) + 1

    @torch.inference_mode()
    def make_room(self, encoded: EncodedWindow) -> None:
        """Move the start of the video to the oldest remaining window if `encoded` would exceed the position range.

        If that does not free enough positions, the oldest windows are dropped. Unless the range is short, they have few tokens left
        by then. An eighth of the range is freed at a time, in whole windows. Otherwise, each new window in a long memory would
        require moving the cached keys, which adds a rounding error every time.
        """
        first = encoded.window.time
        last = int(encoded.prompt.last[0])
        if last - self._moved <= self._room:
            return
        size = last - first + 1
        far = self._room - self._room // 8 // size * size
        self._thin([0 if last - window.time > far else window.tokens for window in self.windows])
        beginning = self.windows[0].time if self.windows else first
        config = self._language.model.config.text_config
        self.cache.move(config, slice(self._head, self.cache.length), (self._moved - beginning) * self._axes)
        self._moved = beginning

    def _thin(self, counts: Sequence[int]) -> None:
        """Keep only the given number of tokens in each window, choosing the tokens with the lowest ranks."""
        stay = [window.order < count for window, count in zip(self.windows, counts, strict=True)]
        if all(bool(kept.all()) for kept in stay):
            return
        head = torch.ones(self._head, dtype=torch.bool, device="cpu")
        self.cache.keep(torch.cat([head, *stay]).nonzero()[:, 0])
        self.cache.hold()
        for window, kept in zip(self.windows, stay, strict=True):
            window.order, window.visual = window.order[kept], window.visual[kept]
        self.windows = [window for window in self.windows if len(window.order)]


def kept_counts(windows: Sequence[tuple[int, int]], limit: int) -> list[int]:
    """Return the number of tokens to keep in each window, oldest window first.

    The newest windows, up to half of the limit, keep all their tokens. The same number of windows before them should keep half of
    their tokens, the next older group a quarter, and so on. While the total exceeds `limit`, windows with more tokens than they
    should keep are halved, starting with the oldest window.

    Args:
        windows: Pairs of a window's remaining and original numbers of tokens.
        limit: Maximum total. It must be at least twice the number of tokens in the largest window.
    """
    counts = [left for left, _ in windows]
    # Number of consecutive windows that should keep the same fraction of their tokens.
    group = max(1, limit // (2 * max(whole for _, whole in windows)))
    due = [whole >> ((len(windows) - 1 - number) // group) for number, (_, whole) in enumerate(windows)]
    while (over := sum(counts) - limit) > 0:
        for number, count in enumerate(counts):  # halve every window once before halving the oldest window again
            if over > 0 and count > due[number]:
                counts[number] = max(due[number], count // 2)
                over -= count - counts[number]
    return counts

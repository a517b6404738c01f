"""Collects the frames of a stream in time windows, and encodes each window as the next segment of a longer video."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np
import torch

from evoprune.errors import UsageError
from evoprune.language import PrunedPrompt, prompt_positions, prune_prompt, timestamps
from evoprune.live.segments import Earlier, NothingNew, encode_segment
from evoprune.methods import FarthestPoints, Tokens, arange_on, select
from evoprune.session import InputResult, LoadedModel, OpenInputs, Session
from evoprune.video import FrameChunk, Plan, SamplingPlan
from evoprune.vision import Encoded, TowerOutput, resize


@dataclass
class Window:
    """A time window of a stream, with C prompt columns remaining in memory."""

    start_s: float
    end_s: float
    time: int  # temporal position of the window's first column, counting from the start of the stream
    whole: int  # number of tokens before thinning
    # int64 `[C]`: column ranks. Columns with rank 0 are dropped last. Text has the lowest rank among the columns of its frame pair.
    order: torch.Tensor
    visual: torch.Tensor  # bool `[C]`: True for visual token columns
    ids: torch.Tensor  # int64: distinct token IDs in the window's unpruned prompt, for the repetition penalty

    @property
    def tokens(self) -> int:
        return int(self.visual.sum())


@dataclass(frozen=True)
class EncodedWindow:
    """An encoded window of a stream, with its prompt columns.

    Attributes:
        frames: Number of frames in the window.
        end: End slot of the window (exclusive).
        earlier: State for encoding the next window, or None if there is no state or the window is finished.
        prompt: Prompt columns, with positions relative to the start of the stream.
    """

    frames: int
    end: int
    encoding: InputResult
    earlier: Earlier | None
    window: Window
    prompt: PrunedPrompt


class Windower:
    """Turns a sequence of frames into encoded windows. It has no locks, so only one thread may use it at a time.

    Time is divided into slots, with one slot per frame at the stream's frame rate. A slot has at most one frame, and a window a
    fixed number of slots. Functions passed as `pause` are called before each layer of the encoder. If one raises an exception while
    a finished window is being encoded, the window's frames are lost.

    Args:
        plan: The plan for a full window.
        origin_s: Timestamp of the first frame in seconds.

    Attributes:
        facts: Fields of `Video` that override those of the plan.
        count: Number of frames used so far.
    """

    def __init__(self, session: Session, plan: Plan, origin_s: float):
        self.plan = plan
        self.facts: dict[str, Any] = {}
        self.count = 0
        self._session = session
        self._origin_s = self._last_s = origin_s
        self._slots: list[int] = []
        self._frames: list[np.ndarray] = []
        self._changes_shape = False  # True if any frame so far had a different aspect ratio from the first frame
        self._done = 0  # the slot after the last finished window
        self._following = 0  # position after the latest window, relative to the start of the stream
        self._earlier: Earlier | None = None  # state for encoding the next window
        self._looked: EncodedWindow | None = None  # the unfinished window, as it was when `look` encoded it

    @property
    def step_s(self) -> float:
        """Interval in seconds between the frames used by the stream."""
        return self.plan.sampling.seconds_per_frame

    @property
    def until_s(self) -> float | None:
        """End of the unfinished window in seconds, or None if it has no frames. Any thread may read it."""
        slots = self._slots
        return self._origin_s + (slots[-1] + 1) * self.step_s if slots else None

    def add(
        self,
        frame: np.ndarray,
        time_s: float,
        pause: Callable[[], None],
        finished: Callable[[EncodedWindow], None],
    ) -> bool:
        """Add a frame, which may finish the window before it, or its own.

        Args:
            finished: Called with each window that is finished.

        Returns:
            True if the frame is used, and False if its slot already has a frame or belongs to a finished window.

        Raises:
            UsageError: The timestamp goes backward.
        """
        if time_s < self._last_s:
            raise UsageError(
                f"a frame at {time_s:g} s comes after one at {self._last_s:g} s", "feed frames in order of time"
            )
        self._last_s = time_s
        slot = floor((time_s - self._origin_s) / self.step_s + 1e-6)
        size = self.plan.sampling.frames
        if self._slots and slot // size > self._slots[-1] // size:
            finished(self._finish((self._slots[-1] // size + 1) * size, pause))
        if slot < self._done or (self._slots and slot <= self._slots[-1]):
            return False
        self._slots.append(slot)
        scaled = self.scaled(frame)
        self._frames.append(scaled.copy() if scaled is frame else scaled)  # the caller may reuse its array
        self.count += 1
        if slot % size == size - 1:
            finished(self._finish(slot + 1, pause))
        return True

    def flush(self, pause: Callable[[], None], finished: Callable[[EncodedWindow], None]) -> None:
        """Finish the unfinished window early, if it has frames. See `add`."""
        if self._slots:
            finished(self._finish(self._slots[-1] + 1, pause))

    def look(self, pause: Callable[[], None]) -> tuple[EncodedWindow | None, bool]:
        """Encode the unfinished window without finishing it.

        Returns:
            The window, or None if it has no frames; and whether it has been encoded now, because a frame has come since the last
            call.
        """
        if not self._slots:
            return None, False
        end = self._slots[-1] + 1
        if self._is_encoded(end):
            return self._looked, False
        self._looked = self._encode(self._slots, self._frames, self._done, end, pause)
        return self._looked, True

    def clear(self) -> None:
        """Free the frames and everything encoded."""
        self._slots, self._frames = [], []
        self._earlier = self._looked = None

    def scaled(self, frame: np.ndarray) -> np.ndarray:
        """Scale a frame to the encoder's input size, with black borders if its aspect ratio differs. Any thread may call this."""
        plan = self.plan
        height, width, _ = frame.shape
        if (height, width) == (plan.height, plan.width):
            return frame
        outer = plan.info.width, plan.info.height
        inner = plan.info.fitted(width, height)
        inner_height = max(1, round(plan.height * inner[1] / outer[1]))
        inner_width = max(1, round(plan.width * inner[0] / outer[0]))
        pixels = (
            resize(torch.from_numpy(np.ascontiguousarray(frame))[None], inner_height, inner_width)[0].clone().numpy()
        )
        if inner == outer:
            return pixels
        self._changes_shape = True
        bordered = np.zeros((plan.height, plan.width, 3), np.uint8)
        top = (plan.height - inner_height) // 2
        left = (plan.width - inner_width) // 2
        bordered[top : top + inner_height, left : left + inner_width] = pixels
        return bordered

    def _is_encoded(self, end: int) -> bool:
        window = self._looked
        return window is not None and (window.frames, window.end) == (len(self._slots), end)

    def _finish(self, end: int, pause: Callable[[], None]) -> EncodedWindow:
        """Finish the window that ends before slot `end`, and encode it unless `look` has already encoded the same frames."""
        window = self._looked if self._is_encoded(end) else None
        slots, frames, done = self._slots, self._frames, self._done
        self._slots, self._frames, self._done = [], [], end
        if window is None:
            window = self._encode(slots, frames, done, end, pause)
        self._earlier, self._following, self._looked = window.earlier, window.prompt.following, None
        return replace(window, earlier=None)

    def _encode(
        self, slots: Sequence[int], frames: Sequence[np.ndarray], done: int, end: int, pause: Callable[[], None]
    ) -> EncodedWindow:
        """Encode a window like a file of the same length, without changing any state.

        Args:
            slots: Slots of the frames.
            frames: The frames.
            done: The first slot after the previous window.
            end: The first slot after this window.
            pause: Called before each layer of the encoder.
        """
        session = self._session
        base = self.plan
        step_s = self.step_s
        count = len(frames)
        if count % 2:  # for an odd number of frames, repeat the last frame, as Hugging Face does
            slots = [*slots, slots[-1]]
            frames = [*frames, frames[-1]]
        first = max(done, slots[0] // base.sampling.frames * base.sampling.frames)
        start_s, end_s, *times = (self._origin_s + slot * step_s for slot in (first, end, *slots))
        sampling = SamplingPlan(start_s, end_s, tuple(times), base.sampling.wanted)
        grid = len(slots) // 2, *base.grid[1:]
        budget = session.pruning.budget
        # A window with a single frame pair is part of a longer video, so the still image budget does not apply.
        pruning = replace(session.pruning, budget=replace(budget, still=budget.video))
        plan = replace(
            base,
            info=replace(base.info, **self.facts),
            sampling=sampling,
            grid=grid,
            pruning=pruning,
            unshrunk=None,
            limited=False,
        )
        chunk = FrameChunk(0, np.stack(frames), tuple(plan.sampling.times_s))

        def encoded(earlier: Earlier | None) -> tuple[InputResult, TowerOutput, Earlier]:
            """Encode the window as a segment of a longer video, and return its tokens, its rows, and the state it leaves."""
            segment = []

            def tower(*given: Any, **options: Any) -> TowerOutput:
                segment[:] = encode_segment(*given, earlier, pause=pause, **options)
                return segment[0]

            def frames(*_: Any) -> Iterator[FrameChunk]:
                yield chunk

            (encoding,) = OpenInputs(session, [plan], frames=frames, tower=tower, threaded=False).encode_each()
            return encoding, *segment

        try:
            encoding, rows, left = encoded(self._earlier)
        except NothingNew:  # encode the entire window without reusing earlier units
            encoding, rows, left = encoded(None)
        if self._changes_shape:
            encoding = replace(encoding, warnings=(*encoding.warnings, "changing_size"))
        order = staying_order(rows, encoding.encoded)
        columns = window_columns(session.loaded, encoding, order, slots, step_s, self._following)
        return EncodedWindow(count, end, encoding, left, *columns)


@torch.inference_mode()
def staying_order(rows: TowerOutput, tokens: Encoded) -> torch.Tensor:
    """Rank a window's tokens by how long they should stay in memory.

    The pruning method is asked to select half of the tokens, then a quarter of them, and so on. Tokens that are selected more often
    stay longer. If the tokens were not chosen by a selector, the `evoprune` method's selector is used.

    Returns:
        The ranks as int64 `[K]` on the CPU. The token with rank 0 is dropped last.
    """
    if stage := rows.plan.token_stage:
        selector = stage.selector
        given = rows.selector_input
    else:
        unit_to_row = torch.full_like(tokens.unit_to_row, -1)
        unit_to_row[tokens.kept] = arange_on(len(tokens.kept), unit_to_row.device)
        selector = FarthestPoints(count=0)
        seen = rows.selector_input
        given = Tokens(tokens.features, unit_to_row, rows.plan.grid, seen.seed)
    often = torch.zeros_like(tokens.kept)
    count = len(tokens.kept) // 2
    while count:
        often += torch.isin(tokens.kept, select(selector, given, count).kept.to(often.device))
        count //= 2
    return often.cpu().argsort(descending=True, stable=True).argsort()


def window_columns(
    loaded: LoadedModel,
    encoding: InputResult,
    order: torch.Tensor,
    slots: Sequence[int],
    step_s: float,
    following: int,
) -> tuple[Window, PrunedPrompt]:
    """Build a window and the prompt columns that the language model prefills for it.

    Args:
        order: The result of `staying_order`.
        slots: Frame slots, relative to the start of the stream.
        step_s: Slot length in seconds.
        following: The first position after the previous window. Only used if the prompt contains timestamps for the frame pairs.
    """
    config = loaded.model.config.vision_config
    span = encoding.plan.sampling
    (grid,) = encoding.encoded.grids
    times = ()
    if config.traits.timestamps:
        times = timestamps([(slot + 0.5) * step_s for slot in slots])
    ids, place = loaded.tokenizer.video_columns(grid, times)
    if times:
        positions = prompt_positions(len(ids), place.positions(grid, 1.0, None)) + following
    else:
        step = 1.0
        if config.tokens_per_second:
            step = 2 * step_s * config.tokens_per_second
        time = torch.tensor([floor(slot / 2 * step) for slot in slots[::2]], dtype=torch.int64, device="cpu")
        inside = torch.meshgrid(time, *(arange_on(side, "cpu") for side in grid[1:]), indexing="ij")
        positions = torch.stack(inside).flatten(1)
    prompt = prune_prompt(ids, [place], [encoding.encoded], positions, loaded.language.embed)
    stays = torch.full_like(ids, len(order))
    stays[prompt.columns[prompt.visual]] = order
    # A frame pair's text stays in memory as long as any of the pair's tokens.
    for run, tokens in zip(place.around, place.runs, strict=False):
        first = stays[run.start : run.stop].min()
        stays[run.start : tokens.start] = stays[tokens.stop : run.stop] = first
    begins = int(positions[0, 0])
    window = Window(span.start_s, span.end_s, begins, len(order), stays[prompt.columns], prompt.visual, ids.unique())
    return window, prompt

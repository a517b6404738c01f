"""The memory of a stream: the KV cache of its windows, which of them are thinned, and in which order their tokens go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evoprune.language.decoder import KVCache, forward
from evoprune.language.generate import Visual, column_deepstack, column_sizes, embed_ids, embed_prompt
from evoprune.language.prompt import CONTENTS, MARKERS, Place, prompt_positions
from evoprune.methods.chain import select
from evoprune.methods.evoprune import FarthestPoints
from evoprune.methods.types import Tokens, ascending
from evoprune.model.config import ANSWER_COLUMNS
from evoprune.session.loading.model import LoadedModel
from evoprune.video.info import VIDEO
from evoprune.video.sampling import SamplingPlan
from evoprune.vision.encoded import Encoded, EncodedRows


@dataclass(frozen=True)
class Seen:
    """What of a stream is held, or a question is about; times are those of the frames, in seconds."""

    start_s: float  # of the oldest window of which a token is left
    end_s: float
    windows: int
    tokens: int
    frames: int  # that were looked at since the stream began, remembered or not
    thinned: int  # windows of which not all tokens are left
    skipped: int = 0  # frames of a live source that were due and not looked at, because the machine was too slow
    lag_s: float | None = None  # of the latest frame behind its source; None where the frames come from somewhere else


@dataclass
class Window:
    """A window of a stream, of which C columns are left."""

    start_s: float
    end_s: float
    time: int  # position in time of its first column, counted from the beginning of the stream
    whole: int  # its tokens before any was thinned
    # int64 `[C]`: place in the order in which tokens stay, 0 for the last; text has its pair's least
    order: torch.Tensor
    visual: torch.Tensor  # bool `[C]`: which columns are tokens

    @property
    def tokens(self) -> int:
        return int(self.visual.sum())


@dataclass(frozen=True)
class Unread:
    """What the language model is to read of a window, as `decoder.forward` takes it.

    `positions`, int64 `[3, C]`, are counted from the beginning of the stream; `last`, int64 `[3, 1]`: the largest unpruned.
    """

    window: Window
    embeds: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    sizes: torch.Tensor | None
    deepstack: torch.Tensor | None


def columns_of(
    loaded: LoadedModel,
    encoded: Encoded,
    order: torch.Tensor,
    span: SamplingPlan,
    at: Sequence[int],
    times: Sequence[str],
    following: int,
) -> Unread:
    """The columns of an encoded window, which has `order` from `staying_order`; `span`: of the window.

    `at`: position in time of each frame pair, from the beginning of the stream. `times`: what the model reads in front of each;
    none where it reads no times. `following`: the first position after the window before, which counts where there are times.
    """
    (grid,), specials = encoded.grids, loaded.tokenizer.specials()
    start, pad, end = (specials[token] for token in (MARKERS[0], CONTENTS[VIDEO][1], MARKERS[1]))
    units, ids, runs, around = grid[1] * grid[2], [], [], []
    for text in times:
        before = [*loaded.tokenizer.encode(text), start]
        runs.append(range(len(ids) + len(before), len(ids) + len(before) + units))
        around.append(range(len(ids), runs[-1].stop + 1))
        ids += [*before, *[pad] * units, end]
    ids = torch.tensor(ids or [pad] * units * grid[0], dtype=torch.int64, device="cpu")
    place = Place(tuple(runs) or (range(len(ids)),), tuple(around))
    if times:
        positions = prompt_positions(len(ids), place.spans(grid, 1.0), None) + following
    else:
        time = torch.tensor(at, dtype=torch.int64, device="cpu")
        inside = torch.meshgrid(time, *(ascending(side, "cpu") for side in grid[1:]), indexing="ij")
        positions = torch.stack(inside).flatten(1)
    read = [Visual(place, encoded.features, encoded.kept_here, encoded.size, encoded.deepstack)]
    embeds, columns = embed_prompt(loaded.model, ids, read)
    stays, visual = torch.full_like(ids, len(order)), torch.zeros_like(ids, dtype=torch.bool)
    stays[read[0].columns], visual[read[0].columns] = order, True
    for run, tokens in zip(around, runs, strict=True):
        least = stays[run.start : run.stop].min()
        stays[run.start : tokens.start] = stays[tokens.stop : run.stop] = least
    window = Window(span.start_s, span.end_s, int(positions[0, 0]), len(order), stays[columns], visual[columns])
    last, sizes = positions.amax(1, keepdim=True), column_sizes(read, columns)
    return Unread(window, embeds, positions[:, columns], last, sizes, column_deepstack(read, columns, embeds))


class StreamMemory:
    """Windows in a KV cache, behind what precedes the video in the prompt.

    `ids`: int64 `[n]`, of what precedes it. `limit`: tokens that are held; `most`: of a window. `room`: positions for the video.
    `windows`: those of which tokens are left, the oldest first. `following`: position of the text after the video.
    """

    @torch.inference_mode()
    def __init__(self, model, ids: torch.Tensor, limit: int, most: int, room: int):
        self.cache, self.windows = KVCache(model, len(ids) + limit + most + ANSWER_COLUMNS), []
        self.following = len(ids)
        self._model, self._head, self._limit, self._room = model, len(ids), limit, room
        self._moved = 0  # positions by which the beginning of the video was moved
        # Where the text says times, each frame pair has its rows and columns behind the text before it, too.
        alike = int(model.config.vision_config.traits.timestamps)
        self._axes = torch.tensor([[1], [alike], [alike]], dtype=torch.int64, device="cpu")
        forward(model, embed_ids(model, ids), ascending(len(ids), "cpu").expand(3, -1), self.cache)

    def seen(self, frames: int, skipped: int, lag_s: float | None, unfinished: Sequence[Window] = ()) -> Seen | None:
        """What it holds, and the `unfinished` window, with what else `Seen` has; None while there is nothing."""
        windows = [*self.windows, *unfinished]
        if not windows:
            return None
        held = [window.tokens for window in windows]
        thinned = sum(count < window.whole for count, window in zip(held, windows, strict=True))
        return Seen(windows[0].start_s, windows[-1].end_s, len(windows), sum(held), frames, thinned, skipped, lag_s)

    @property
    def columns(self) -> int:
        """Columns up to the end of the video."""
        return self._head + sum(len(window.order) for window in self.windows)

    @torch.inference_mode()
    def read(self, unread: Unread, pause: Callable[[], None]) -> None:
        """Reads a window, and thins earlier ones. Whatever ends it early leaves a cache that nothing can be read from.

        `pause` is called before every layer of the language model. What it raises leaves the cache as it was.
        """
        self.make_room(unread)
        self.following = self.look(unread, pause)
        self.windows.append(unread.window)
        held = [(window.tokens, window.whole) for window in self.windows]
        self._thin(targets(held, self._limit, max(whole for _, whole in held)))

    @torch.inference_mode()
    def look(self, unread: Unread, pause: Callable[[], None] = lambda: None) -> int:
        """Reads a window for which there is room, behind those that are held: cropping the cache to `columns` takes it back.

        Returns the position of the text after it.
        """
        by = self._head - self._moved * self._axes
        more = {"deepstack": unread.deepstack, "pause": pause}
        forward(self._model, unread.embeds, unread.positions + by, self.cache, unread.sizes, **more)
        return int((unread.last + by).max()) + 1

    @torch.inference_mode()
    def make_room(self, unread: Unread) -> None:
        """Moves the beginning of the video to the oldest window that is left, where a window would be out of range.

        Windows from so long ago that this is not enough go; they have few tokens, unless the range is short. An eighth of it
        becomes free, in whole windows, or every window of a long memory would move the keys, and round them.
        """
        first, last = unread.window.time, int(unread.last[0])
        if last - self._moved <= self._room:
            return
        size = last - first + 1
        far = self._room - self._room // 8 // size * size
        self._thin([0 if last - each.time > far else each.tokens for each in self.windows])
        beginning = self.windows[0].time if self.windows else first
        config = self._model.config.text_config
        self.cache.move(config, slice(self._head, self.cache.length), (self._moved - beginning) * self._axes)
        self._moved = beginning

    def _thin(self, counts: Sequence[int]) -> None:
        """Leaves so many tokens of each window, in the order in which they stay."""
        stay = [window.order < count for window, count in zip(self.windows, counts, strict=True)]
        if all(bool(each.all()) for each in stay):
            return
        head = torch.ones(self._head, dtype=torch.bool, device="cpu")
        self.cache.keep(torch.cat([head, *stay]).nonzero()[:, 0])
        for window, each in zip(self.windows, stay, strict=True):
            window.order, window.visual = window.order[each], window.visual[each]
        self.windows = [window for window in self.windows if len(window.order)]


def targets(windows: Sequence[tuple[int, int]], limit: int, most: int) -> list[int]:
    """How many tokens of each window stay, the oldest window first; `windows`: of each, what is left, and what there was.

    The newest windows, which together have half of the limit, are whole. Of as many before them half of the tokens is due to stay,
    of as many before those a quarter, and so on. While there are more than `limit`, those that have more than is due lose half,
    from the oldest on. `limit` is at least twice `most`, the tokens of the largest window.
    """
    counts, whole = [left for left, _ in windows], max(1, limit // (2 * most))
    due = [full >> ((len(windows) - 1 - number) // whole) for number, (_, full) in enumerate(windows)]
    while (over := sum(counts) - limit) > 0:
        for number, count in enumerate(counts):  # each loses half once before the oldest loses more
            if over > 0 and count > due[number]:
                counts[number] = max(due[number], count // 2)
                over -= count - counts[number]
    return counts


@torch.inference_mode()
def staying_order(rows: EncodedRows, tokens: Encoded) -> torch.Tensor:
    """int64 `[K]` on the CPU: of each token of a window its place in the order in which they stay, 0 for the last one to go.

    The method selects half of the tokens again, then a quarter, and so on: what it selects most often stays longest. Where no
    selector made the tokens, they are selected as `evoprune` does.
    """
    if stage := rows.plan.token_stage:
        selector, given = stage.selector, rows.tokens
    else:
        owner = torch.full_like(tokens.owner, -1)
        owner[tokens.kept] = ascending(len(tokens.kept), owner.device)
        selector, seen = FarthestPoints(count=0), rows.tokens
        given = Tokens(tokens.features, owner, rows.plan.grid, seen.seed)
    often, count = torch.zeros_like(tokens.kept), len(tokens.kept) // 2
    while count:
        often += torch.isin(tokens.kept, select(selector, given, count).kept.to(often.device))
        count //= 2
    return often.cpu().argsort(descending=True, stable=True).argsort()

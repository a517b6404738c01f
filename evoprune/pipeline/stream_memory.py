"""The memory of a stream: the KV cache of its windows, which of them are thinned, and in which order their tokens go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evoprune.language.decoder import KVCache, forward
from evoprune.language.generate import embed_ids
from evoprune.methods.evoprune import FarthestPoints
from evoprune.methods.selecting import select
from evoprune.model.config import ANSWER_COLUMNS
from evoprune.pruning.indices import ascending
from evoprune.pruning.types import Tokens
from evoprune.vision.encoded import Encoded, EncodedRows


@dataclass(frozen=True)
class Seen:
    """What of a stream the next question is about; times are those of the frames, in seconds."""

    start_s: float  # of the oldest window of which a token is left
    end_s: float  # of the newest
    windows: int  # that are held
    tokens: int  # that are held
    frames: int  # that were looked at since the stream began, remembered or not
    thinned: int  # windows of which not all tokens are left
    skipped: int = 0  # frames of a live source that were due and not looked at, because the machine was too slow
    lag_s: float | None = None  # of the latest frame behind its source; None where the frames come from somewhere else


@dataclass
class Window:
    """A window of the stream."""

    start_s: float
    end_s: float
    time: int  # position in time of its first frame pair, counted from the first frame of the stream
    order: torch.Tensor  # int64 `[n]`, of each token that is left its place in the order of leaving, 0 for the last one
    whole: int  # number of its tokens before any was thinned


class StreamMemory:
    """Windows in a KV cache, behind what precedes the video in the prompt.

    `ids`: int64 `[n]`, of what precedes the video. `limit`: tokens that are held; `most`: of a window. `room`: positions that the
    video may take.
    """

    @torch.inference_mode()
    def __init__(self, model, ids: torch.Tensor, limit: int, most: int, room: int):
        self.cache = KVCache(model, len(ids) + limit + most + ANSWER_COLUMNS)
        self.windows: list[Window] = []  # of which tokens are left, the oldest first
        self.following = len(ids)  # position of the text after the video
        self._model, self._head, self._limit, self._room = model, len(ids), limit, room
        self._moved = 0  # positions in time by which the beginning of the video was moved
        forward(model, embed_ids(model, ids), ascending(len(ids), "cpu").expand(3, -1), self.cache)

    def seen(self, frames: int, skipped: int, lag_s: float | None) -> Seen | None:
        """What it holds, with what else `Seen` has; None while it holds nothing."""
        windows = list(self.windows)
        if not windows:
            return None
        tokens = sum(len(window.order) for window in windows)
        thinned = sum(len(window.order) < window.whole for window in windows)
        return Seen(windows[0].start_s, windows[-1].end_s, len(windows), tokens, frames, thinned, skipped, lag_s)

    def cut_off(self) -> None:
        """Cuts off the columns of a question and its answer."""
        self.cache.crop(self._head + sum(len(window.order) for window in self.windows))

    @torch.inference_mode()
    def read(self, window: Window, tokens: Encoded, positions: torch.Tensor, pause: Callable[[], None]) -> None:
        """Reads a window, and thins earlier ones. Whatever ends it early leaves a cache that nothing can be read from.

        `positions`: int64 `[3, N]`, of all its units, counted from the first frame of the stream. `pause`: called before every
        layer of the language model. What it raises leaves the cache as it was.
        """
        self._make_room(int(positions[0, -1]))
        own = positions.clone()
        own[0] -= self._moved
        features = tokens.features.to(self._model.model.language_model.norm.weight.dtype)
        forward(self._model, features, own[:, tokens.kept.cpu()] + self._head, self.cache, tokens.size, pause=pause)
        self.following = self._head + int(own.max()) + 1
        self.windows.append(window)
        held = [(len(each.order), each.whole) for each in self.windows]
        self._thin(targets(held, self._limit, max(whole for _, whole in held)))

    def _make_room(self, latest: int) -> None:
        """Moves the beginning of the video to the oldest token that is left, where the position `latest` would be out of range.

        Windows from so long ago that this is not enough go; they have few tokens, unless the context is small.
        """
        if latest - self._moved <= self._room:
            return
        far = self._room * 7 // 8  # not all of it, or every window would move the keys, and round them
        self._thin([0 if latest - each.time > far else len(each.order) for each in self.windows])
        beginning = self.windows[0].time if self.windows else latest
        self.cache.move(self._model.config.text_config, slice(self._head, self.cache.length), self._moved - beginning)
        self._moved = beginning

    def _thin(self, counts: Sequence[int]) -> None:
        """Leaves so many tokens of each window, in the order in which they stay."""
        stay = [window.order < count for window, count in zip(self.windows, counts, strict=True)]
        if all(bool(each.all()) for each in stay):
            return
        head = torch.ones(self._head, dtype=torch.bool, device="cpu")
        self.cache.keep(torch.cat([head, *stay]).nonzero()[:, 0])
        for window, each in zip(self.windows, stay, strict=True):
            window.order = window.order[each]
        self.windows = [window for window in self.windows if len(window.order)]


def targets(windows: Sequence[tuple[int, int]], limit: int, most: int) -> list[int]:
    """How many tokens of each window stay, the oldest window first.

    The newest windows, which together have half of the limit, are whole. Of as many before them half of the tokens is due to
    stay, of as many before those a quarter, and so on until there are none. While there are more than `limit`, those
    that have more than is due lose half, from the oldest on.

    `windows`: of each, the tokens that are left, and those that there were. `limit`: of all together, at least twice `most`, the
    tokens of the largest window.
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
    stage, kept = rows.plan.token_stage, tokens.kept
    if stage:
        selector, given = stage.selector, rows.tokens
    else:
        owner = torch.full_like(tokens.owner, -1)
        owner[tokens.kept] = ascending(len(tokens.kept), owner.device)
        selector = FarthestPoints(count=0)
        given = Tokens(tokens.features, owner, rows.plan.grid, rows.tokens.seconds_per_pair, rows.tokens.seed)
    often, count = torch.zeros_like(kept), len(kept) // 2
    while count:
        often += torch.isin(kept, select(selector, given, count).kept.to(kept.device))
        count //= 2
    return often.cpu().argsort(descending=True, stable=True).argsort()

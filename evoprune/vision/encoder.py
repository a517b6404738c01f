"""The vision tower, run on a model's weights, with rows merged or chosen between its layers.

Video comes in as patches, grid after grid, and is encoded in chunks of whole grids: no layer of the tower looks across grids, but
for references to earlier ones, of which keys and values are kept. So memory stays constant and the result does not depend on the
chunk size. Without pruning the output is Hugging Face's, up to rounding.

A method may choose, after some layers, which rows go through the others. It chooses among all of the video, so from there on all of
it goes together, as many rows as were chosen, and what they are chosen from is held until then.

How many rows merging leaves after each layer is known before the tower runs. So on a GPU every shape is known too, and the host
waits for a result only where rows are chosen, and at the end, when all is looked at that has to be.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from evoprune.errors import UsageError
from evoprune.methods.base import Method, Selection, Tokens
from evoprune.model.numerics import all_numbers, not_a_number_error
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import tally
from evoprune.vision import devices
from evoprune.vision.chunks import in_chunks
from evoprune.vision.encoded import Encoded
from evoprune.vision.families import family
from evoprune.vision.gather import Gathering
from evoprune.vision.layout import chosen_layout
from evoprune.vision.stopwatch import Stopwatch
from evoprune.vision.tower import Past, embed, merged_patches, run_layers, tower_geometry, tower_shape


def encode(
    visual,
    patches: Iterable[torch.Tensor],
    grid: tuple[int, int, int],
    method: Method,
    keep: int,
    *,
    question: torch.Tensor | None = None,
    seconds_per_grid: float = 1.0,
    seed: int = 0,
    chunk_units: int | None = None,
) -> Encoded:
    """Encodes one video so that about `keep` of its units reach the language model.

    Args:
        visual: the tower's weights, a `qwen.Tower`, or transformers' of Qwen2.5-VL or Qwen2-VL.
        patches: pieces of `[rows, 1176]` in Hugging Face's order that add up to the whole video.
        grid: (T, H, W) in merge units (2x2 patches).
        method: the pruning method.
        keep: K, from 1 to T*H*W. Exactly K tokens come out if the method is `exact`; all T*H*W if it prunes nothing here. At
            K = T*H*W rows are merged only if the method has an encoder budget of its own.
        question: `[Q, D]`, embeddings of its tokens, for a method that reads it.
        seconds_per_grid, seed: passed on to the method.
        chunk_units: rows to encode at a time, rounded up to whole blocks of the method; default: `devices.units_at_a_time`. Bounds
            the memory.

    Raises:
        ValueError: `patches` do not add up to the grid.
        UsageError: the method reads the question, and there is none.
        ModelError: what the tower computes is not finite.
    """
    if method.reads_question and question is None:
        raise UsageError(
            f"method {method.name} reads the question, and there is none here",
            "give the question with the video, or choose a method that does without",
        )
    how = {"seconds_per_grid": seconds_per_grid, "seed": seed, "chunk_units": chunk_units}
    return choose(encode_rows(visual, patches, grid, method, keep, **how), question)


@dataclass
class Unchosen:
    """A video in the encoder's rows, before it is chosen what the language model reads of them.

    Attributes:
        method, keep: by whom, and how many tokens.
        tokens: what there is to choose from; by the method's own `select` only if it `selects` here.
        inside: whether rows were merged or chosen inside the tower.
        home: int64 `[E]`, the unit at whose place each row sits.
        source: int64 `[T, H*W]` on the CPU, the number of the grid whose pixels stand for each unit, its own if they are its own.
        layers: as in `Encoded`.
        watch: measures pruning. even: of each chunk, whether it is of one colour. wrong, finite: what was left to be checked at
            the end, of merging and of the rows of each chunk.
    """

    method: Method
    keep: int
    tokens: Tokens
    selects: bool
    inside: bool
    home: torch.Tensor
    source: torch.Tensor
    layers: list[tuple[int, int]]
    watch: Stopwatch
    even: list[torch.Tensor]
    wrong: list[torch.Tensor]
    finite: list[torch.Tensor]

    def nothing(self) -> Encoded:
        """None of it is read yet."""
        flat, seconds = _settled(self)
        rows, owner, none = self.tokens.rows, self.tokens.owner, self.home[:0]
        return Encoded(rows[:0], none, rows, owner, (self.tokens.grid,), self.layers, seconds, flat)


@torch.inference_mode()
def encode_rows(
    visual,
    patches: Iterable[torch.Tensor],
    grid: tuple[int, int, int],
    method: Method,
    keep: int,
    *,
    seconds_per_grid: float = 1.0,
    seed: int = 0,
    chunk_units: int | None = None,
    on_layer: Callable[[int, int], None] = lambda done, total: None,
) -> Unchosen:
    """The tower's part of `encode`, which depends on no question; arguments as there.

    Args:
        on_layer: told how many of the tower's layers are done, and how many there are, where all of the video goes through some of
            them together: it begins only when the last of the patches has come.
    """
    count, height, width = grid
    tower, weight = tower_shape(visual), visual.patch_embed.proj.weight
    geo = tower_geometry(visual, height, width)
    budget = keep / (geo.units * count)
    inside, selects = method.merges(budget), method.chooses(budget)
    early = method.narrows_after(tower, budget) if inside else None
    layers = range(tower.depth if early is None else early)
    gathering = Gathering(method, tower) if selects and method.needs_after else None
    if gathering and early is not None:
        raise TypeError(f"method {method.name} narrows, so it is given nothing but the rows after the encoder")
    block, reuse = (method.block, method.reuse) if inside else (1, 0.0)
    shares = spread(keep, count)
    plan_of = cache(lambda rows, windows, left: method.rows(tower, rows, windows, left))
    rows, owners, homes, sources, base = [], [], [], [], 0
    past = Past()
    computed = [0] * tower.depth  # rows, by each layer
    watch, even, wrong, finite = Stopwatch(weight.device), [], [], []
    at_once = chunk_units or devices.units_at_a_time(weight.device)
    chunks = in_chunks(
        patches,
        geo,
        count,
        block=block,
        rows=at_once,
        threshold=reuse,
        refresh=method.refresh,
        dtype=weight.dtype,
        watch=watch,
        even=even if inside or selects else None,
    )
    for chunk in chunks:
        grids, end = chunk.grids, chunk.first + chunk.grids
        with devices.here(weight.device):  # all bookkeeping lives beside the features
            with watch if reuse else nullcontext():
                layout, last = chunk.layout(geo, block)
            last = last if end < count else None  # nobody will refer to the last chunk
            plan = [[n] * tower.depth for n in layout.per_block]
            if inside:
                due = [sum(shares[at : at + block]) for at in range(chunk.first, end, block)]
                units = [geo.units * min(block, grids - at) for at in range(0, grids, block)]
                plan = [
                    plan_of(
                        rows,
                        size // geo.units * geo.windows,
                        min(rows, method.allowance(size, max(1, share))),
                    )
                    for rows, size, share in zip(layout.per_block, units, due, strict=True)
                ]
            plan = list(zip(*plan, strict=True))
            for layer, blocks in zip(layers, [layout.per_block, *plan], strict=False):
                computed[layer] += sum(blocks)
            x = embed(visual, devices.uploaded(chunk.patches, weight.device))
            x, layout = run_layers(visual, tower, layers, x, layout, plan, method, watch, wrong, last, past, gathering)
            order = layout.home.argsort()
            if gathering:
                with watch:
                    gathering.settle(layout, order)
            number = order.argsort() + base  # of each row among all rows
            if past.row is not None:
                number = torch.cat([number, past.row])
            owner = number[layout.owner]
            if last is not None:
                past.row = owner[last] if past.row is None else torch.where(last < 0, past.row, owner[last])
        if layout.rows:
            rows.append(merged_patches(visual, x[order]) if early is None else x[order])
            finite.append(all_numbers(rows[-1]))
            if not devices.static_shapes(weight.device) and not finite[-1]:
                raise not_a_number_error("encode")
        own = torch.arange(chunk.first, end)[:, None].expand(-1, geo.units)
        sources.append(own if chunk.source is None else chunk.source)
        owners.append(owner)
        homes.append(layout.home[order] + chunk.first * geo.units)
        base += len(order)
    rows, owner, home, narrowed = torch.cat(rows), torch.cat(owners), torch.cat(homes), False
    if early is not None:
        if not _all(finite):
            raise not_a_number_error("encode")
        x = chunk = past = None  # nobody needs them any more
        tokens = Tokens(rows, owner, grid, seconds_per_grid, seed)
        del rows
        with devices.here(weight.device):
            with watch:
                chosen = _narrowed(partial(family(visual).norm, visual.blocks[early].norm1), tokens, method, keep)
                narrowed = chosen is not None
                rows, owner, home = chosen or (tokens.rows, owner, home)
                layout, order = chosen_layout(geo, count, home, owner)
            x, tokens, chosen, rows = rows[order], None, None, None
            computed[early:] = [len(home)] * (tower.depth - early)
            x, _ = run_layers(
                visual, tower, range(early, tower.depth), x, layout, None, method, watch, wrong,
                at_once=at_once, on_layer=lambda done: on_layer(done, tower.depth),
            )  # fmt: skip
            rows = torch.cat([merged_patches(visual, some) for some in x[order.argsort()].split(at_once)])
            finite.append(all_numbers(rows))
    given = gathering.collected() if gathering else {}
    tokens = Tokens(rows, owner, grid, seconds_per_grid, seed, given, home if narrowed else None)
    layers = list(enumerate(computed))
    return Unchosen(method, keep, tokens, selects, inside, home, torch.cat(sources), layers, watch, even, wrong, finite)


def _narrowed(
    next_norm: Callable[[torch.Tensor], torch.Tensor], tokens: Tokens, method: Method, keep: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The rows that go on, `[R, 4, hidden]`, the owner of each unit among them, and the unit at whose place each sits; None if they
    are those that are there.

    Args:
        next_norm: of the layer that they go on to, as a function of rows. They are compared as it takes them in: it leaves little
            of the few channels that are large in all of them.
        tokens: with rows `[E, 4, hidden]`.
    """
    chosen = method.narrow(replace(tokens, rows=next_norm(tokens.rows).flatten(1)), keep)
    if chosen is None:
        return None
    means = chosen.features(tokens.rows.flatten(1), tokens.owner)
    return means.view(-1, *tokens.rows.shape[1:]), chosen.owner, chosen.kept


def _all(flags: list[torch.Tensor]) -> bool:
    """Whether all are true; waits for the device."""
    return bool(torch.stack(flags).all())


@torch.inference_mode()
def choose(video: Unchosen, question: torch.Tensor | None = None) -> Encoded:
    """What the language model reads; may be asked for with one question after another.

    Args:
        question: as in `encode`; not looked at unless the method reads it.
    """
    tokens = video.tokens
    rows, owner = tokens.rows, tokens.owner
    with devices.here(rows.device), video.watch:
        kept, counts = selected(video, question), None
        if isinstance(kept, Selection):
            chosen_inside = kept.kept is tokens.home
            kept, features, counts = kept.kept, rows if chosen_inside else kept.features(rows, owner), kept.counts
        else:
            kept = devices.uploaded(kept, rows.device)
            features = rows[owner[kept]]
    flat, seconds = _settled(video)
    return Encoded(features, kept, rows, owner, (tokens.grid,), video.layers, seconds, flat, counts)


def selected(video: Unchosen, question: torch.Tensor | None = None) -> torch.Tensor | Selection:
    """Which units the language model reads, as the method says it; arguments as `choose`."""
    method, tokens, home = video.method, video.tokens, video.home
    with devices.here(home.device):
        if video.selects:
            if method.reads_question:
                given = {**tokens.given, "question": question.to(home.device).float()}
                tokens = replace(tokens, given=given)
            return method.select(tokens, video.keep)
        if video.inside and len(home) > video.keep:
            return home[_largest(tally(tokens.owner, len(home)), video.keep)]
        return home


def _settled(video: Unchosen) -> tuple[bool, float]:
    """Looks at all that was left to be looked at: whether the video is flat, and the seconds of pruning.

    The one place where the host waits for a GPU, but for where rows are chosen.

    Raises:
        ModelError: some row is not finite. RuntimeError: some group did not lose the rows that it had to.
    """
    if not _all(video.finite):
        raise not_a_number_error("encode")
    if video.wrong and torch.stack(video.wrong).any():
        raise RuntimeError(f"method {video.method.name} did not remove as many rows as it was asked to")
    return bool(video.even) and bool(torch.stack(video.even).all()), video.watch.seconds()


def _largest(size: torch.Tensor, keep: int) -> torch.Tensor:
    """The `keep` rows that stand for most units, ascending. Among equals those that lie evenly through the video.

    This is the last resort for a count below one row a grid, which no merging inside grids can reach.
    """
    order = torch.arange(len(size))
    even = order * keep // len(size)  # a new value wherever an even choice would take the next row
    first = torch.cat([torch.ones(1, dtype=torch.bool), even[1:] != even[:-1]])
    rank = (size * 2 + first).argsort(descending=True, stable=True)
    return rank[:keep].sort().values

"""Methods that drop visual tokens inside the language model: their plans, their inputs, and the code that drops the tokens.

To write a new method, subclass `LanguageMethod` and implement `drops` and either `score` or `select`. For a minimal example, see
contrib/fastv.py.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch

from evoprune.backend import Timer, snap, to_device
from evoprune.errors import UsageError, call
from evoprune.methods.base import Method, check_ranges
from evoprune.methods.budget import Budget
from evoprune.methods.checking import check_selection
from evoprune.methods.ranking import highest
from evoprune.methods.types import Selection, arange_on, nonzero_fixed
from evoprune.model import heads_of, norm, rotate

MAX_WEIGHTS = 1 << 24  # maximum number of attention weights to compute at a time


@dataclass(frozen=True)
class LayerState:
    """The inputs and outputs of the most recent language-model layer, for C columns. A *column* is one token of the prompt."""

    after: int  # number of layers run so far, including this one
    entering: torch.Tensor  # `[C, hidden]`, the layer's input
    x: torch.Tensor  # `[C, hidden]`, the layer's output
    places: tuple[torch.Tensor, torch.Tensor]  # rotary cosines and sines of the columns
    bias: torch.Tensor | None  # `[C]`, added to each column's attention logits
    # `[1, C, heads, head_dim]`, rotated; like the keys and values, None after a layer without attention (a Gated DeltaNet)
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None  # `[1, kv_heads, C, head_dim]`, rotated
    values: torch.Tensor | None = None  # same shape as `keys`


class Drop(NamedTuple):
    """A layer after which visual tokens are dropped, and the number of remaining tokens."""

    after: int  # number of layers run before the drop, at least 1
    left: int  # number of visual tokens that the remaining layers read


@dataclass(frozen=True)
class LanguagePlan:
    """A plan for dropping visual tokens inside the language model, which specifies how many tokens each layer reads."""

    depth: int  # number of layers of the language model
    tokens: int  # number of visual tokens that reach the language model
    drops: tuple[Drop, ...]  # drops in layer order, each leaving fewer tokens; empty if nothing is dropped
    exact: bool = True  # whether the counts are exact; otherwise, they are upper bounds
    looks: tuple[int, ...] = ()  # numbers of layers after which the method is called; same as in `drops` if `exact`
    blind: int = 0  # number of initial layers in which the text after the visual tokens does not attend to them

    @classmethod
    def of(cls, depth: int, tokens: int, left: Mapping[int, int], **more: Any) -> Self:
        """Create a plan from a mapping of layer counts to token counts.

        Args:
            tokens: The number of visual tokens that reach the language model.
            left: The number of tokens to leave, keyed by the number of layers run before the drop. Entries that would not drop any
                tokens are ignored.
            more: Values for other fields. `looks` defaults to the layers in `drops`.
        """
        drops: list[Drop] = []
        read = tokens
        for after, count in left.items():
            if after and count < read:
                drops.append(Drop(after, count))
                read = count
        return cls(depth, tokens, tuple(drops), **{"looks": tuple(drop.after for drop in drops)} | more)

    @staticmethod
    def layers_before(share: float, depth: int) -> int:
        """Convert a relative depth such as 0.25 to a number of layers, from 1 to `depth` - 1. Returns 0 if `depth` is 1."""
        return min(depth - 1, max(1, round(share * depth)))

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of visual tokens that each layer of the language model reads."""
        return tokens_of_layers(self.depth, self.tokens, self.drops)

    @property
    def work(self) -> tuple[tuple[int, int, int], ...] | None:
        """The amount of work per layer, used by the cost estimate and the memory check before any frame is read.

        For each layer, there are three visual token counts: tokens with keys and values, tokens with queries and an attention
        output, and tokens that go through the MLP. If the plan is not `exact`, the counts are upper bounds. None if every layer
        computes everything for all visual tokens.
        """
        if not self.drops:
            return None
        return tuple((count,) * 3 for count in self.layers)

    @property
    def mean(self) -> float:
        """The mean number of visual tokens that the layers after the first drop read."""
        read = self.layers[self.drops[0].after if self.drops else 0 :]
        return sum(read) / len(read)

    def moved(self, places: Sequence[int]) -> Self:
        """Return a plan whose drops follow only numbers of layers in `places` (ascending).

        Each drop moves to the next place, or to the last place if there isn't one after it. If several drops move to the same
        place, the last one applies.
        """

        def place(after: int) -> int:
            return next((each for each in places if each >= after), places[-1])

        drops = {place(drop.after): drop.left for drop in self.drops}
        looks = sorted({place(after) for after in self.looks})
        return replace(self, drops=tuple(map(Drop, drops.keys(), drops.values())), looks=tuple(looks))

    def left(self, after: int) -> int:
        """Return the number of visual tokens that remain after the first `after` layers."""
        return self.layers[min(after, self.depth - 1)]


def tokens_of_layers(depth: int, tokens: int, drops: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the number of visual tokens that each layer of the language model reads.

    Args:
        tokens: The number of visual tokens before the first drop.
        drops: For each drop, the number of layers that run before it and the number of tokens that it leaves.
    """
    edges = [(0, tokens), *drops, (depth, 0)]
    return tuple(left for (after, left), (end, _) in pairwise(edges) for _ in range(after, end))


def one_drop(depth: int, tokens: int, place: float, budget: float) -> LanguagePlan:
    """Return a plan that drops tokens once.

    Args:
        depth: The number of language model layers.
        tokens: The number of visual tokens before the drop.
        place: The relative depth at which tokens are dropped, from 0 to 1.
        budget: The fraction of tokens to leave. The plan leaves `Budget.count(budget, tokens)` tokens.
    """
    return LanguagePlan.of(depth, tokens, {LanguagePlan.layers_before(place, depth): Budget.count(budget, tokens)})


def several_drops(
    depth: int, tokens: int, places: Sequence[float], shares: Callable[[float], Sequence[float]], budget: float
) -> LanguagePlan:
    """Return a plan that drops tokens in several steps and meets the budget on average.

    Args:
        depth: The number of language model layers.
        tokens: The number of visual tokens before the first drop.
        places: The relative depths of the drops.
        shares: A function that takes a number from 0 to 1 and returns the fraction of tokens left after each drop. The fractions
            must increase with the number, so that a binary search can find the ones that meet the budget.
        budget: The fraction of tokens left, averaged over the layers after the first drop.
    """
    layers = [LanguagePlan.layers_before(place, depth) for place in places]
    # Number of layers until the next drop.
    runs = [end - start for start, end in zip(layers, [*layers[1:], depth], strict=True)]
    low = 0.0
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(run * share for run, share in zip(runs, shares(middle), strict=True)) / max(1, sum(runs))
        if mean < budget:
            low = middle
        else:
            high = middle
    # The product is first rounded to 6 decimal places, because the search may stop slightly below an exact half.
    counts = [max(1, math.floor(round(share * tokens, 6) + 0.5)) for share in shares(high)]
    # If several drops follow the same layer, the last one applies.
    return LanguagePlan.of(depth, tokens, dict(zip(layers, counts, strict=True)))


@dataclass(frozen=True)
class LayerTokens:
    """The n visual tokens after a language-model layer, as seen by the pruning method.

    A *column* is one token of the prompt. The prompt has C columns.
    """

    after: int  # number of layers run so far, including this one
    left: int  # number of tokens to leave; an upper bound if the method is not `exact`
    due: bool  # whether the plan has a drop after this layer; a non-`exact` method may also drop earlier or later
    hidden: torch.Tensor  # [n, hidden], the layer's output for the visual tokens, in the model's dtype
    visual: torch.Tensor  # int64 [n], the columns of the visual tokens among the layer's C columns, ascending
    pair: torch.Tensor  # int64 [n], the index of the token's frame pair
    place: torch.Tensor  # float32 [n, 2], the token's row and column in the frame, as fractions of its height and width
    # [Q, heads, head_dim], queries of the text after the last visual token, rotated. Like the keys and values, they are None after
    # a layer without attention, which only methods that set `attends` to "next" encounter.
    queries: torch.Tensor | None
    keys: torch.Tensor | None  # [C, kv_heads, head_dim], keys of the columns, rotated; neighboring heads share a key
    values: torch.Tensor | None  # [C, kv_heads, head_dim]
    bias: torch.Tensor | None  # [C], added to each column's attention logits
    visual_embeds: torch.Tensor  # [N, hidden], all visual tokens as fed to the first layer
    text_embeds: torch.Tensor  # [Q, hidden], the text after the last visual token, as fed to the first layer
    memory: dict = field(default_factory=dict)  # state that the method carries between layers; empty for a new prompt
    # Functions that return the same tokens with different queries and keys: `following` uses the next layer's projections,
    # `unrotated` skips the rotary embedding, and `evened` replaces the keys of all visual tokens with their mean.
    following: Callable[[], "LayerTokens"] | None = None
    unrotated: Callable[[], "LayerTokens"] | None = None
    evened: Callable[[], "LayerTokens"] | None = None

    def copied(self) -> "LayerTokens":
        """Return a copy with cloned tensors. `memory` is shared with the original."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        own = {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
        others = {name: lambda make=make: make().copied() for name, make in values.items() if callable(make)}
        return replace(self, **own, **others)

    def attention(self, rows: torch.Tensor | None = None, *, most: bool = False, causal: bool = True) -> torch.Tensor:
        """Return the attention that each visual token receives from the text, averaged over heads and queries: float32 `[n]`.

        Args:
            rows: int64 `[q]`, the queries to include, as indices into `queries`. None uses only the last token of the prompt.
            most: Whether to take the maximum over heads and queries instead of their mean.
            causal: Whether to apply the causal mask, so that each query attends only to columns up to its own.
        """
        if rows is None:
            rows = arange_on(len(self.queries), self.queries.device)[-1:]
        heads = self.queries.shape[1]
        columns = len(self.keys)
        keys = self.keys.permute(1, 2, 0).float()
        received = keys.new_zeros(len(self.visual))
        for block in rows.split(max(1, MAX_WEIGHTS // (heads * columns))):
            given = self._weights(block, keys, causal)[:, self.visual]
            received = torch.maximum(received, given.amax(0)) if most else received + given.sum(0)
        if most:
            return received
        return received / (heads * len(rows))

    def last_weights(self, count: int = 1) -> torch.Tensor:
        """Return the attention that each column receives from the last `count` columns, averaged per head: float32 `[heads, C]`."""
        last = arange_on(len(self.queries), self.queries.device)[-count:]
        weights = self._weights(last, self.keys.permute(1, 2, 0).float(), causal=True)
        return weights.unflatten(0, (-1, len(last))).mean(1)

    def _weights(self, rows: torch.Tensor, keys: torch.Tensor, causal: bool) -> torch.Tensor:
        """Compute the attention weights for some of the `queries`.

        Args:
            rows: int64 `[q]`, indices into `queries`.
            keys: float32 `[kv_heads, head_dim, C]`, one key per column.
            causal: Whether to apply the causal mask, so that each query attends only to columns up to its own.

        Returns:
            `[heads * q, C]`, ordered by head.
        """
        kv_heads, dim, columns = keys.shape
        queries = self.queries[rows].float().view(len(rows), kv_heads, -1, dim).permute(1, 2, 0, 3)
        logits = (queries.reshape(kv_heads, -1, dim) @ keys).view(-1, len(rows), columns) * dim**-0.5
        if self.bias is not None:
            logits += self.bias.float()
        if causal:
            own = rows + (columns - len(self.queries))
            logits.masked_fill_(arange_on(columns, rows.device) > own[:, None], -torch.inf)
        return logits.softmax(-1).flatten(0, 1)


@dataclass(frozen=True)
class LanguageMethod(Method, ABC):
    """Drops the lowest-scoring visual tokens after certain layers of the language model, while the model reads the prompt.

    Dropped tokens are no longer available to later layers or during decoding. The remaining tokens keep their positions. If the
    method is used alone (`fastv -b 0.25`), it must meet the budget itself. If it follows another method (`evoprune+fastv`), the
    budget applies to the other method, and this method keeps a `share` fraction of the tokens that it receives. Both the budget and
    `share` are averages over the layers after the first drop.
    """

    acts: ClassVar[Literal["language"]] = "language"
    default_share: ClassVar[float] = 0.5  # the fraction used in the method's paper
    # The layers that must have attention, because the method reads their queries and keys, or changes their attention: the layer
    # before each drop ("latest"), the layer after it ("next"; see `LayerTokens.following`), or all layers ("every"). In models with
    # Gated DeltaNets, `plan` moves the drops accordingly.
    attends: ClassVar[Literal["latest", "next", "every"]] = "latest"

    # This method's budget when it follows another method, in (0, 1]; None uses `default_share`.
    share: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.share is not None:
            check_ranges(self, share="(0, 1]")

    @property
    def left(self) -> float:
        """The fraction of visual tokens that this method keeps if it follows another method."""
        return self.default_share if self.share is None else self.share

    @abstractmethod
    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        """Plan how many tokens to drop after which layers.

        Args:
            tokens: The number of visual tokens that reach the language model.
            budget: The fraction of these tokens to leave, averaged over the layers after the first drop.
        """

    def plan(self, depth: int, tokens: int, budget: float, linear: Collection[int] = ()) -> LanguagePlan:
        """Return the plan of `drops`, adapted to a model in which some layers have no attention.

        Each drop moves to the next layer at which `attends` is met, or to the last such layer if there isn't one after it. Moving
        several drops changes the mean number of tokens, so they leave fewer or more tokens, such that the mean is at most that of
        the original plan.

        Args:
            depth, tokens, budget: See `drops`.
            linear: The indices of the Gated DeltaNet layers, which have no attention.

        Raises:
            UsageError: If the method needs attention in every layer, or there is no layer to which the drops can move.
        """
        if linear and self.attends == "every":
            raise self._unsuited("needs attention in every layer")
        plan = self.drops(depth, tokens, budget)
        if not (linear and plan.looks):
            return plan
        if plan.blind:
            raise self._unsuited("hides visual tokens from the text in some layers")
        scored = 0 if self.attends == "next" else -1
        places = [after for after in range(1, depth) if after + scored not in linear]
        if not places:
            raise self._unsuited("drops tokens next to an attention layer")
        made = plan.moved(places)
        if len(plan.drops) > 1:
            low, high = 0.0, 1.0
            for _ in range(30):
                middle = (low + high) / 2
                tried = self.drops(depth, tokens, middle).moved(places)
                if tried.mean > plan.mean:
                    high = middle
                else:
                    low, made = middle, tried
        return made

    def _unsuited(self, why: str) -> UsageError:
        problem = (
            f"method {self.name} {why}, but most layers of this model are Gated DeltaNets, which have no attention"
        )
        return UsageError(problem, "use evoprune or fastv, or a model with attention in all layers, such as Qwen3-VL")

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        """Return a nonnegative score for each visual token: float32 `[n]`. The highest-scoring tokens are kept.

        By default, the score is the attention that a token receives from the last prompt token.
        """
        return tokens.attention()

    def select(self, tokens: LayerTokens) -> Selection | None:
        """Select the visual tokens to keep after one of the layers listed in the plan's `looks`.

        An `exact` method must select `tokens.left` tokens. Other methods may select fewer, or return None to drop no tokens after
        this layer. The selection's indices refer to `tokens.visual`. The selection's `size` is ignored, because tokens keep their
        cluster sizes.
        """
        # Scores with a relative difference below 1/10,000 are considered ties.
        return Selection(highest(snap(self.score(tokens).log()), tokens.left))

    def plan_for(self, model, tokens: int, budget: float) -> LanguagePlan:
        """Return the plan for a prompt of a loaded model. See `plan`."""
        config = model.config.text_config
        return self.plan(config.num_hidden_layers, tokens, budget, config.linear_layers)

    def reading(
        self, model, budget: float, embeds: torch.Tensor, visual: torch.Tensor, pair: torch.Tensor, place: torch.Tensor
    ) -> "Dropping":
        """Return the object that drops tokens while the decoder reads one prompt. See `Dropping` for the arguments."""
        return Dropping(self, self.plan_for(model, len(visual), budget), model, embeds, visual, pair, place)


def select_in_language(method: LanguageMethod, tokens: LayerTokens) -> Selection | None:
    """Run a method's `select`, and validate its result if the method is provided by another package.

    Returns:
        The visual tokens to keep after this language-model layer, or None if no tokens are dropped.

    Raises:
        PluginError: If the selection is invalid.
    """
    name = method.package
    count = len(tokens.visual)
    # The keys and values belong to the KV cache, and methods from other packages may modify their arguments in place.
    if name:
        tokens = tokens.copied()
    selection = call(name, method.select, tokens)
    if name and selection is not None:
        left = getattr(getattr(selection, "kept", None), "shape", (0,))[0]
        enough = left == tokens.left if method.exact else left <= tokens.left
        check_selection(name, selection, enough, tokens.left, count, tokens.hidden.device)
    return selection


class Dropping:
    """Drops visual tokens after certain language-model layers while the model reads one prompt.

    Args:
        method: The method that selects the tokens.
        plan: The layers after which to drop tokens, and the number of tokens to leave.
        embeds: `[C, hidden]`, the embeddings of the prompt.
        visual: int64 `[n]`, the columns of the visual tokens, ascending. They never include the last column of the prompt.
        pair: int64 `[n]`, the frame pair of each visual token.
        place: float32 `[n, 2]`, each token's row and column in the frame, as fractions of its height and width.
    """

    # The number of visual tokens that each layer computes, as in `LanguagePlan.work`. None if every layer computes everything for
    # all remaining visual tokens.
    work: tuple[tuple[int, int, int], ...] | None = None

    def __init__(
        self,
        method: LanguageMethod,
        plan: LanguagePlan,
        model,
        embeds: torch.Tensor,
        visual: torch.Tensor,
        pair: torch.Tensor,
        place: torch.Tensor,
    ):
        self._model = model
        self._method = method
        self._plan = plan
        self._visual, self._pair, self._place = (to_device(tensor, embeds.device) for tensor in (visual, pair, place))
        self._others = len(embeds) - len(visual)
        self._text = len(embeds) - 1 - int(visual[-1])  # number of columns after the last visual token
        self._embeds = embeds[self._visual], embeds[len(embeds) - self._text :]
        self._memory: dict = {}
        # For each drop, (number of layers run before it, number of visual tokens left).
        self.dropped: list[tuple[int, int]] = []
        self.timer = Timer(embeds.device)

    @property
    def columns(self) -> tuple[int, ...]:
        """Upper bound on the number of prompt tokens (columns) for which each layer stores keys."""
        return tuple(keys + self._others for keys, _, _ in self._plan.work)

    @property
    def layers(self) -> tuple[int, ...]:
        """The number of visual tokens for which each layer stores keys once the prompt has been read."""
        return tokens_of_layers(self._plan.depth, self._plan.tokens, self.dropped)

    def before(self, layer: int, columns: int) -> tuple[tuple[torch.Tensor, int] | None, list[torch.Tensor]]:
        """Determine which computations a layer can skip.

        Args:
            layer: The index of the layer.
            columns: The number of prompt columns that the layer reads.

        Returns:
            An attention restriction and a column restriction. The attention restriction consists of the columns (int64) that the
            text after the visual tokens attends to, and the column at which this text starts. It is None if the text attends to all
            columns. The column restriction is a list of the columns (int64, ascending) for which the layer computes keys, queries,
            and the MLP, respectively. The list is empty if the layer computes everything.
        """
        if layer >= self._plan.blind:
            return None, []
        no_token = torch.zeros_like(self._visual, dtype=torch.bool)
        return (self._with_text(columns, no_token, 0), columns - self._text), []

    def _with_text(self, columns: int, stays: torch.Tensor, count: int) -> torch.Tensor:
        """Return the columns of all text tokens and of the kept visual tokens: int64, ascending.

        Args:
            columns: The number of prompt columns before the drop.
            stays: bool `[n]`, True for visual tokens to keep.
            count: The number of True entries in `stays`.
        """
        mask = torch.ones(columns, dtype=torch.bool, device=stays.device).index_copy_(0, self._visual, stays)
        return nonzero_fixed(mask, columns - len(stays) + count)

    def after(
        self, state: LayerState, deepstack: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Drop tokens after a layer if the plan schedules a drop there.

        Args:
            state: The inputs and outputs of the layer.
            deepstack: `[n, C, hidden]`, the features to add to the columns after each of the next n layers.

        Returns:
            The layer's output for the remaining columns, their `deepstack` features, and their int64 indices among the C columns.
            The indices are None if all columns remain.
        """
        if state.after not in self._plan.looks:
            return state.x, deepstack, None
        with self.timer:
            selection = self._selected(state)
            if selection is None:
                return state.x, deepstack, None
            kept = selection.kept
            old = self._visual
            stays = torch.zeros_like(old, dtype=torch.bool).index_fill_(0, kept, True)
            stay = self._with_text(len(state.x), stays, len(kept))
            self._visual = torch.searchsorted(stay, old[kept])
            self._pair, self._place = self._pair[kept], self._place[kept]
            every = state.x, *deepstack
            new = torch.stack([tensor[stay] for tensor in every])
            if selection.unit_to_token is not None and len(kept):
                for before, tensor in zip(every, new, strict=True):
                    tensor[self._visual] = selection.features(before[old])
            self.dropped.append((state.after, len(kept)))
            return new[0], new[1:], stay

    def _selected(self, state: LayerState) -> Selection | None:
        """Return the selection of visual tokens to keep after this layer, or None to keep all of them."""
        plan = self._plan
        left = plan.left(state.after) if plan.exact else plan.drops[-1].left
        return self._chosen(state, left)

    def _chosen(self, state: LayerState, left: int) -> Selection | None:
        """Return the method's selection of `left` tokens. Selections by plug-in methods are validated."""
        return select_in_language(self._method, self._seen(state, left))

    def _seen(self, state: LayerState, left: int) -> LayerTokens:
        layers = self._model.model.language_model.layers
        after = state.after
        entering = state.entering
        x = state.x
        queries = keys = values = None
        due = after in {drop.after for drop in self._plan.drops}
        latest = layers[after - 1]
        cos, sin = state.places
        texts = slice(len(x) - self._text, None)
        if state.queries is not None:
            queries = state.queries[0][texts]
            keys = state.keys[0].transpose(0, 1)
            values = state.values[0].transpose(0, 1)
        seen = LayerTokens(
            after, left, due, x[self._visual], self._visual, self._pair, self._place, queries,
            keys, values, state.bias, *self._embeds, self._memory,
        )  # fmt: skip

        def following() -> LayerTokens:
            asks = rotate(self._projected(layers[after], "q", x[texts]), cos[texts], sin[texts])
            return replace(seen, queries=asks, keys=rotate(self._projected(layers[after], "k", x), cos, sin))

        def unrotated() -> LayerTokens:
            asks = self._projected(latest, "q", entering[texts])
            return replace(seen, queries=asks, keys=self._projected(latest, "k", entering))

        def evened() -> LayerTokens:
            mean = self._projected(latest, "k", entering[self._visual]).float().mean(0).to(keys)
            same = rotate(mean.expand(len(self._visual), -1, -1), cos[self._visual], sin[self._visual])
            return replace(seen, keys=keys.index_copy(0, self._visual, same))

        return replace(seen, following=following, unrotated=unrotated, evened=evened)

    def _projected(self, layer, name: str, x: torch.Tensor) -> torch.Tensor:
        """Project a layer's input `x` to queries ("q") or keys ("k"), without rotary embeddings: `[C, heads, head_dim]`."""
        config = self._model.config.text_config
        if not hasattr(layer, "self_attn"):
            problem = f"method {self._method.name} reads the attention of a layer that has none (a Gated DeltaNet)"
            raise UsageError(
                problem, "use evoprune or fastv, or a model with attention in all layers, such as Qwen3-VL"
            )
        return heads_of(layer.self_attn, name, norm(x, layer.input_layernorm.weight, config), config)[0]

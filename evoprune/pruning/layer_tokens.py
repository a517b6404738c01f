"""The visual tokens of a prompt as a language method sees them, behind one layer of the language model."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from evoprune.pruning.indices import ascending

HELD = 1 << 24  # attention weights that are held at a time


@dataclass(frozen=True)
class LayerTokens:
    """The n visual tokens that a layer of the language model read. A *column* is one token of the prompt."""

    after: int  # layers that have run, this one included
    left: int  # tokens to leave; where the method is not `exact`, at most so many
    due: bool  # whether the plan has a drop here; a method that is not `exact` may drop before that, and later
    hidden: torch.Tensor  # [n, hidden], the layer's output for the visual tokens, in the model's dtype
    visual: torch.Tensor  # int64 [n], the columns of the visual tokens among the C that this layer read, ascending
    pair: torch.Tensor  # int64 [n], the number of the frame pair of each
    queries: torch.Tensor  # [Q, heads, head_dim], of the text after the last visual token, rotated
    keys: torch.Tensor  # [C, kv_heads, head_dim], of all columns, rotated; neighbouring heads share them
    values: torch.Tensor  # [C, kv_heads, head_dim]
    bias: torch.Tensor | None  # [C], what attention adds to the logits of each column
    visual_embeds: torch.Tensor  # [N, hidden], all visual tokens as they reached the first layer
    text_embeds: torch.Tensor  # [Q, hidden], the text after the last visual token as it reached the first layer
    memory: dict = field(
        default_factory=dict
    )  # what the method keeps from layer to layer of one prompt; empty at first
    # The same with queries and keys of the next layer, of this layer before rotary, or as if all visual tokens had the mean key.
    following: Callable[[], "LayerTokens"] | None = None
    unrotated: Callable[[], "LayerTokens"] | None = None
    evened: Callable[[], "LayerTokens"] | None = None

    def copied(self) -> "LayerTokens":
        """The same tokens in memory of their own. `memory` is the same."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        own = {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
        others = {name: lambda make=make: make().copied() for name, make in values.items() if callable(make)}
        return replace(self, **own, **others)

    def attention(self, rows: torch.Tensor | None = None, *, most: bool = False, causal: bool = True) -> torch.Tensor:
        """float32 `[n]`: how much attention each visual token gets, as the mean over heads and queries.

        Args:
            rows: int64 `[q]`, which of `queries` look; None for the last column of the prompt.
            most: the maximum over heads and queries instead of the mean.
            causal: whether a query sees only columns up to its own.
        """
        rows = ascending(len(self.queries), self.queries.device)[-1:] if rows is None else rows
        heads, columns = self.queries.shape[1], len(self.keys)
        keys = self.keys.permute(1, 2, 0).float()
        found = keys.new_zeros(len(self.visual))
        for some in rows.split(max(1, HELD // (heads * columns))):
            given = self._weights(some, keys, causal)[:, self.visual]
            found = torch.maximum(found, given.amax(0)) if most else found + given.sum(0)
        return found if most else found / (heads * len(rows))

    def last_weights(self, count: int = 1) -> torch.Tensor:
        """float32 `[heads, C]`: the attention of the prompt's last columns to every column, head by head, as the mean over them."""
        last = ascending(len(self.queries), self.queries.device)[-count:]
        return (
            self._weights(last, self.keys.permute(1, 2, 0).float(), causal=True).unflatten(0, (-1, len(last))).mean(1)
        )

    def _weights(self, rows: torch.Tensor, keys: torch.Tensor, causal: bool) -> torch.Tensor:
        """Attention weights `[heads * q, C]`, heads first, of some queries; `keys`: float32 `[kv_heads, head_dim, C]`."""
        kv_heads, dim, columns = keys.shape
        queries = self.queries[rows].float().view(len(rows), kv_heads, -1, dim).permute(1, 2, 0, 3)
        logits = (queries.reshape(kv_heads, -1, dim) @ keys).view(-1, len(rows), columns) * dim**-0.5
        if self.bias is not None:
            logits += self.bias.float()
        if causal:
            own = rows + (columns - len(self.queries))
            logits.masked_fill_(ascending(columns, rows.device) > own[:, None], -torch.inf)
        return logits.softmax(-1).flatten(0, 1)

"""Visual tokens leave the language model while it reads a prompt: what a language method sees, and what of it stays."""

from dataclasses import dataclass, replace

import torch

from evoprune.backend.devices import Timer, to_device
from evoprune.methods.base import LanguageMethod
from evoprune.methods.chain import select_in_language
from evoprune.methods.plans import KINDS, LanguagePlan, tokens_of_layers
from evoprune.methods.types import LayerTokens, Selection, true_indices
from evoprune.model.numerics import heads_of, norm, rotate


@dataclass(frozen=True)
class LayerState:
    """What the latest layer of the language model read and made, for C columns."""

    after: int  # layers that have run
    entering: torch.Tensor  # `[C, hidden]`, the input of the latest of them
    x: torch.Tensor  # `[C, hidden]`, its output
    places: tuple[torch.Tensor, torch.Tensor]  # cosines and sines of the columns
    bias: torch.Tensor | None  # `[C]`, see `attention.attend`
    queries: torch.Tensor  # `[1, C, heads, head_dim]`, rotated
    keys: torch.Tensor  # `[1, kv_heads, C, head_dim]`, rotated
    values: torch.Tensor  # as `keys`


class Dropping:
    """One prompt while the language model reads it.

    Args:
        embeds: `[C, hidden]`, the prompt.
        visual: int64 `[n]`, the columns of the visual tokens, ascending, not the last column of the prompt among them.
        pair: int64 `[n]`, the number of the frame pair of each visual token.
        place: float32 `[n, 2]`, see `LayerTokens`.
    """

    def __init__(
        self,
        model,
        method: LanguageMethod,
        plan: LanguagePlan,
        embeds: torch.Tensor,
        visual: torch.Tensor,
        pair: torch.Tensor,
        place: torch.Tensor,
    ):
        self._model, self._method, self._plan = model, method, plan
        self._visual, self._pair, self._place = (to_device(each, embeds.device) for each in (visual, pair, place))
        self._others = len(embeds) - len(visual)
        self._text = len(embeds) - 1 - int(visual[-1])  # columns after the last of them
        self._embeds = embeds[self._visual], embeds[len(embeds) - self._text :]
        self._memory: dict = {}
        self._key: torch.Tensor | None = None  # bool, the visual tokens in the key group; None before that is known
        self.dropped: list[tuple[int, int]] = []  # of each drop, layers that had run and visual tokens that were left
        self.timer = Timer(embeds.device)  # of what the method computes

    @property
    def columns(self) -> tuple[int, ...]:
        """Columns of the prompt whose keys each layer has, at most."""
        return tuple(keys + self._others for keys, _, _ in self._plan.work)

    @property
    def layers(self) -> tuple[int, ...]:
        """Visual tokens whose keys each layer has, once the prompt was read."""
        if self.work:
            return tuple(keys for keys, _, _ in self.work)
        return tokens_of_layers(self._plan.depth, self._plan.tokens, self.dropped)

    @property
    def work(self) -> tuple[tuple[int, int, int], ...] | None:
        """As `LanguagePlan.work`, where layers do not compute the same for all visual tokens that are there; else None."""
        return self._plan.work if self._plan.groups else None

    def looks(self, after: int) -> bool:
        """Whether the method is asked once `after` layers have run."""
        return after in self._plan.looks

    def blind(self, layer: int, columns: int) -> tuple[torch.Tensor, int] | None:
        """The only columns (int64) that text after the visual tokens attends to in a layer, and where it begins; None for all."""
        if layer >= self._plan.blind:
            return None
        return self._with_text(columns, torch.zeros_like(self._visual, dtype=torch.bool), 0), columns - self._text

    def rows(self, layer: int, columns: int) -> list[torch.Tensor]:
        """For which of its columns a layer computes each of `KINDS`, int64, ascending; empty where it computes everything."""
        groups = self._plan.groups
        if self._key is None or all(all(groups.computed(layer, kind)) for kind in KINDS):
            return []
        stays = (torch.where(self._key, *groups.computed(layer, kind)) for kind in KINDS)
        return [self._with_text(columns, *each) for each in zip(stays, self._plan.work[layer], strict=True)]

    def _with_text(self, columns: int, stays: torch.Tensor, count: int) -> torch.Tensor:
        """int64, ascending: those of `columns` that are no visual tokens, or of which `stays` (bool `[n]`, `count` of them)."""
        mask = torch.ones(columns, dtype=torch.bool, device=stays.device).index_copy_(0, self._visual, stays)
        return true_indices(mask, columns - len(stays) + count)

    def drop(
        self, state: LayerState, deepstack: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The columns for the next layer, of the C that there are; their `deepstack`; and int64 which these are, None for all.

        `deepstack`: `[n, C, hidden]`, what is added to the columns after the next n layers.
        """
        with self.timer:
            found = self._selected(state)
            if found is None:
                return state.x, deepstack, None
            kept, old = found.kept, self._visual
            stays = torch.zeros_like(old, dtype=torch.bool).index_fill_(0, kept, True)
            stay = self._with_text(len(state.x), stays, len(kept))
            self._visual = torch.searchsorted(stay, old[kept])
            self._pair, self._place = self._pair[kept], self._place[kept]
            self._key = None if self._key is None else self._key[kept]
            every = state.x, *deepstack
            made = torch.stack([each[stay] for each in every])
            if found.owner is not None and len(kept):
                for before, each in zip(every, made, strict=True):
                    each[self._visual] = found.features(before[old])
            self.dropped.append((state.after, len(kept)))
            return made[0], made[1:], stay

    def _selected(self, state: LayerState) -> Selection | None:
        """The tokens that stay, None for all: as the method says; or with groups those of the key group, where the rest leaves."""
        if self._plan.groups is None:
            return select_in_language(self._method, self._seen(state))
        if self._key is None:
            kept = select_in_language(self._method, self._seen(state)).kept
            self._key = torch.zeros_like(self._visual, dtype=torch.bool).index_fill_(0, kept, True)
        left = self._plan.left(state.after)
        return None if left == len(self._key) else Selection(true_indices(self._key, left))

    def _seen(self, state: LayerState) -> LayerTokens:
        layers, plan = self._model.model.language_model.layers, self._plan
        after, entering, x = state.after, state.entering, state.x
        keys, values = state.keys[0].transpose(0, 1), state.values[0].transpose(0, 1)
        left, due = plan.left(after) if plan.exact else plan.drops[-1].left, after in {d.after for d in plan.drops}
        left = left if plan.groups is None else plan.groups.key
        latest, (cos, sin), texts = layers[after - 1], state.places, slice(len(x) - self._text, None)
        seen = LayerTokens(
            after, left, due, x[self._visual], self._visual, self._pair, self._place, state.queries[0][texts],
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
        """Queries or keys ("q", "k") `[C, heads, head_dim]` of a layer for its input, before rotary."""
        config = self._model.config.text_config
        return heads_of(layer.self_attn, name, norm(x, layer.input_layernorm.weight, config.rms_norm_eps), config)

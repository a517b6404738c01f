"""Keys and values of what several prompts begin with: they are computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.language.decoder import KVCache
from evoprune.language.generate import PrefillState, can_crop, layers_of, new_cache, prefill
from evoprune.language.hosted import HostedCache
from evoprune.language.prompt import Prompt
from evoprune.language.pruned import PrunedPrompt
from evoprune.methods import Dropping


@dataclass
class Held:
    """A cache, and what it holds."""

    cache: KVCache | HostedCache
    prompt: torch.Tensor  # int64 on the CPU, ids of its first columns
    answer: Sequence[int] = ()  # of those behind them, which may become more

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat([self.prompt, torch.tensor(self.answer, dtype=torch.int64, device="cpu")])

    def common(self, ids: torch.Tensor) -> int:
        """Return how many columns a prompt begins with, of the same inputs, that the cache holds. `ids`: int64 on the CPU."""
        own = self.ids
        length = min(len(own), len(ids))
        differ = (own[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Keys and values of the beginning of prompts about the same inputs.

    Attention is causal: keys and values before the question do not depend on it. So a later question under the same system prompt
    uses them again, and one of a conversation also those of what was said. If tokens leave inside the language model, they leave by
    the question, and each prompt is read as a whole.

    A recurrent state (Qwen3.5) is known only where a pass ends. So if layers have one, what is before the question is a pass of its
    own, and in a conversation so is what is before the answer, unless no question follows. One that follows after all waits longer.
    """

    def __init__(self, model):
        self._model = model
        # What prompts were read up to: one cache, which can be cropped, or copies of recurrent ones, the shortest first.
        self._held: list[Held] = []

    def forget(self) -> None:
        """Drop all caches: the tokens of the inputs change."""
        self._held = []

    def read(
        self, pruned: PrunedPrompt, prompt: Prompt, last: bool, goes_on: bool, dropping: Dropping | None
    ) -> PrefillState:
        """Read a prompt, but for what is known of it. Returns the state from which its answer is decoded.

        Args:
            pruned: The columns of `prompt`.
            last: Whether nothing has to be kept for another question.
            goes_on: Whether the next question may be one of the same conversation.
            dropping: What leaves inside the language model; None if nothing does.
        """
        model = self._model
        if dropping is not None:
            return prefill(
                model, pruned.embeds, pruned.positions, pruned.following, None, pruned.sizes, dropping, pruned.deepstack
            )
        crops = can_crop(model)
        # Columns up to which another prompt may be the same.
        ends = [prompt.prefix_length, prompt.turn_length] if goes_on else [prompt.prefix_length]
        ends = [int((pruned.columns < end).sum()) for end in ends]
        if goes_on and crops:
            ends.append(len(pruned) - 1)  # the last column is read in any case: its logits are those of the answer
        inputs = int(pruned.visual.nonzero()[-1]) + 1
        cache, known = self._take(pruned.ids[: ends[-1]], inputs, last)
        if not (crops or last):
            for end in ends:
                if end <= known:
                    continue
                if cache is None:
                    cache = new_cache(model, end)
                part = pruned[known:end]
                given = {"sizes": part.sizes, "deepstack": part.deepstack}
                layers_of(model).forward(model, part.embeds, part.positions, cache, **given)
                self._held = [*self._held[:1], Held(cache, pruned.ids[:end])]
                cache = cache.copy()
                known = end
        rest = pruned[known:]
        state = prefill(model, rest.embeds, rest.positions, rest.following, cache, rest.sizes, None, rest.deepstack)
        if crops and goes_on:
            self._held = [Held(state.cache, pruned.ids, state.answer)]
        elif crops:
            self._held = [Held(state.cache, pruned.ids[: ends[-1]])]
        return state

    def _take(self, ids: torch.Tensor, inputs: int, last: bool) -> tuple[KVCache | HostedCache | None, int]:
        """Return a cache of the beginning of a prompt, and how many of its columns it holds.

        `ids`: int64 on the CPU, those columns of the prompt that another one may have had. `inputs`: columns up to the end of the
        inputs; a cache that holds fewer is of no use.
        """
        held = self._held
        self._held = []
        if can_crop(self._model):
            if not held or (known := held[0].common(ids)) < inputs:
                return None, 0
            cache = held[0].cache
            cache.crop(known)
            self._held = [Held(cache, ids[:known])]  # a prompt that breaks off leaves this much
            return cache, known
        held = [each for each in held if each.common(ids) == len(each.prompt)]
        if not held:
            return None, 0
        longest = held[-1]
        if last:
            return longest.cache, len(longest.prompt)
        self._held = held
        return longest.cache.copy(), len(longest.prompt)

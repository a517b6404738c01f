"""A cache for the common beginning of several prompts, so that its keys and values are computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.language.decoder import KVCache
from evoprune.language.generate import LanguageModel, PrefillState
from evoprune.language.hosted import HostedCache
from evoprune.language.prompt import Prompt
from evoprune.language.pruned import PrunedPrompt
from evoprune.methods import Dropping


@dataclass
class CachedPrefix:
    """A KV cache and the token ids that it holds."""

    cache: KVCache | HostedCache
    prompt: torch.Tensor  # int64 on the CPU, token ids of the cache's leading columns
    answer: Sequence[int] = ()  # token ids of the columns after the prompt; may grow while an answer is decoded

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat([self.prompt, torch.tensor(self.answer, dtype=torch.int64, device="cpu")])

    def common(self, ids: torch.Tensor) -> int:
        """Return the number of leading columns that the cache shares with a prompt about the same inputs.

        Args:
            ids: int64 on the CPU, token ids of the prompt.
        """
        own = self.ids
        length = min(len(own), len(ids))
        differ = (own[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Cached keys and values for the beginning of prompts about the same inputs.

    Attention is causal, so keys and values before the question do not depend on the question. A later question under the same
    system prompt reuses them, and a later question of a conversation also reuses the earlier turns. If a method drops tokens inside
    the language model, the choice of tokens depends on the question, so every prompt is read in full.

    A recurrent state (Qwen3.5) is available only at the end of a pass. On models with recurrent layers, the part before the
    question is therefore read in a separate pass. In a conversation, the part before the answer also gets a separate pass. These
    extra passes are skipped if no other question is expected. If another question comes anyway, more columns have to be read again.
    """

    def __init__(self, language: LanguageModel):
        self._language = language
        # A single entry if the cache can be cropped. Otherwise, copies of a recurrent cache taken after each pass, shortest first.
        self._cached: list[CachedPrefix] = []

    def forget(self) -> None:
        """Drop all caches. Call this when the visual tokens of the inputs change."""
        self._cached = []

    def read(
        self, pruned: PrunedPrompt, prompt: Prompt, last: bool, goes_on: bool, dropping: Dropping | None
    ) -> PrefillState:
        """Read the part of a prompt that is not cached and return the state for decoding its answer.

        Args:
            pruned: The columns of `prompt` that are left after pruning.
            prompt: The whole prompt.
            last: True if no other question is expected, so nothing needs to be kept in the cache.
            goes_on: True if the next question may belong to the same conversation.
            dropping: Drops tokens inside the language model; None if no tokens are dropped there.
        """
        language = self._language
        if dropping is not None:
            return language.prefill(
                pruned.embeds, pruned.positions, pruned.following, None, pruned.sizes, dropping, pruned.deepstack
            )
        crops = language.can_crop
        # Numbers of leading columns that another prompt may share with this prompt.
        ends = [prompt.prefix_length, prompt.turn_length] if goes_on else [prompt.prefix_length]
        ends = [int((pruned.columns < end).sum()) for end in ends]
        if goes_on and crops:
            ends.append(len(pruned) - 1)  # always read the last column: its logits choose the answer's first token
        inputs = int(pruned.visual.nonzero()[-1]) + 1
        cache, known = self._take_cache(pruned.ids[: ends[-1]], inputs, last)
        if not (crops or last):
            for end in ends:
                if end <= known:
                    continue
                if cache is None:
                    cache = language.new_cache(end)
                part = pruned[known:end]
                given = {"sizes": part.sizes, "deepstack": part.deepstack, "ids": part.ids}
                language.forward(part.embeds, part.positions, cache, **given)
                self._cached = [*self._cached[:1], CachedPrefix(cache, pruned.ids[:end])]
                cache = cache.copy()
                known = end
        rest = pruned[known:]
        given = {"sizes": rest.sizes, "deepstack": rest.deepstack, "ids": rest.ids}
        state = language.prefill(rest.embeds, rest.positions, rest.following, cache, **given)
        if crops and goes_on:
            self._cached = [CachedPrefix(state.cache, pruned.ids, state.answer)]
        elif crops:
            self._cached = [CachedPrefix(state.cache, pruned.ids[: ends[-1]])]
        return state

    def _take_cache(self, ids: torch.Tensor, inputs: int, last: bool) -> tuple[KVCache | HostedCache | None, int]:
        """Return a cache that holds the beginning of a prompt, and the number of columns in it. Return None and 0 without one.

        Args:
            ids: int64 on the CPU, the leading token ids of the prompt, which an earlier prompt may share.
            inputs: Number of columns up to the end of the inputs. A croppable cache that shares fewer columns is not used.
            last: If True, a recurrent cache itself is returned instead of a copy.
        """
        cached = self._cached
        self._cached = []
        if self._language.can_crop:
            if not cached or (known := cached[0].common(ids)) < inputs:
                return None, 0
            cache = cached[0].cache
            cache.crop(known)
            self._cached = [
                CachedPrefix(cache, ids[:known])
            ]  # these columns stay valid even if reading the prompt fails
            return cache, known
        cached = [each for each in cached if each.common(ids) == len(each.prompt)]
        if not cached:
            return None, 0
        longest = cached[-1]
        if last:
            return longest.cache, len(longest.prompt)
        self._cached = cached
        return longest.cache.copy(), len(longest.prompt)

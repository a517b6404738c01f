"""Cache the keys and values of the beginning that prompts have in common, so that they are computed only once."""

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
    """A KV cache together with the token ids of its columns."""

    cache: KVCache | HostedCache
    prompt: torch.Tensor  # int64 on the CPU, the token ids of the columns that belong to a prompt
    answer: Sequence[int] = ()  # the token ids of the columns after the prompt; may grow while an answer is decoded

    @property
    def ids(self) -> torch.Tensor:
        return torch.cat([self.prompt, torch.tensor(self.answer, dtype=torch.int64, device="cpu")])

    def common(self, ids: torch.Tensor) -> int:
        """Return the number of leading columns that the cache has in common with a prompt about the same inputs.

        Args:
            ids: int64 on the CPU, the token ids of the prompt.
        """
        own = self.ids
        length = min(len(own), len(ids))
        differ = (own[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Caches the keys and values of the beginning that prompts about the same inputs have in common.

    Because attention is causal, the keys and values before a question do not depend on the question. A later question with the same
    system prompt can reuse them, and a later question in the same conversation can also reuse the earlier turns. If a method drops
    tokens inside the language model, however, the question affects which tokens are dropped, so every prompt is read in full.

    A model with recurrent layers (Qwen3.5) exposes their state only at the end of a forward pass. The part before the question is
    therefore read in a separate pass and, in a conversation, so is the part before the answer. These additional passes are skipped
    if no other question is expected. If another question is asked anyway, more columns have to be read again.
    """

    def __init__(self, language: LanguageModel):
        self._language = language
        # If the cache can be cropped, there is at most one entry. Otherwise, the entries are copies of a recurrent cache, made
        # after each pass, with the shortest first.
        self._cached: list[CachedPrefix] = []

    def forget(self) -> None:
        """Delete all cached keys and values. Call this when the visual tokens of the inputs change."""
        self._cached = []

    def read(
        self, pruned: PrunedPrompt, prompt: Prompt, last: bool, goes_on: bool, dropping: Dropping | None
    ) -> PrefillState:
        """Read the part of a prompt that is not cached yet, and return the state from which its answer can be decoded.

        Args:
            pruned: The columns of `prompt` that are left after pruning.
            prompt: The whole prompt.
            last: Whether this is expected to be the last question, so that nothing needs to be kept for another one.
            goes_on: Whether the next question may belong to the same conversation.
            dropping: Decides which tokens to drop inside the language model. None means that no tokens are dropped there.
        """
        language = self._language
        if dropping is not None:
            return language.prefill(
                pruned.embeds, pruned.positions, pruned.following, None, pruned.sizes, dropping, pruned.deepstack
            )
        crops = language.can_crop
        # Numbers of leading columns that a later prompt may have in common with this one.
        ends = [prompt.prefix_length, prompt.turn_length] if goes_on else [prompt.prefix_length]
        ends = [int((pruned.columns < end).sum()) for end in ends]
        if goes_on and crops:
            ends.append(len(pruned) - 1)  # the last column is always read, because its logits predict the first token
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
        """Return a cache that holds the beginning of a prompt and the number of its columns, or None and 0 if there is none.

        Args:
            ids: int64 on the CPU, the leading token ids of the prompt, which an earlier prompt may have in common with it.
            inputs: Number of columns up to the end of the inputs. A croppable cache with fewer columns in common is not used.
            last: Whether to return a recurrent cache itself instead of a copy.
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
            ]  # these columns stay valid even if the prompt cannot be read
            return cache, known
        cached = [each for each in cached if each.common(ids) == len(each.prompt)]
        if not cached:
            return None, 0
        longest = cached[-1]
        if last:
            return longest.cache, len(longest.prompt)
        self._cached = cached
        return longest.cache.copy(), len(longest.prompt)

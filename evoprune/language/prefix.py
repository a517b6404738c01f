"""Cache the keys and values of the common prefix of prompts, so that they are computed only once."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from evoprune.language.decoder import KVCache
from evoprune.language.generate import LanguageModel, PrefillState
from evoprune.language.prompt import Prompt
from evoprune.language.pruned import PrunedPrompt

if TYPE_CHECKING:
    from evoprune.language.hosted import HostedCache
    from evoprune.methods import Dropping


@dataclass(frozen=True)
class CachedPrefix:
    """A KV cache whose columns a later prompt may reuse."""

    cache: "KVCache | HostedCache"
    # Number of reusable columns. None means all columns, including those of an answer that is still being decoded.
    length: int | None = None

    def common(self, ids: torch.Tensor) -> int:
        """Return the length of the common prefix of this cache and a prompt about the same inputs, in columns.

        Args:
            ids: Prompt token IDs, int64 on the CPU.
        """
        own = torch.tensor(self.cache.ids_from(0)[: self.length], dtype=torch.int64, device="cpu")
        length = min(len(own), len(ids))
        differ = (own[:length] != ids[:length]).nonzero()
        return int(differ[0]) if len(differ) else length


class PrefixCache:
    """Caches the keys and values of the common prefix of prompts about the same inputs.

    Attention is causal, so the keys and values before a question don't depend on the question. Later questions with the same system
    prompt can reuse them, and later questions in the same conversation can also reuse the previous turns. However, if the pruning
    method drops tokens inside the language model, the question affects which tokens are dropped, so each prompt is read in full.

    Recurrent layers (Qwen3.5) expose their state only at the end of a forward pass. For models with recurrent layers, the prompt
    before the question is therefore read in a separate pass and, in a conversation, so is the prompt before the answer. These
    additional passes are skipped if no other question is expected. If another question is asked anyway, more columns have to be
    read again.
    """

    def __init__(self, language: LanguageModel):
        self._language = language
        # If the KV cache can be cropped, there is at most one entry. Otherwise, the entries are copies of a recurrent cache made
        # after each pass, with the shortest prefix first.
        self._cached: list[CachedPrefix] = []

    def forget(self) -> None:
        """Discard all cached keys and values. Call this when the inputs' visual tokens change."""
        self._cached = []

    def read(
        self, pruned: PrunedPrompt, prompt: Prompt, last: bool, goes_on: bool, dropping: "Dropping | None"
    ) -> PrefillState:
        """Read the uncached part of a prompt, and return the state for decoding its answer.

        Args:
            pruned: The prompt after pruning.
            prompt: The prompt before pruning.
            last: Whether this is the last question, so nothing needs to be kept for later questions.
            goes_on: Whether the next question may be part of the same conversation.
            dropping: Decides which tokens to drop inside the language model, or None to keep all tokens.
        """
        language = self._language
        if dropping is not None:
            return language.prefill(
                pruned.embeds, pruned.positions, pruned.following, None, pruned.sizes, dropping, pruned.deepstack
            )
        crops = language.can_crop
        # Possible lengths of the common prefix of this prompt and a later prompt.
        ends = [prompt.prefix_length, prompt.turn_length] if goes_on else [prompt.prefix_length]
        ends = [int((pruned.columns < end).sum()) for end in ends]
        if goes_on and crops:
            ends.append(len(pruned) - 1)  # always read the last column, because its logits predict the first token
        inputs = int(pruned.visual.nonzero()[-1]) + 1
        cache, known = self._take_cache(pruned.ids[: ends[-1]], inputs, last)
        if not (crops or last):
            for end in ends:
                if end <= known:
                    continue
                if cache is None:
                    cache = language.new_cache(end)
                part = pruned[known:end]
                language.forward(
                    part.embeds, part.positions, cache, sizes=part.sizes, deepstack=part.deepstack, ids=part.ids
                )
                self._cached = [*self._cached[:1], CachedPrefix(cache, end)]
                cache = cache.copy()
                known = end
        rest = pruned[known:]
        state = language.prefill(
            rest.embeds, rest.positions, rest.following, cache, rest.sizes, deepstack=rest.deepstack, ids=rest.ids
        )
        if crops and goes_on and language.answer_window is None:
            self._cached = [CachedPrefix(state.cache)]
        elif crops:
            self._cached = [CachedPrefix(state.cache, ends[-1])]
        return state

    def _take_cache(self, ids: torch.Tensor, inputs: int, last: bool) -> "tuple[KVCache | HostedCache | None, int]":
        """Return a KV cache for a prefix of the prompt and its number of columns, or None and 0 if there is no match.

        Args:
            ids: Token IDs of the prompt prefix to match against earlier prompts, int64 on the CPU.
            inputs: Number of columns up to the end of the inputs. A croppable cache with a shorter common prefix isn't used.
            last: Whether to return a recurrent cache itself instead of a copy.
        """
        cached = self._cached
        self._cached = []
        if self._language.can_crop:
            if not cached or (known := cached[0].common(ids)) < inputs:
                return None, 0
            cache = cached[0].cache
            cache.crop(known)
            self._cached = [CachedPrefix(cache, known)]  # these columns remain valid even if reading the prompt fails
            return cache, known
        cached = [each for each in cached if each.common(ids) == each.length]
        if not cached:
            return None, 0
        longest = cached[-1]
        if last:
            return longest.cache, longest.length
        self._cached = cached
        return longest.cache.copy(), longest.length

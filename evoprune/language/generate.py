"""From visual features to words: prompt embeddings, prefill, decoding token by token, text as it arrives.

The language model itself is in `decoder.py`; its positions, which keep their gaps where columns were pruned, in
`positions.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from evoprune.language import decoder
from evoprune.language.decoder import KVCache
from evoprune.language.settings import GenerationSettings
from evoprune.language.tokenizer import Tokenizer
from evoprune.model.numerics import not_finite
from evoprune.model.sizes import ANSWER_COLUMNS


@dataclass
class PrefillState:
    """What decoding starts from.

    Attributes:
        cache: keys and values of the prompt; decoding extends it in place.
        logits: float32 `[vocabulary]`, of the prompt's last column.
        next_position: M-RoPE position of the first generated token, the same in time, height and width.
    """

    cache: KVCache
    logits: torch.Tensor
    next_position: int


@torch.inference_mode()
def embed_question(model, tokenizer: Tokenizer, question: str) -> torch.Tensor:
    """`[Q, hidden]`: the embeddings of the question's own tokens, without the prompt around them, in the model's dtype."""
    embed = model.model.language_model.embed_tokens
    return embed(torch.tensor(tokenizer.encode(question), device=embed.weight.device))


def embed_prompt(
    model, input_ids: torch.Tensor, features: torch.Tensor, video_start: int, visual_tokens: int, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeds a prompt in which only some of the visual tokens are left.

    Args:
        model: weights under Hugging Face's names.
        input_ids: int64 `[L]`, the unpruned prompt.
        features: `[K, hidden]`, what stands at the visual tokens that are left.
        video_start: index of the first video placeholder.
        visual_tokens: N, the unpruned number of placeholders.
        kept: int64 `[K]`, which of the N are left, ascending.

    Returns:
        Embeddings `[L - N + K, hidden]` in the model's dtype, and which columns of the unpruned prompt they are, int64
        `[L - N + K]` on the CPU: `positions[:, columns]` are their positions, never renumbered.

    Raises:
        ValueError: `kept` and `features` differ in length, or `kept` is not ascending within `0..N-1`.
    """
    kept = kept.cpu()
    if len(kept) != len(features):
        raise ValueError(f"{len(features)} features for {len(kept)} visual tokens")
    if len(kept) and (kept[0] < 0 or kept[-1] >= visual_tokens or bool((kept.diff() <= 0).any())):
        raise ValueError(f"kept visual tokens must ascend within 0..{visual_tokens - 1}")
    video_end = video_start + visual_tokens
    columns = torch.cat([torch.arange(video_start), video_start + kept, torch.arange(video_end, len(input_ids))])
    embed = model.model.language_model.embed_tokens
    with torch.inference_mode():
        before, after = (
            embed(part.to(embed.weight.device)) for part in (input_ids[:video_start], input_ids[video_end:])
        )
        return torch.cat([before, features.to(before), after]), columns


def column_counts(counts: torch.Tensor | None, video_start: int, columns: int) -> torch.Tensor | None:
    """As how many columns attention counts each of a prompt's, for `prefill`: text once, the visual tokens as `counts` says.

    Args:
        counts: float32 `[K]`; None for one each.
        video_start: index of the first visual token.
        columns: of the prompt as it is read.
    """
    if counts is None:
        return None
    every = counts.new_ones(columns)
    every[video_start : video_start + len(counts)] = counts
    return every


def prefill(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    next_position: int,
    cache: KVCache | None = None,
    counts: torch.Tensor | None = None,
) -> PrefillState:
    """Reads a prompt, or goes on reading one.

    Args:
        model: weights under Hugging Face's names.
        inputs_embeds: `[L, hidden]`.
        positions: int64 `[3, L]`, M-RoPE positions (time, height, width), on the CPU.
        next_position: where the first generated token will sit, by Qwen's rule the *unpruned* prompt's largest position
            plus one. Only decoding reads it.
        cache: of an earlier call whose prompt this one continues; it is extended in place.
        counts: float32 `[L]`, as how many columns attention counts each; None for one each.

    Returns:
        The state after the last column.

    Raises:
        ValueError: no columns, or not one position for each.
    """
    cache = KVCache(model, len(inputs_embeds) + ANSWER_COLUMNS) if cache is None else cache
    return PrefillState(cache, decoder.logits(model, inputs_embeds, positions, cache, counts), next_position)


class TokenStream(Iterator[int]):
    """Generated token ids, one forward pass at a time. Ends of sequence are not yielded. Raises ModelError where logits are not
    finite.

    Attributes:
        finish_reason: None while tokens may come, then "stop" (the model ended its turn) or "length".
        tokens: how many were yielded.
    """

    def __init__(self, model, state: PrefillState, settings: GenerationSettings, eos_ids: Iterable[int]):
        self.finish_reason: str | None = None
        self.tokens = 0
        self._model, self._state, self._settings = model, state, settings
        self._eos_ids = frozenset(eos_ids)
        # Drawn on the CPU, so that a seed means the same on every device.
        self._random = torch.Generator().manual_seed(settings.seed)
        self._last: int | None = None

    @torch.inference_mode()
    def __next__(self) -> int:
        if self.finish_reason is None and self.tokens == self._settings.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            raise StopIteration
        # The pass after a token runs only once another token is wanted.
        logits = self._state.logits if self._last is None else self._step(self._last)
        if not logits.max().isfinite():  # the largest is NaN where any is
            raise not_finite("prefill" if self._last is None else "generate")
        token = choose(logits, self._settings, self._random)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self._last = token
        self.tokens += 1
        return token

    def _step(self, token: int) -> torch.Tensor:
        embed = self._model.model.language_model.embed_tokens
        position = self._state.next_position + self.tokens - 1
        column = embed(torch.tensor([token], device=embed.weight.device))
        return decoder.logits(self._model, column, torch.full((3, 1), position), self._state.cache)


def stream(model, state: PrefillState, settings: GenerationSettings, eos_ids: Iterable[int]) -> TokenStream:
    """Decodes from `state`, lazily: each token is computed when it is asked for.

    Args:
        model: the model that made `state`.
        state: of `prefill`; its cache grows by the tokens decoded, so a state serves one answer.
        settings: length and sampling.
        eos_ids: token ids that end the answer.

    Returns:
        An iterator of token ids, with `finish_reason` once it is exhausted.
    """
    return TokenStream(model, state, settings, eos_ids)


def choose(logits: torch.Tensor, settings: GenerationSettings, random: torch.Generator) -> int:
    """The next token id: the most probable one, or a draw (nucleus sampling, arXiv 1904.09751).

    Args:
        logits: float32 `[vocabulary]`.
        settings: temperature and top_p.
        random: a CPU generator, advanced by a draw.
    """
    if settings.temperature == 0:
        return int(logits.argmax())
    # From the largest logit down, so that a tiny temperature cannot overflow.
    logits = logits.cpu().double()
    probabilities = ((logits - logits.max()) / settings.temperature).softmax(-1)
    if settings.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token stays if those before it have not reached top_p yet; so the first always stays.
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=random))


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of token ids as they come, in pieces that are final once yielded.

    A byte-level token may end in the middle of a character; such an end is held back until the rest of it has come.
    Special tokens are left out. The pieces joined are `tokenizer.decode` of all ids.

    Args:
        tokenizer: a byte-level one, as Qwen's is.
        ids: token ids, consumed one at a time.
    """
    pending, yielded = [], 0
    for token in ids:
        pending.append(token)
        piece = tokenizer.decode(pending)
        # Unfinished bytes decode to one replacement character, always the last; what stands before it is settled.
        settled = piece.removesuffix("\ufffd")
        if len(settled) > yielded:
            yield settled[yielded:]
            yielded = len(settled)
        if settled == piece:
            pending, yielded = [], 0
    if rest := tokenizer.decode(pending)[yielded:]:
        yield rest

"""Choose the next token from its logits, and compute log probabilities."""

from collections.abc import Collection
from typing import NamedTuple

import torch

from evoprune.backend import to_device
from evoprune.language.settings import GenerationOptions


def choose(
    logits: torch.Tensor, settings: GenerationOptions, random: torch.Generator, seen: Collection[int] = ()
) -> int:
    """Choose the next token: the most probable token if the temperature is 0; otherwise, a sampled token.

    Args:
        logits: float32 `[vocabulary]`.
        settings: The sampling options.
        random: A random generator on the CPU.
        seen: Prompt and answer token IDs that the repetition penalty applies to.

    Returns:
        The token ID.
    """
    if settings.repetition_penalty not in (None, 1):
        logits = penalized(logits, settings.repetition_penalty, seen)
    if settings.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits.cpu(), settings), 1, generator=random))


def penalized(logits: torch.Tensor, penalty: float, seen: Collection[int]) -> torch.Tensor:
    """Apply a repetition penalty (arXiv 1909.05858) like transformers. Penalties above 1 lower the logits of seen tokens."""
    ids = to_device(torch.tensor([*seen], dtype=torch.int64, device="cpu"), logits.device)
    scores = logits[ids]
    return logits.index_put((ids,), torch.where(scores < 0, scores * penalty, scores / penalty))


def probabilities(logits: torch.Tensor, settings: GenerationOptions) -> torch.Tensor:
    """Apply temperature, top-k, and nucleus sampling (arXiv 1904.09751), and return the sampling probabilities.

    Returns:
        The unnormalized probabilities, float64 `[vocabulary]`.
    """
    # Subtract the largest logit first, so that dividing by a very low temperature cannot overflow.
    logits = logits.double()
    logits = (logits - logits.max()) / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], float("-inf"))
    shares = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        # Keep a token if all more probable tokens have a total probability below top_p. The first token is always kept.
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(0, order, ordered)
    return shares


class TokenLogprobs(NamedTuple):
    """Natural log probabilities of a generated token and its alternatives.

    They are computed from the raw logits, before applying temperature, penalties, top-k, and top-p.
    """

    chosen: float  # log probability of the chosen token
    top: list[tuple[int, float]]  # most probable token IDs and their log probabilities, in descending order


def token_logprobs(logits: torch.Tensor, token: int, most: int) -> TokenLogprobs:
    """Return the log probabilities of a token and the `most` most probable tokens. `logits` is float32 `[vocabulary]`."""
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(min(most, len(logprobs)))
    chosen, *values = torch.cat([logprobs[token][None], top.values]).tolist()
    return TokenLogprobs(chosen, list(zip(top.indices.tolist(), values, strict=True)))


def best_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the most probable token, and whether the largest logit is finite (1 or 0), as an int64 tensor `[2]`.

    Using a single tensor requires only one copy to the host. `logits` is float32 `[vocabulary]`.
    """
    return torch.stack([logits.argmax(), logits.amax().isfinite().long()])  # the maximum is NaN if any logit is

"""How far a pruned model would have gone another way, without labels: it reads the answer of the unpruned model, and at each token
the two distributions are compared. llama.cpp judges quantisation this way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.session import Answer, EncodedInputs, GenerationOptions

KEPT = 1024  # tokens whose probabilities are kept for every token of an answer, instead of 150,000


@dataclass(frozen=True)
class Reference:
    """Hold an answer of the unpruned model."""

    question: str
    system: str | None
    think: str  # as of `GenerationOptions`
    ids: tuple[int, ...]  # its tokens, and any one for its end: only what comes before the last is read
    tokens: torch.Tensor  # int64 `[n, k]`, the most probable tokens at each of the n places, the first choice first
    logs: torch.Tensor  # float32 `[n, k + 1]`, the logarithms of their probabilities, and of that of all others
    seconds: float  # from the question to the first token


@dataclass(frozen=True)
class Agreement:
    """Along one answer."""

    agrees: torch.Tensor  # bool `[n]`, at which tokens the first choices are the same
    kl: torch.Tensor  # float32 `[n]`, KL(unpruned || pruned) in nats; all but the `KEPT` most probable count as one
    seconds: float  # from the question to the first token

    def record(self) -> dict[str, float]:
        counts = {"tokens": len(self.agrees), "agree": int(self.agrees.sum())}
        return counts | {"kl": float(self.kl.mean()), "kl_p95": float(self.kl.quantile(0.95))}


def reference(
    video: EncodedInputs,
    question: str,
    ids: Sequence[int],
    ended: bool,
    system: str | None = None,
    think: str = "off",
) -> Reference:
    """Return the unpruned model's distributions along its own answer, the tokens `ids`. Errors: as of `EncodedInputs.read_along`.

    Where the model `ended` it by itself, the end counts as one more token: an answer that would have run on is another one.
    """
    ids = tuple(ids)
    if ended or not ids:
        ids = (*ids, 0)
    logits, seconds = video.read_along(question, ids, system, think)
    logs = logits.log_softmax(-1)
    best, tokens = logs.topk(min(KEPT, logs.shape[1] - 1))
    return Reference(question, system, think, ids, tokens, torch.cat([best, _rest(best)], 1), seconds)


def agreement_of(given: Reference, video: EncodedInputs) -> Agreement:
    """Return how a pruned video's choices compare. Errors: as of `EncodedInputs.read_along`."""
    logits, seconds = video.read_along(given.question, given.ids, given.system, given.think)
    logs = logits.log_softmax(-1).gather(1, given.tokens)
    logs = torch.cat([logs, _rest(logs)], 1)
    kl = (given.logs.exp() * (given.logs - logs)).sum(1).clamp(min=0)
    return Agreement((logits.argmax(-1) == given.tokens[:, 0]).cpu(), kl.cpu(), seconds)


def compare(
    full: EncodedInputs, question: str, answer: Answer, options: GenerationOptions, pruned: EncodedInputs
) -> dict[str, float]:
    """Return the record of how a pruned video agrees with an answer of the unpruned one, which `options` led to."""
    ended = answer.report.finish_reason == "stop"
    if answer.report.stop_reason is not None or options.grammar is not None:
        ended = False  # perhaps the answer has no token of its end
    given = reference(full, question, answer.ids, ended, options.system, options.think)
    return agreement_of(given, pruned).record()


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of what is left of 1: `[n, 1]`. Rounding leaves at least a ten-millionth, so that it is a number."""
    return torch.log1p(-logs.double().exp().sum(1, keepdim=True).clamp(max=1 - 1e-7)).to(logs.dtype)

"""A label-free measure of how closely a pruned model follows the unpruned model.

The pruned model reads the unpruned model's answer, and the next-token distributions of both models are compared at every token.
llama.cpp evaluates quantization in the same way.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from evoprune.language import GenerationOptions
from evoprune.session import Answer, EncodedInputs

KEPT = 1024  # number of token probabilities to store per answer position, instead of all 150,000


@dataclass(frozen=True)
class Reference:
    """An answer of the unpruned model, with its token probabilities at each position."""

    question: str
    system: str | None
    think: str  # see `GenerationOptions`
    ids: tuple[int, ...]  # answer tokens, plus an arbitrary token if the end counts; the last token is never read
    tokens: torch.Tensor  # int64 `[n, k]`, the k most probable tokens at n positions, most probable first
    # float32 `[n, k + 1]`, the log probabilities of `tokens`, plus the combined log probability for the other tokens.
    logs: torch.Tensor
    seconds: float  # time from the question to the first token, in seconds

    @classmethod
    def of(
        cls,
        video: EncodedInputs,
        question: str,
        ids: Sequence[int],
        ended: bool,
        system: str | None = None,
        think: str = "off",
    ) -> Self:
        """Compute the unpruned model's token probabilities at each position of its own answer.

        Args:
            video: The video, encoded without pruning.
            ids: The answer tokens.
            ended: Whether the model ended the answer itself. If so, the end counts as an additional token, because a longer answer
                would be a different answer.

        See `EncodedInputs.read_along` for exceptions.
        """
        ids = tuple(ids)
        if ended or not ids:
            ids = (*ids, 0)
        logits, seconds = video.read_along(question, ids, system, think)
        logs = logits.log_softmax(-1)
        best, tokens = logs.topk(min(KEPT, logs.shape[1] - 1))
        return cls(question, system, think, ids, tokens, torch.cat([best, _rest(best)], 1), seconds)

    @classmethod
    def of_answer(cls, video: EncodedInputs, question: str, answer: Answer, options: GenerationOptions) -> Self:
        """Create a reference from an answer generated with `options`. See `of` for details."""
        ended = answer.report.finish_reason == "stop"
        if answer.report.stop_reason is not None or options.grammar is not None:
            ended = False  # the answer may lack its end token
        return cls.of(video, question, answer.ids, ended, options.system, options.think)

    def agreement(self, video: EncodedInputs) -> "Agreement":
        """Compare the reference with the model's predictions for the pruned `video`.

        See `EncodedInputs.read_along` for exceptions.
        """
        logits, seconds = video.read_along(self.question, self.ids, self.system, self.think)
        logs = logits.log_softmax(-1).gather(1, self.tokens)
        logs = torch.cat([logs, _rest(logs)], 1)
        kl = (self.logs.exp() * (self.logs - logs)).sum(1).clamp(min=0)
        return Agreement((logits.argmax(-1) == self.tokens[:, 0]).cpu(), kl.cpu(), seconds)


@dataclass(frozen=True)
class Agreement:
    """The agreement of the pruned model with the unpruned model at the n positions of an answer."""

    agrees: torch.Tensor  # bool `[n]`, True if both models assign the highest probability to the same token
    kl: torch.Tensor  # float32 `[n]`, KL(unpruned || pruned) in nats; tokens outside the `KEPT` best are treated as one
    seconds: float  # time from the question to the first token, in seconds

    def record(self) -> dict[str, float]:
        counts = {"tokens": len(self.agrees), "agree": int(self.agrees.sum())}
        return counts | {"kl": float(self.kl.mean()), "kl_p95": float(self.kl.quantile(0.95))}


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Return the log of the other tokens' combined probability, `[n, 1]`.

    The probability is clamped to at least 1e-7 to keep its log finite.
    """
    return torch.log1p(-logs.double().exp().sum(1, keepdim=True).clamp(max=1 - 1e-7)).to(logs.dtype)

"""A loaded model and how it prunes, shared by encoding and answering."""

from dataclasses import dataclass, replace

import torch

from evoprune.errors import UsageError
from evoprune.methods import FULL, MethodChain, PruneConfig
from evoprune.session.loading.description import ModelDescription
from evoprune.session.loading.model import LoadedModel


@dataclass(frozen=True)
class Session:
    """Hold a loaded model and how it prunes.

    Raises UsageError: a method that cannot act in this model.
    """

    loaded: LoadedModel
    pruning: PruneConfig
    load_seconds: float | None = None  # how long loading took, for reports; None where that is unknown

    def __post_init__(self):
        check_fits(self.pruning.method, self.loaded.description)

    def __repr__(self) -> str:
        settings = f"method {self.pruning.name!r}, budget {self.pruning.budget.recorded}, seed {self.pruning.seed}"
        return f"<Session {self.loaded.id!r} in {self.loaded.dtype} on {self.loaded.device}: {settings}>"

    def unpruned(self) -> "Session":
        """Return the same model and seed with every visual token kept: what pruning is compared with."""
        return replace(self, pruning=PruneConfig.of(FULL, "none", self.pruning.seed))

    def prompt_columns(self, tokens: int, text: int) -> int | tuple[int, ...]:
        """Positions in a prompt of `tokens` visual tokens and `text`, at most, in each layer of the language model or in all."""
        depth = self.loaded.model.config.text_config.num_hidden_layers
        return self.pruning.method.prompt_columns(depth, tokens, text, self.pruning.budget.largest)

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self.loaded.model.model.visual.patch_embed.proj.weight.device


def check_fits(method: MethodChain, model: ModelDescription) -> None:
    """Raises UsageError: a method that cannot act in this language model, such as one without a recipe for so many layers."""
    method.language_work(model.config.text_config.num_hidden_layers, 64, 1.0)
    if method.language and not model.native:
        works = method.before.name if method.before.members else "evoprune"
        problem = f"method {method.name} acts inside the language model, which is transformers' own here"
        raise UsageError(problem, f"use {works}, or {model.to_be_native}")


def check_conversation(method: MethodChain) -> None:
    """Raises UsageError: the method prunes for one question, and a conversation has several."""
    if method.reads_question:
        hint = "ask single questions, or take a method that does not: --method (method) evoprune"
        raise UsageError(f"{method.name} prunes for one question, so there is no conversation", hint)


def check_streams(method: MethodChain, model: ModelDescription) -> None:
    """Raises UsageError: the method cannot prune a stream, or the model cannot forget its beginning."""
    if method.reads_question or method.language or method.input:
        hint = "take one that acts inside the encoder or selects tokens without the question, such as evoprune"
        raise UsageError(f"method {method.name} cannot prune a stream", hint)
    if not model.native:
        problem = f"the language model of {model.id} is run by transformers, which cannot forget the oldest tokens"
        raise UsageError(problem, model.to_be_native)

"""A loaded model together with its pruning settings, shared by encoding and answering."""

from dataclasses import dataclass, replace

import torch

from evoprune.errors import UsageError
from evoprune.methods import Budget, MethodChain, PruneConfig
from evoprune.session.loading.description import ModelDescription
from evoprune.session.loading.model import LoadedModel


@dataclass(frozen=True)
class Session:
    """A loaded model and its pruning settings.

    Raises:
        UsageError: If the method cannot act in this model.
    """

    loaded: LoadedModel
    pruning: PruneConfig
    load_seconds: float | None = None  # load time for reports; None if unknown

    def __post_init__(self):
        check_fits(self.pruning.method, self.loaded.description)

    def __repr__(self) -> str:
        settings = f"method {self.pruning.name!r}, budget {self.pruning.budget.recorded}, seed {self.pruning.seed}"
        return f"<Session {self.loaded.id!r} in {self.loaded.dtype} on {self.loaded.device}: {settings}>"

    def unpruned(self) -> "Session":
        """Return a session with the same model and seed that keeps every visual token, as a baseline."""
        return replace(self, pruning=PruneConfig.of(Budget.FULL, "none", self.pruning.seed))

    def prompt_columns(self, tokens: int, text: int) -> int | tuple[int, ...]:
        """Return the largest number of prompt columns that the language model may hold.

        Args:
            tokens: Number of visual tokens.
            text: Number of text tokens.

        Returns:
            One number for all layers, or one number per layer.
        """
        depth = self.loaded.model.config.text_config.num_hidden_layers
        return self.pruning.method.prompt_columns(depth, tokens, text, self.pruning.budget.largest)

    @property
    def device(self) -> torch.device:
        """Device of the vision tower."""
        return self.loaded.model.model.visual.patch_embed.proj.weight.device


def check_fits(method: MethodChain, model: ModelDescription) -> None:
    """Check that a method can act in this model's language model.

    Raises:
        UsageError: If it cannot, for example because the method has no recipe for this number of layers.
    """
    method.language_work(model.config.text_config.num_hidden_layers, 64, 1.0)
    if method.language and not model.native:
        works = method.before.name if method.before.members else "evoprune"
        problem = f"method {method.name} acts inside the language model, which is transformers' own here"
        raise UsageError(problem, f"use {works}, or {model.to_be_native}")


def check_conversation(method: MethodChain) -> None:
    """Check that a method allows conversations.

    Raises:
        UsageError: If the method prunes for a single question.
    """
    if method.reads_question:
        hint = "ask single questions, or take a method that does not: --method (method) evoprune"
        raise UsageError(f"{method.name} prunes for one question, so there is no conversation", hint)


def check_streams(method: MethodChain, model: ModelDescription) -> None:
    """Check that this model and method can process a stream.

    Raises:
        UsageError: If the method cannot prune a stream, or the model cannot forget its oldest tokens.
    """
    if method.reads_question or method.language or method.input:
        hint = "take one that acts inside the encoder or selects tokens without the question, such as evoprune"
        raise UsageError(f"method {method.name} cannot prune a stream", hint)
    if not model.native:
        problem = f"the language model of {model.id} is run by transformers, which cannot forget the oldest tokens"
        raise UsageError(problem, model.to_be_native)

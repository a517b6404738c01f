"""A loaded model with its pruning method, shared by opening, encoding and answering."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.pipeline import Pipeline
from evoprune.pipeline.kept import Tuned, recipes, resolve
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.pipeline.options import PruneOptions
from evoprune.pruning.budget import AUTO, AUTO_INFLECTION


@dataclass(frozen=True)
class Engine:
    """Made by `make_engine`.

    Attributes:
        options: how visual tokens are pruned; never "tuned", but what that means for this model.
        load_seconds: how long loading took, for reports; None where that is unknown.
        tuned: the tuned setting that `options` come from; None if they were given.
    """

    loaded: LoadedModel
    options: PruneOptions
    method: Pipeline
    load_seconds: float | None = None
    tuned: Tuned | None = None

    def __repr__(self) -> str:
        loaded, options = self.loaded, self.options
        return (
            f"<Engine {loaded.id!r} in {loaded.dtype} on {loaded.device}: "
            f"method {options.method!r}, budget {self.reported_budget}, seed {options.seed}>"
        )

    @property
    def budget(self) -> float:
        """Share of visual tokens kept, at most."""
        return self.options.most

    @property
    def reported_budget(self) -> float | str:
        """The budget as reports have it: 1.0 for a method that prunes nothing, or "auto" or "auto:inflection"."""
        return self.method.reported_budget(self.options.budget)

    @property
    def depth(self) -> int:
        """Layers of the language model."""
        return self.loaded.model.config.text_config.num_hidden_layers

    def prompt_columns(self, tokens: int, text: int) -> int | tuple[int, ...]:
        """Positions in a prompt of `tokens` visual tokens and `text`, in each layer of the language model or in all."""
        return self.method.prompt_columns(self.depth, tokens, text, self.budget)

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def device(self) -> torch.device:
        """Where the tower runs."""
        return self.loaded.model.model.visual.patch_embed.proj.weight.device


def make_method(options: PruneOptions) -> Pipeline:
    """The method that options name, other than those of a budget of "tuned".

    Raises UsageError: settings that it does not have, or a budget of "auto" or "auto:inflection" where it cannot let the
    content decide.
    """
    method = methods.parse(options.method, options.method_args)
    if options.budget == AUTO_INFLECTION:
        return method.by_inflection()
    return method.automatic() if options.budget == AUTO else method


def with_recipe(method: Pipeline, name: str | None, weights: Callable[[], str]) -> Pipeline:
    """A method with the recipe of a model, where it follows one; others unchanged. Arguments and errors as of `kept.resolve`."""
    inner = method.language
    if getattr(inner, "recipe", inner) is not None or inner is None:  # it follows none, or has it already
        return method
    if (kept := recipes.find(weights())) is None:
        hint = f"evoprune tune VIDEO... --operations -m {name or 'MODEL'} finds one"
        raise UsageError(f"method {inner.name} follows a recipe, and there is none for {name or 'this model'}", hint)
    return replace(method, language=replace(inner, recipe=kept.made()))


def make_engine(loaded: LoadedModel, options: PruneOptions, load_seconds: float | None = None) -> Engine:
    """A loaded model with the method that options name. Here a budget of "tuned" becomes the model's method and budget.

    Raises UsageError: as `make_method` and `with_recipe`; the model was never tuned, or its setting is damaged.
    """
    options, tuned = resolve(options, loaded.id, lambda: loaded.weights_fingerprint)
    method = with_recipe(make_method(options), loaded.id, lambda: loaded.weights_fingerprint)
    return Engine(loaded, options, method, load_seconds, tuned)


def unpruned(engine: Engine) -> Engine:
    """The same model and seed with every visual token kept: what pruning is compared with."""
    options = PruneOptions(budget=1.0, method="none", seed=engine.seed)
    return make_engine(engine.loaded, options, engine.load_seconds)

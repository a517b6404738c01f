"""What options of pruning mean for a model: its method, and what was found for it in the place of "tuned". No torch until then."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.pipeline.options import PruneOptions
from evoprune.pipeline.saved import Tuned, recipes, tuned
from evoprune.pruning.budget import AUTO, AUTO_INFLECTION, TUNED

if TYPE_CHECKING:
    from evoprune.methods.pipeline import Pipeline


def resolve(options: PruneOptions, name: str | None, weights: Callable[[], str]) -> tuple[PruneOptions, Tuned | None]:
    """Options with the model's own method and budget in the place of "tuned", and the setting; other options unchanged, and None.

    Args:
        name: of the model, for errors; None where that is unknown.
        weights: gives the fingerprint of its weights; called for a budget of "tuned" only.

    Raises UsageError: the model was never tuned, or its setting is damaged. Whatever `weights` raises.
    """
    if options.budget != TUNED:
        return options, None
    if (setting := tuned.find(weights())) is None:
        hint = f"evoprune tune VIDEO... -m {name or 'MODEL'} finds one; or give a budget"
        raise UsageError(f"no tuned setting for {name or 'this model'}", hint)
    return replace(options, budget=setting.budget, method=setting.method), setting


def make_method(options: PruneOptions) -> "Pipeline":
    """The method that options name, other than those of a budget of "tuned".

    Raises UsageError: settings that it does not have, or a budget of "auto" or "auto:inflection" where it cannot let the
    content decide.
    """
    method = methods.parse(options.method, options.method_args)
    if options.budget == AUTO_INFLECTION:
        return method.by_inflection()
    return method.automatic() if options.budget == AUTO else method


def with_recipe(method: "Pipeline", name: str | None, weights: Callable[[], str]) -> "Pipeline":
    """A method with the recipe of a model, where it follows one; others unchanged. Arguments and errors as of `resolve`."""
    inner = method.language
    if getattr(inner, "recipe", inner) is not None or inner is None:  # it follows none, or has it already
        return method
    if (kept := recipes.find(weights())) is None:
        hint = f"evoprune tune VIDEO... --operations -m {name or 'MODEL'} finds one"
        raise UsageError(f"method {inner.name} follows a recipe, and there is none for {name or 'this model'}", hint)
    return replace(method, language=replace(inner, recipe=kept.made()))


def for_model(
    options: PruneOptions, name: str | None, weights: Callable[[], str]
) -> tuple[PruneOptions, "Pipeline", Tuned | None]:
    """What options mean for a model: the options of `resolve`, the method with its recipe, and the setting.

    Raises UsageError: as `resolve`, `make_method` and `with_recipe`.
    """
    options, setting = resolve(options, name, weights)
    return options, with_recipe(make_method(options), name, weights), setting

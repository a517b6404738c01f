"""Recipes of operation pruning, kept for each model as its tuned setting is; and how a method comes by that of its model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from evoprune.errors import UsageError
from evoprune.keywords import check_types
from evoprune.methods.operations import Operations
from evoprune.methods.pipeline import Pipeline
from evoprune.pipeline.kept import Shelf
from evoprune.pruning.operations import Recipe

SCHEMA = "evoprune/operations@1"


@dataclass(frozen=True)
class KeptRecipe:
    """A recipe, and what was measured when it was found.

    Attributes:
        recipe: the fields of a `Recipe`, as plain data.
        kl: after each step, the mean of KL(unpruned || pruned) in nats a token; None for a step that was not measured.
        agree: after each step, the share of tokens at which the first choice is the unpruned model's; None as with `kl`.
        model: the model's name at that time, for people.
        created_utc: ISO date and time.
        videos, questions, tokens: how many were measured; tokens of all full answers.
        version: of evoprune.

    Raises:
        UsageError, ValueError: a value that cannot be.
    """

    recipe: dict
    kl: list
    agree: list
    model: str
    created_utc: str
    videos: int
    questions: int
    tokens: int
    version: str

    def __post_init__(self):
        check_types(self)
        datetime.fromisoformat(self.created_utc)
        if min(self.videos, self.questions, self.tokens) < 1:
            raise ValueError("videos, questions and tokens must be above 0")
        steps = len(self.made().steps)
        for values in (self.kl, self.agree):
            if not isinstance(values, list) or len(values) != steps or not all(map(_measured, values)):
                raise ValueError("kl and agree must hold a number of at least 0, or null, for each step")

    def made(self) -> Recipe:
        """The recipe itself. Raises ValueError if it cannot be one."""
        try:
            steps = tuple(tuple(tuple(each) for each in step) for step in self.recipe["steps"])
            return Recipe(**self.recipe | {"weights": tuple(self.recipe["weights"]), "steps": steps})
        except (KeyError, TypeError) as problem:
            raise ValueError(f"it holds no recipe: {problem}") from problem


def _measured(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and value >= 0)


_SHELF = Shelf("operations", SCHEMA, KeptRecipe, "recipe of operations", "evoprune tune VIDEO... --operations")
find, every, save, remove = _SHELF.find, _SHELF.every, _SHELF.save, _SHELF.remove


def of_model(method: Pipeline, name: str | None, weights: Callable[[], str]) -> Pipeline:
    """A method with the recipe of a model, where it follows one; other methods unchanged.

    Args:
        name: of the model, for errors; None where that is unknown.
        weights: gives the fingerprint of its weights; called where a recipe is missing only.

    Raises:
        UsageError: the model has no recipe, or it is damaged. Whatever `weights` raises.
    """
    inner = method.language
    if not isinstance(inner, Operations) or inner.recipe:
        return method
    if (kept := find(weights())) is None:
        hint = f"evoprune tune VIDEO... --operations -m {name or 'MODEL'} finds one"
        raise UsageError(f"method {inner.name} follows a recipe, and there is none for {name or 'this model'}", hint)
    return replace(method, language=replace(inner, recipe=kept.made()))

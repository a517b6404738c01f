"""A recipe of operations for the tiny model, made up and kept where tests keep settings."""

from dataclasses import asdict

from evoprune.methods.operation_plans import ALL, REST, Recipe
from evoprune.session.loading.found import find_model
from evoprune.session.options import ModelOptions
from evoprune.session.saved import KeptRecipe, recipes

TINY = Recipe(2, 1, 0.25, (0.1, 0.2, 0.7), (((1, REST, "keys"),), ((1, ALL, "keys"),)))


def kept(recipe: Recipe = TINY) -> KeptRecipe:
    """As if it had been found, with nothing measured."""
    none = [None] * len(recipe.steps)
    return KeptRecipe(asdict(recipe), none, none, "tiny", "2026-03-01T12:00:00+00:00", 2, 1, 9, "0.1.0")


def keep_recipe(model, recipe: Recipe = TINY) -> str:
    """Saves a recipe for a model; returns the fingerprint of its weights."""
    weights = find_model(ModelOptions(str(model))).weights_fingerprint
    recipes.save(weights, kept(recipe))
    return weights

"""A made-up recipe of operations for the tiny model, in the file format of `evoprune tune --operations -o FILE`."""

import json
from dataclasses import asdict
from pathlib import Path

from evoprune.contrib.operations import ALL, REST, SCHEMA, Recipe

TINY = Recipe(2, 1, 0.25, (0.1, 0.2, 0.7), (((1, REST, "keys"),), ((1, ALL, "keys"),)))


def document(recipe: Recipe = TINY) -> dict:
    """Return the part of the tuning results that makes a recipe."""
    facts = asdict(recipe)
    steps = [{"operations": step} for step in facts.pop("steps")]
    return {"schema": SCHEMA, "complete": True, "recipe": facts, "steps": steps}


def write_recipe(folder: Path, recipe: Recipe = TINY) -> str:
    """Write the recipe file. Returns the method string that uses it."""
    (folder / "recipe.json").write_text(json.dumps(document(recipe)))
    return f"operations:recipe={folder / 'recipe.json'}"

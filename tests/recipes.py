"""A recipe of operations for the tiny model, made up, in a file as `evoprune tune --operations -o FILE` writes it."""

import json
from dataclasses import asdict
from pathlib import Path

from evoprune.contrib.operations import ALL, REST, SCHEMA, Recipe

TINY = Recipe(2, 1, 0.25, (0.1, 0.2, 0.7), (((1, REST, "keys"),), ((1, ALL, "keys"),)))


def document(recipe: Recipe = TINY) -> dict:
    """What of the results makes a recipe."""
    facts = asdict(recipe)
    steps = [{"operations": step} for step in facts.pop("steps")]
    return {"schema": SCHEMA, "complete": True, "recipe": facts, "steps": steps}


def write_recipe(folder: Path, recipe: Recipe = TINY) -> str:
    """Writes the file; returns the method with it."""
    (folder / "recipe.json").write_text(json.dumps(document(recipe)))
    return f"operations:recipe={folder / 'recipe.json'}"

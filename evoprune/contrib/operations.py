"""Operation pruning (zxcvfd13502/GSOP): visual tokens stay, and layers compute less for them, by the model's recipe."""

from dataclasses import dataclass
from typing import Any

from evoprune.contrib.fastv import HighestScore
from evoprune.errors import UsageError
from evoprune.methods.operation_plans import AGAIN, Recipe
from evoprune.methods.plans import LanguagePlan

KEY = 0.25  # share of the visual tokens that are key
PLACE = 2 / 32  # share of the layers after which they are known


@dataclass(frozen=True)
class Operations(HighestScore):
    """Field: recipe: of the model that it works in; as a setting, the file that `evoprune tune --operations -o FILE` wrote."""

    name = "operations"
    source = "zxcvfd13502/GSOP"

    recipe: Recipe | None = None

    @property
    def args(self) -> dict[str, Any]:
        """The recipe is its digest."""
        return super().args | {"recipe": self.recipe and self.recipe.digest}

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        recipe = self.recipe
        if recipe is None:
            raise UsageError("method operations has no recipe", f"operations:recipe=FILE.json; {AGAIN}")
        if recipe.depth != depth:
            raise UsageError(f"the recipe is for {recipe.depth} layers, and this model has {depth}", AGAIN)
        return recipe.plan(tokens, recipe.removed(budget))

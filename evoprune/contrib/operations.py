"""Operation pruning (zxcvfd13502/GSOP): visual tokens stay, and layers compute less for them, by the model's recipe."""

from dataclasses import dataclass, field

from evoprune.contrib.fastv import HighestScore
from evoprune.errors import UsageError
from evoprune.methods.language_plan import LanguagePlan
from evoprune.methods.operation_plans import Recipe

KEY = 0.25  # share of the visual tokens that are key
PLACE = 2 / 32  # share of the layers after which they are known


@dataclass(frozen=True)
class Operations(HighestScore):
    """Field: recipe: of the model that it works in; None where no model is known yet."""

    name = "operations"
    source = "zxcvfd13502/GSOP"

    recipe: Recipe | None = field(default=None, metadata={"report": lambda recipe: recipe and recipe.digest})

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        recipe, hint = self.recipe, "evoprune tune VIDEO... --operations finds one"
        if recipe is None:
            raise UsageError("method operations has no recipe for this model", hint)
        if recipe.depth != depth:
            raise UsageError(f"the recipe is for {recipe.depth} layers, and this model has {depth}", hint)
        return recipe.plan(tokens, recipe.removed(budget))

"""Operation pruning, from the code of "Beyond Token Pruning: Operation Pruning in Vision-Language Models" (zxcvfd13502/GSOP).

Visual tokens do not leave; layers compute less for them. What goes in which order is a recipe (`pruning.operations`) that
`evoprune tune --operations` finds for a model; a budget takes its first steps that leave no more than that share of the work.
Key tokens, a quarter as in the authors' code, are those with the most attention of the prompt's last token after 2 of 32 layers.
"""

from dataclasses import dataclass, field

from evoprune.errors import UsageError
from evoprune.methods.base import LanguageMethod
from evoprune.pruning.language_plan import LanguagePlan
from evoprune.pruning.operations import Recipe
from evoprune.pruning.ranking import highest, relative
from evoprune.pruning.types import LayerTokens, Selection

KEY = 0.25  # share of the visual tokens that are key
PLACE = 2 / 32  # share of the layers after which they are known


@dataclass(frozen=True)
class Operations(LanguageMethod):
    """Field: recipe: of the model that it works in; None where no model is known yet."""

    name = "operations"
    source = "zxcvfd13502/GSOP"

    recipe: Recipe | None = field(default=None, metadata={"report": lambda recipe: recipe and recipe.digest})

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        recipe = self.recipe
        if recipe is None or recipe.depth != depth:
            raise UsageError(
                "method operations has no recipe for this model" if recipe is None
                else f"the recipe is for {recipe.depth} layers, and this model has {depth}",
                "evoprune tune VIDEO... --operations finds one",
            )  # fmt: skip
        return recipe.plan(tokens, recipe.removed(budget))

    def select(self, tokens: LayerTokens) -> Selection:
        return Selection(highest(relative(tokens.attention()), tokens.left))

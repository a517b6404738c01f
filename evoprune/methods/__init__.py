"""The pruning methods: their registry, and the building blocks for writing a method.

Importing this package imports neither torch nor the methods. Names that need torch are imported on first use.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.methods.base import EncoderMethod, InputMethod, Merger, Selector
    from evoprune.methods.baselines import DivPrune, smaller_frame
    from evoprune.methods.budget import Budget
    from evoprune.methods.chain import MethodChain, PruneConfig, parse
    from evoprune.methods.evoprune import FarthestPoints
    from evoprune.methods.evoprune_paper import EvoPrunePaper
    from evoprune.methods.farthest import STEPS, grid_tables
    from evoprune.methods.language import (
        Drop,
        Dropping,
        LanguageMethod,
        LanguagePlan,
        LayerState,
        LayerTokens,
        layers_before,
        one_drop,
        select_in_language,
        several_drops,
    )
    from evoprune.methods.plans import EncoderPlan, Grid, Merge, SetAside, Stage, TowerShape, full_plan, spread
    from evoprune.methods.ranking import alternate, highest, match
    from evoprune.methods.registry import (
        DEFAULT,
        REUSE,
        available,
        built_in,
        check,
        get,
        may_resize,
        parse_names,
        plugin_code,
        plugins,
    )
    from evoprune.methods.selecting import select, snap, tokens_before_inflection
    from evoprune.methods.types import Candidates, Selection, Tokens, arange_on, generator_seed, nonzero_fixed

__all__ = [
    "DEFAULT",
    "REUSE",
    "STEPS",
    "Budget",
    "Candidates",
    "DivPrune",
    "Drop",
    "Dropping",
    "EncoderMethod",
    "EncoderPlan",
    "EvoPrunePaper",
    "FarthestPoints",
    "Grid",
    "InputMethod",
    "LanguageMethod",
    "LanguagePlan",
    "LayerState",
    "LayerTokens",
    "Merge",
    "Merger",
    "MethodChain",
    "PruneConfig",
    "Selection",
    "Selector",
    "SetAside",
    "Stage",
    "Tokens",
    "TowerShape",
    "alternate",
    "arange_on",
    "available",
    "built_in",
    "check",
    "full_plan",
    "generator_seed",
    "get",
    "grid_tables",
    "highest",
    "layers_before",
    "match",
    "may_resize",
    "nonzero_fixed",
    "one_drop",
    "parse",
    "parse_names",
    "plugin_code",
    "plugins",
    "select",
    "select_in_language",
    "several_drops",
    "smaller_frame",
    "snap",
    "spread",
    "tokens_before_inflection",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "base": ["EncoderMethod", "InputMethod", "Merger", "Selector"],
        "baselines": ["DivPrune", "smaller_frame"],
        "budget": ["Budget"],
        "chain": ["MethodChain", "PruneConfig", "parse"],
        "evoprune": ["FarthestPoints"],
        "evoprune_paper": ["EvoPrunePaper"],
        "farthest": ["STEPS", "grid_tables"],
        "language": [
            "Drop",
            "Dropping",
            "LanguageMethod",
            "LanguagePlan",
            "LayerState",
            "LayerTokens",
            "layers_before",
            "one_drop",
            "select_in_language",
            "several_drops",
        ],
        "plans": ["EncoderPlan", "Grid", "Merge", "SetAside", "Stage", "TowerShape", "full_plan", "spread"],
        "ranking": ["alternate", "highest", "match"],
        "registry": [
            "DEFAULT",
            "REUSE",
            "available",
            "built_in",
            "check",
            "get",
            "may_resize",
            "parse_names",
            "plugin_code",
            "plugins",
        ],
        "selecting": ["select", "snap", "tokens_before_inflection"],
        "types": ["Candidates", "Selection", "Tokens", "arange_on", "generator_seed", "nonzero_fixed"],
    },
)

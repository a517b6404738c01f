"""The registry of pruning methods, and the building blocks for writing new ones.

Importing this package loads neither torch nor the methods. Names that require torch are imported lazily, on first use.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.methods.base import EncoderMethod, InputMethod, Merger, Selector
    from evoprune.methods.baselines import DivPrune, smaller_frame
    from evoprune.methods.budget import Budget
    from evoprune.methods.chain import MethodChain, PruneConfig
    from evoprune.methods.evoprune import FarthestPoints
    from evoprune.methods.evoprune_paper import EvoPrunePaper
    from evoprune.methods.language import (
        Dropping,
        LanguageMethod,
        LanguagePlan,
        LayerState,
        LayerTokens,
        one_drop,
        several_drops,
    )
    from evoprune.methods.plans import EncoderPlan, Grid, SetAside, Stage, TowerShape, spread
    from evoprune.methods.ranking import alternate, highest, match
    from evoprune.methods.registry import MethodText, available, get, plugins
    from evoprune.methods.selecting import select, snap
    from evoprune.methods.types import Candidates, Selection, Tokens, arange_on, nonzero_fixed

__all__ = [
    "Budget",
    "Candidates",
    "DivPrune",
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
    "Merger",
    "MethodChain",
    "MethodText",
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
    "get",
    "highest",
    "match",
    "nonzero_fixed",
    "one_drop",
    "plugins",
    "select",
    "several_drops",
    "smaller_frame",
    "snap",
    "spread",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "base": ["EncoderMethod", "InputMethod", "Merger", "Selector"],
        "baselines": ["DivPrune", "smaller_frame"],
        "budget": ["Budget"],
        "chain": ["MethodChain", "PruneConfig"],
        "evoprune": ["FarthestPoints"],
        "evoprune_paper": ["EvoPrunePaper"],
        "language": [
            "Dropping",
            "LanguageMethod",
            "LanguagePlan",
            "LayerState",
            "LayerTokens",
            "one_drop",
            "several_drops",
        ],
        "plans": ["EncoderPlan", "Grid", "SetAside", "Stage", "TowerShape", "spread"],
        "ranking": ["alternate", "highest", "match"],
        "registry": ["MethodText", "available", "get", "plugins"],
        "selecting": ["select", "snap"],
        "types": ["Candidates", "Selection", "Tokens", "arange_on", "nonzero_fixed"],
    },
)

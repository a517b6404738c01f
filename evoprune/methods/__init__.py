"""The pruning methods: their registry, and everything that a method is written with.

Importing this imports neither torch nor the methods. Names that need torch are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from evoprune.methods.budget import keep_count
from evoprune.methods.plans import Grid, Merge, SetAside, Stage, TowerShape, apportion, spread
from evoprune.methods.registry import (
    DEFAULT,
    available,
    built_in,
    check,
    get,
    may_resize,
    parse_names,
    plugin_code,
    plugins,
)

if TYPE_CHECKING:
    from evoprune.backend.operators import snap
    from evoprune.methods.base import Cosine, Count, EncoderMethod, InputMethod, Merger, Method, Part, Selector, Share
    from evoprune.methods.baselines import DivPrune, most_diverse, smaller_frame
    from evoprune.methods.chain import MethodChain
    from evoprune.methods.language import (
        Drop,
        LanguageMethod,
        LanguagePlan,
        LayerTokens,
        layers_before,
        one_drop,
        several_drops,
    )
    from evoprune.methods.ranking import alternate, closest, highest, match, of_pairs, ranked, relative, scaled
    from evoprune.methods.types import Candidates, Selection, Tokens, arange_on

_SOURCES = {
    "base": ("Cosine", "Count", "EncoderMethod", "InputMethod", "Merger", "Method", "Part", "Selector", "Share"),
    "baselines": ("DivPrune", "most_diverse", "smaller_frame"),
    "chain": ("MethodChain",),
    "language": ("Drop", "LanguageMethod", "LanguagePlan", "LayerTokens", "layers_before", "one_drop", "several_drops"),
    "ranking": ("alternate", "closest", "highest", "match", "of_pairs", "ranked", "relative", "scaled", "snap"),
    "types": ("Candidates", "Selection", "Tokens", "arange_on"),
}
__all__ = [
    "DEFAULT", "Candidates", "Cosine", "Count", "DivPrune", "Drop", "EncoderMethod", "Grid", "InputMethod",
    "LanguageMethod", "LanguagePlan", "LayerTokens", "Merge", "Merger", "Method", "MethodChain", "Part", "Selection",
    "Selector", "SetAside", "Share", "Stage", "Tokens", "TowerShape", "alternate", "apportion", "arange_on",
    "available", "built_in", "check", "closest", "get", "highest", "keep_count", "layers_before", "match",
    "may_resize", "most_diverse", "of_pairs", "one_drop", "parse", "parse_names", "plugin_code", "plugins", "ranked", "relative",
    "scaled", "several_drops", "smaller_frame", "snap", "spread",
]  # fmt: skip


def parse(text: str) -> "MethodChain":
    """Return what `text` names, as `MethodChain.parse` does."""
    from evoprune.methods.chain import MethodChain  # which loads torch

    return MethodChain.parse(text)


if not TYPE_CHECKING:  # a type checker would believe that every name is there

    def __getattr__(name: str):
        for module, names in _SOURCES.items():
            if name in names:
                return getattr(import_module(f"evoprune.methods.{module}"), name)
        raise AttributeError(f"module 'evoprune.methods' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

"""Measurements: `profile`, `eval`, `tune` and `verify`, and pictures of what pruning did.

The command line takes only the names in `__all__`. Each is imported when it is first used, because most of them need torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "agreement": ("compare",),
    "eval": ("Evaluation",),
    "eval_settings": ("EvalSettings",),
    "overlay": ("trace",),
    "profile": ("Profile",),
    "profile_rows": ("Case", "ProfileSettings", "SYNTHETIC"),
    "results": ("Results", "folded", "grid"),
    "sheet": ("contact_sheet",),
    "tune": ("TuneSettings", "Tuning"),
    "verify.run": ("run_checks",),
}
__all__ = [
    "SYNTHETIC",
    "Case",
    "EvalSettings",
    "Evaluation",
    "Profile",
    "ProfileSettings",
    "Results",
    "TuneSettings",
    "Tuning",
    "compare",
    "contact_sheet",
    "folded",
    "grid",
    "run_checks",
    "trace",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

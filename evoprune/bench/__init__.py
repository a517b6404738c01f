"""Measurements: `profile`, `eval`, `tune` and `verify`, and pictures of what pruning did.

Other packages take only the names in `__all__`. Each is imported when it is first used, because most of them need torch.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "SYNTHETIC": "profile_rows",
    "Case": "profile_rows",
    "ProfileSettings": "profile_rows",
    "Profile": "profile",
    "EvalSettings": "eval_settings",
    "Evaluation": "eval",
    "TuneSettings": "tune",
    "Tuning": "tune",
    "run_checks": "verify.run",
    "compare": "agreement",
    "trace": "overlay",
    "contact_sheet": "sheet",
    "Results": "results",
    "folded": "results",
    "grid": "results",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

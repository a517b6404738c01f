"""Lazy imports for the `__init__.py` of a package: each public name is imported from its file on first use.

For example, `from evoprune.video import probe` loads only what `probe` needs, but not the rest of the package or torch.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def door(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for the `__init__.py` of a package.

    Args:
        package: Dotted name of the package.
        homes: Maps each module of the package to the public names that it defines.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return get, lambda: sorted(home_of)

"""Lazy imports for a package's `__init__.py`: each public name is imported from its own file on first use.

For example, `from evoprune.video import probe` imports only the modules required by `probe`, but neither torch nor the rest of the
package.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def door(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` functions that make a package's `__init__.py` import its public names lazily.

    Args:
        package: Dotted name of the package.
        homes: Maps each module in the package to the public names it defines.
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{home_of[name]}"), name)

    return get, lambda: sorted(home_of)

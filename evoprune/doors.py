"""Lazy imports for a package's `__init__.py`: each public name is imported from its own file on first use.

For example, `from evoprune.video import probe` imports only the modules required by `probe`, but neither torch nor the rest of the
package. The stub next to `__init__.py` lists the public names, for this module and for type checkers.
"""

import ast
from collections.abc import Callable
from importlib import import_module


def attach_stub(package: str, file: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """Return the `__getattr__` and `__dir__` functions and the `__all__` of a package whose public names are imported lazily.

    Args:
        package: Dotted name of the package.
        file: The package's `__init__.py`. Each line of its stub, `__init__.pyi`, imports one public name from its file.
    """
    with open(f"{file}i", encoding="utf-8") as stub:
        imports = [each for each in ast.parse(stub.read()).body if isinstance(each, ast.ImportFrom)]
    homes = {alias.name: each.module for each in imports for alias in each.names}

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if homes[name] is None:
            return import_module(f"{package}.{name}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return get, lambda: sorted(homes), sorted(homes)

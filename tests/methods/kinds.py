"""One method of each kind. By default, tests run only these methods, but `-m full` runs all methods."""

from collections.abc import Iterable

import pytest

from evoprune import methods

# In order: no pruning; selecting between two layers; merging; setting rows aside; resizing the input; selecting after the encoder
# with the question; dropping in the language model; selecting after another method.
ONE_OF_EACH = (
    "none", "evoprune", "tome", "ipcv", "downscale", "cdpruner", "fastv", "reuse+visionzip",
)  # fmt: skip

# Methods that need a file for a particular model: a recipe or a trained scorer.
NEED_FILES = ("operations", "idpruner", "visionselector")

# Methods that act inside the language model.
INNER = tuple(name for name in methods.available(plugins=False) if methods.MethodChain.parse(name).language)


def one_of_each(names: Iterable[str]) -> list:
    """Return the names as test parameters. Names that are not in `ONE_OF_EACH` get the `full` mark.

    `NEED_FILES` are left out.
    """
    runs = [name for name in names if not any(each in name for each in NEED_FILES)]
    return [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.full) for name in runs]

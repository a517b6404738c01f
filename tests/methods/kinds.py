"""The kinds of methods: what shows of one of each by default shows of all methods with `-m full`."""

from collections.abc import Iterable

import pytest

from evoprune import methods

# Nothing; between two layers, merging, set aside; the input; after the encoder with the question; in the language model; behind
# another method.
ONE_OF_EACH = (
    "none", "evoprune", "tome", "ipcv", "downscale", "cdpruner", "fastv", "reuse+visionzip",
)  # fmt: skip

# They act inside the language model.
INNER = tuple(name for name in methods.built_in() if methods.parse(name).language)


def one_of_each(names: Iterable[str]) -> list:
    """Parameters of a test: the names, of which those of the same kind as another are exhaustive.

    Without `operations`, which needs the recipe of a model.
    """
    runs = [name for name in names if "operations" not in name]
    return [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.full) for name in runs]

"""The kinds of methods: what shows of one of each by default shows of all methods with `-m full`."""

from collections.abc import Iterable

import pytest

# Nothing; between two layers, merging, set aside; the input; after the encoder with the question; in the language model; behind
# another method.
ONE_OF_EACH = (
    "none", "evoprune", "tome", "ipcv", "downscale", "cdpruner", "fastv", "reuse+visionzip",
)  # fmt: skip


def one_of_each(names: Iterable[str]) -> list:
    """Parameters of a test: the names, of which those of the same kind as another are exhaustive."""
    return [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.full) for name in names]

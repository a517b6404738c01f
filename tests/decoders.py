"""Which libraries decode videos here: decord has no wheels for every system."""

from importlib.util import find_spec

import pytest

DECODERS = ("pyav", "decord") if find_spec("decord") else ("pyav",)
needs_decord = pytest.mark.skipif("decord" not in DECODERS, reason="decord is not installed")
EVERY = ["pyav", pytest.param("decord", marks=needs_decord)]

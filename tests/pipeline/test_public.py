"""The names of `import evoprune`: all there, listed, and free until they are used."""

import subprocess
import sys

import evoprune


def test_every_public_name_can_be_had_and_is_listed():
    assert set(evoprune.__all__) <= set(dir(evoprune))
    for name in {*evoprune.__all__} - {"EvoPrune"}:
        assert getattr(evoprune, name).__name__.rpartition(".")[2] == name
    assert evoprune.EvoPrune.__name__ == "PruningContext"  # a method has the name EvoPrune


def test_importing_it_costs_nothing():
    code = "import sys, evoprune; dir(evoprune); print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

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


def test_an_answer_imports_neither_transformers_nor_the_compiler_of_torch():
    """Each takes longer to import than a short answer takes."""
    code = (
        "import sys, evoprune\n"
        "video = evoprune.VideoQA.load('demo').encode('samples/square.mp4', frames=4)\n"
        "assert video.ask('What?', max_new_tokens=1).text\n"
        "print([m for m in ('transformers', 'torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

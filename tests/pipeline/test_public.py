"""The names of `import evoprune`: all there, listed, and free until they are used."""

import pydoc
import subprocess
import sys
from dataclasses import fields
from functools import partial
from inspect import signature

import pytest

import evoprune
from evoprune.pipeline.options import GenerationOptions, ModelOptions, PruneOptions, SamplingOptions


def test_every_public_name_can_be_had_and_is_listed():
    assert set(evoprune.__all__) <= set(dir(evoprune))
    for name in {*evoprune.__all__} - {"EvoPrune"}:
        assert getattr(evoprune, name).__name__.rpartition(".")[2] == name
    assert evoprune.EvoPrune.__name__ == "PruningContext"  # a method has the name EvoPrune


def options_of(*kinds: type) -> dict[str, object]:
    """The fields of dataclasses, with their defaults."""
    return {field.name: field.default for kind in kinds for field in fields(kind)}


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (evoprune.VideoQA.load, (ModelOptions, PruneOptions)),
        (evoprune.VideoQA, (PruneOptions,)),
        (evoprune.VideoQA.encode, (SamplingOptions,)),
        (evoprune.EncodedVideo.ask, (GenerationOptions,)),
        (evoprune.apply, (evoprune.EvoPrune,)),
        (evoprune.EvoPrune, (evoprune.EvoPrune,)),
    ],
)
def test_signatures_have_every_option_with_its_default(function, kinds):
    shown = {name: parameter.default for name, parameter in signature(function).parameters.items()}
    assert options_of(*kinds).items() <= shown.items() and not any("options" in name for name in shown)


@pytest.mark.parametrize("name", sorted(set(evoprune.__all__) - {"methods"}))
def test_help_explains_options_where_they_are_used(name):
    assert "pipeline.options" not in pydoc.plain(pydoc.render_doc(getattr(evoprune, name)))


@pytest.mark.parametrize("call", [evoprune.EvoPrune, partial(evoprune.apply, None), partial(evoprune.encode, None)])
def test_a_mistyped_option_is_named_with_those_that_exist(call):
    with pytest.raises(TypeError, match=r"unknown option 'bugdet'; known: budget, method, method_args, .*seed"):
        call(bugdet=0.5)


def test_a_name_is_no_loaded_model():
    with pytest.raises(TypeError, match=r"VideoQA.load\('demo'\) loads one"):
        evoprune.VideoQA("demo")


@pytest.mark.parametrize("question", [3, None, b"What?", ["What?"]])
def test_a_question_is_a_text(question):
    video = evoprune.VideoQA.load("demo").encode("samples/square.mp4", frames=4)
    with pytest.raises(evoprune.UsageError, match="not a text"):
        video.ask(question)


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

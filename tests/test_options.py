"""Front ends name the options that they accept; each option does what it says in each of them, or is refused."""

import inspect
from collections.abc import Callable
from dataclasses import fields

import pytest
import typer

import evoprune
from evoprune.session import PipelineOptions
from evoprune.signatures import takes
from evoprune_cli import options as opt
from evoprune_cli.main import app

NAMES = [field.name for kind in PipelineOptions.KINDS for field in fields(kind)]
COMMANDS = {name: command.callback for name, command in typer.main.get_command(app).commands.items()}
# The Python functions with options, each with arguments that are never looked at, because the options are checked first.
FUNCTIONS: dict[str, Callable] = {
    "VideoQA": lambda **given: evoprune.VideoQA(None, **given),
    "VideoQA.load": lambda **given: evoprune.VideoQA.load("none", **given),
    "VideoQA.encode": lambda **given: evoprune.VideoQA.encode(None, "none", **given),
    "VideoQA.ask": lambda **given: evoprune.VideoQA.ask(None, "none", "?", **given),
    "VideoQA.stream": lambda **given: evoprune.VideoQA.stream(None, **given),
    "VideoQA.find": lambda **given: evoprune.VideoQA.find(None, "none", "?", **given),
    "EncodedInputs.ask": lambda **given: evoprune.EncodedInputs.ask(None, "?", **given),
    "Chat.ask": lambda **given: evoprune.Chat.ask(None, "?", **given),
    "processor_inputs": lambda **given: evoprune.processor_inputs("none", "none", "?", **given),
    "read_ahead": lambda **given: evoprune.read_ahead("none", "none", **given),
    "read_frames": lambda **given: evoprune.read_frames("none", **given),
}


def accepted(name: str) -> set[str]:
    """Return the options that a Python function names in its signature."""
    function = evoprune
    for part in name.split("."):
        function = getattr(function, part)
    return {*inspect.signature(function).parameters} & {*NAMES}


def test_each_option_is_named_by_a_command_and_by_a_python_function():
    in_commands = {name for command in COMMANDS.values() for name in command.names}
    in_python = {name for function in FUNCTIONS for name in accepted(function)}
    assert in_commands == in_python == {*NAMES} and len(NAMES) == len({*NAMES})


def test_a_front_end_cannot_name_an_unknown_option():
    with pytest.raises(ValueError, match="no option is called 'speed'"):
        opt.command("fps", "speed", short="fps")
    with pytest.raises(ValueError, match="no option is called 'fps'"):
        takes(evoprune.EvoPrune, names=["budget", "fps"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_python_function_refuses_options_that_it_does_not_name(function):
    for name in {*NAMES} - accepted(function) - {"model"}:
        with pytest.raises(TypeError, match=f"(unknown option|unexpected keyword argument) '{name}'"):
            FUNCTIONS[function](**{name: None})

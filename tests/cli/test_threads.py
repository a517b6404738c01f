"""`--threads` and EVOPRUNE_THREADS in every command, and how threads wait for each other."""

import os

import pytest
import torch

from evoprune_cli import __main__

CLIP = "samples/square.mp4"
COMMANDS = {
    "ask": (CLIP, "What happens?"),
    "batch": (CLIP, "-Q", "What happens?", "-m", "demo", "-o", "-"),
    "eval": ("--data", "samples/questions.jsonl"),
    "inspect": (CLIP,),
    "profile": (),
}


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_number_that_is_none_is_refused(cli, command):
    result = cli(command, *COMMANDS[command], "--threads", "many")
    assert result.code == 2
    assert result.err == "error: 'many' is not a number of threads\nhint: use auto, or 1 to 256\n"


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("option", "variable", "threads"), [((), None, 1), (("--threads", "3"), "2", 3), ((), "2", 2)], ids=str
)
def test_reports_say_how_many_there_were(cli, tiny_folder, monkeypatch, option, variable, threads):
    if variable:
        monkeypatch.setenv("EVOPRUNE_THREADS", variable)
    torch.set_num_threads(4)
    asked = (CLIP, "What happens?", "-m", str(tiny_folder), "-n", "1", "--json", *option)
    assert cli("ask", *asked).record["env"]["threads"] == threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("given", "spin"), [({}, "10000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")], ids=str
)
def test_threads_sleep_soon_unless_the_environment_says_otherwise(monkeypatch, given, spin):
    monkeypatch.setattr(os, "environ", given)
    monkeypatch.setattr("evoprune_cli.main.run", lambda: None)
    __main__.start()
    assert given.get("GOMP_SPINCOUNT") == spin

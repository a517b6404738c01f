"""Load on a server, and its first token, measured for a moment: the tables are complete, and nothing is wrong."""

import sys
from collections import Counter
from importlib.metadata import entry_points
from io import BytesIO
from random import Random

import pytest
from PIL import Image

from experiments.speed import server_first_token, server_load

NO_SERVER = sys.platform != "linux" or not entry_points(group="evoprune.commands", name="serve")
REASON = "the server is not installed: python -m experiments.environments serve"


@pytest.mark.skipif(NO_SERVER, reason=REASON)
def test_load(capsys):
    assert server_load.main(["--clients", "8", "--minutes", "0.1"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in ("alone", "beside the others", "slow", "goes", "turn 5 of all"))
    assert "says: 0." in text


@pytest.mark.skipif(NO_SERVER, reason=REASON)
def test_first_token(capsys):
    assert server_first_token.main(["--repeat", "3"]) == 0
    assert capsys.readouterr().out.count("\n") == 5


def test_half_of_the_clients_ask():
    kinds = [each(Random(0)) for each in server_load.mixed(32)]
    assert Counter(kinds)["asks"] == 16 and {"slow", "goes"} < {*kinds} and {*kinds} & {*server_load.HOSTILE}


def test_the_bomb_is_small_and_unpacks_to_all_of_its_pixels():
    made = server_load.png_bomb(2000)
    assert len(made) < 1000
    assert Image.open(BytesIO(made)).getextrema() == (0, 0)

"""Load on a server, and its first token, measured for a moment: the tables are complete, and nothing is wrong."""

import socket
import sys
from collections import Counter
from importlib.metadata import entry_points
from io import BytesIO
from random import Random
from urllib.request import urlopen

import pytest
from PIL import Image

from evoprune.errors import VideoError
from evoprune.video.download import downloaded
from evoprune_serve import public
from experiments.speed import server_first_token, server_load
from experiments.speed.server_lures import INSIDE, REBINDING, REFUSED, lured, luring
from tests.threads import one_thread  # noqa: F401

NO_SERVER = sys.platform != "linux" or not entry_points(group="evoprune.commands", name="serve")
REASON = "the server is not installed: python -m experiments.environments serve"


@pytest.mark.skipif(NO_SERVER, reason=REASON)
def test_load(capsys):
    assert server_load.main(["--clients", "8", "--minutes", "0.1"]) == 0
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in ("alone", "beside the others", "slow", "goes", "turn 5 of all"))
    assert "says: 0." in text and "leads: 0." in text


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


@pytest.mark.skipif(sys.platform != "linux", reason="the whole network 127.0.0.0 is the loopback's")
def test_lures_lead_inside_whoever_does_not_look(monkeypatch):
    monkeypatch.setattr(public, "is_public", public.is_public)  # both are put back in the end
    monkeypatch.setattr(socket, "getaddrinfo", socket.getaddrinfo)
    lured()
    with luring() as lures:
        found = [lures.redirect(Random(seed), lures.port) for seed in range(60)]
        found.append((lures.url("clip.mp4", "both.test"), REFUSED))
        found += [(lures.url("on/1", REBINDING), REFUSED)] * 2
        for url, says in found:
            transport = public.PublicTransport(lambda: None)
            with pytest.raises(VideoError, match=says), downloaded(url, transport=transport):
                pass
        assert not lures.taken
        urlopen(lures.url(f"302/http:%2F%2F{INSIDE}:{lures.port}%2Fclip.mp4")).close()
        assert lures.taken == [f"a connection to {INSIDE}"]

"""The figures, requests, and processes of the comparison of servers. No test needs vLLM."""

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from evoprune.methods import Budget
from experiments.speed.serving import MANY, free_port, rows_of, sides_of
from experiments.speed.serving_client import NEW_TOKENS, Answer, Run, percentile
from experiments.speed.serving_inputs import AT_ONCE, FRAMES, IN_TURN, ONE, UNITS, requests_of
from experiments.speed.serving_servers import memory_of, serving
from experiments.speed.serving_sides import Side

READY = """
import http.server, subprocess, sys
held = b"x" * 2**27
child = subprocess.Popen([sys.executable, "-c", "held = b'x' * 2**27; import time; time.sleep(600)"])
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def test_a_percentile_is_one_of_the_values():
    assert [percentile([3, 1, 2, 4], percent) for percent in (0, 25, 26, 95, 100)] == [1, 1, 2, 4, 4]
    assert percentile(range(1, 101), 95) == 95
    assert percentile([7], 95) == 7


def run(first: float, wall: float) -> Run:
    return Run(tuple(Answer(first * each, wall, 1000) for each in (1, 1, 3)), wall)


def test_ratios_are_formed_within_a_round():
    """The second round is twice as slow for both sides, which doesn't change their ratio."""
    found = {"stock": [run(8, 20), run(16, 40)], "plugin:0.75": [run(2, 10), run(4, 20)]}
    stock, plugin = rows_of(found, {"stock": 2**30, "plugin": 3 * 2**29})
    rate, tokens = 60 * 3 * (1 / 20 + 1 / 40) / 2, NEW_TOKENS * 3 * (1 / 20 + 1 / 40) / 2
    assert stock == ["stock", "1,000", "16.00", "48.00", "1.00", f"{rate:.1f}", f"{tokens:.1f}", "1.00", "1.0"]
    assert plugin[0] == "plugin:0.75" and plugin[2:5] == ["4.00", "12.00", "4.00"] and plugin[7:] == ["2.00", "1.5"]


def test_four_of_the_concurrent_requests_are_about_the_same_video():
    requests = requests_of(MANY, Path("/videos"), 6)
    parts = [chat[0]["content"] for chat in requests]
    urls = Counter(part[0]["video_url"]["url"] for part in parts)
    assert len(requests) == AT_ONCE and sorted(urls.values()) == [1] * 12 + [4]
    assert [parts[n][0]["video_url"]["url"] for n in (0, 4, 8, 12)] == ["file:///videos/6.mp4"] * 4
    assert len({parts[n][1]["text"] for n in (0, 4, 8, 12)}) == 4


def test_loads_that_follow_one_another_are_about_different_videos():
    loads = [requests_of(ONE, Path("/videos"), 0), requests_of(MANY, Path("/videos"), IN_TURN + 1)]
    urls = [{chat[0]["content"][0]["video_url"]["url"] for chat in load} for load in loads]
    assert len(urls[0]) == IN_TURN + 1 and not urls[0] & urls[1]


@pytest.mark.parametrize("rate", [0.75, 0.9])
def test_evs_and_the_plugin_keep_equally_many_tokens(rate):
    """vLLM's EVS keeps the whole first frame pair, and rounds down."""
    pair = UNITS[0] * UNITS[1]
    evs = max(pair, int(FRAMES // 2 * pair * (1 - rate)))
    share = Side("plugin", rate).fields["mm_processor_kwargs"]["evoprune_budget"]
    assert Budget(share, share).keep((FRAMES // 2, *UNITS)) == evs
    assert Side("serve", rate).fields == {"budget": share}


def test_sides_are_parsed_and_share_processes():
    sides = [Side.parse(each) for each in sides_of("Qwen/Qwen3-VL-4B-Instruct").split(",")]
    assert [str(side) for side in sides] == sides_of("Qwen/Qwen3-VL-4B-Instruct").split(",")
    assert Side.parse("plugin:0.75").process == Side.parse("plugin:0.9").process == "plugin"
    assert Side.parse("evs:0.75").process != Side.parse("evs:0.9").process
    for text in ("evs", "stock:0.5", "none:0.5", "plugin:much"):
        with pytest.raises(ValueError):
            Side.parse(text)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_a_server_ends_with_its_children_and_both_count_as_its_memory(tmp_path, monkeypatch):
    (tmp_path / "health").touch()
    monkeypatch.setattr("experiments.speed.serving_servers.ROOT", tmp_path)
    port = free_port()
    others = {*children(os.getpid())}  # of earlier tests
    with (
        pytest.raises(KeyboardInterrupt),
        serving([sys.executable, "-c", READY, str(port)], port, 1, tmp_path / "log") as memory,
    ):
        (server,) = {*children(os.getpid())} - others
        (child,) = children(server)
        end = time.monotonic() + 60
        while memory.peak < 2**28 and time.monotonic() < end:
            time.sleep(0.1)
        assert 2**28 < memory_of(server) < 2**29
        raise KeyboardInterrupt
    assert memory_of(server) == 0
    wait_until(lambda: memory_of(child) == 0)  # the system may take a moment to end it


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"), serving(command, 1, 1, tmp_path / "log"):
        pass


def wait_until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Return a process's children."""
    return [int(each) for file in Path(f"/proc/{pid}/task").glob("*/children") for each in file.read_text().split()]

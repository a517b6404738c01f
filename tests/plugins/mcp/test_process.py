"""`evoprune mcp` as a process: how it starts and ends, and what it writes."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest

from tests.plugins.mcp.serving import BEGUN, COLOUR, ENCODES, REASON, ROOT, SAMPLES, command

pytest.importorskip("mcp.server.mcpserver", reason=REASON)
INITIALIZE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}


def line(method: str, number: int | None = None, **params) -> str:
    message = {"jsonrpc": "2.0", "method": method, "params": params}
    return json.dumps(message if number is None else message | {"id": number}) + "\n"


HELLO = line("initialize", 1, **INITIALIZE) + line("notifications/initialized")


def started(*options: str, **variables: str) -> subprocess.Popen:
    arguments, environment = command("--allow-dir", str(SAMPLES), *options, **variables)
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(arguments, env=os.environ | environment, text=True, cwd=ROOT, **pipes)


def greeted(*options: str, **variables: str) -> subprocess.Popen:
    """Start a server and wait for its greeting."""
    server = started(*options, **variables)
    server.stdin.write(HELLO)
    server.stdin.flush()
    assert json.loads(server.stdout.readline())["result"]["serverInfo"]["name"] == "evoprune"
    return server


def ask(server: subprocess.Popen, path: str = "square.mp4") -> None:
    arguments = {"paths": [path], "question": COLOUR}
    server.stdin.write(line("tools/call", 2, name="ask_video", arguments=arguments))
    server.stdin.flush()


def wait_until_it_encodes(server: subprocess.Popen) -> None:
    timer = threading.Timer(300, server.kill)  # a server that failed would say nothing more
    timer.start()
    read = iter(server.stderr.readline, "")
    assert ENCODES in read, "the server encodes nothing"
    timer.cancel()


def test_the_end_of_stdin_ends_it():
    server = greeted()
    ask(server)
    assert json.loads(server.stdout.readline())["result"]["structuredContent"]["answer"] == "green"
    out, err = server.communicate(timeout=30)
    assert server.returncode == 0 and out == "" and "Traceback" not in err


def test_the_end_of_stdin_stops_a_question_in_progress(tmp_path):
    shutil.copy(SAMPLES / "square.mp4", tmp_path / "slow.mp4")
    server = greeted("--allow-dir", str(tmp_path))
    ask(server, str(tmp_path / "slow.mp4"))
    wait_until_it_encodes(server)
    out, err = server.communicate(timeout=30)
    assert server.returncode == 0 and "Traceback" not in err
    assert all(json.loads(each)["jsonrpc"] == "2.0" for each in out.splitlines())


def request(text: str, number: object = 3) -> str:
    """A request to describe a file. `text` is the rest of the path, as JSON."""
    return line("tools/call", number, name="describe_file", arguments={"path": "PATH"}).strip().replace("PATH", text)


PARSE_ERROR, INVALID_REQUEST, INVALID_PARAMS = -32700, -32600, -32602
# Lines, and the codes and IDs of the errors that answer them. The code of an error of a tool is 0.
REFUSED = {
    "no JSON": [(PARSE_ERROR, None)],
    '{"jsonrpc":': [(PARSE_ERROR, None)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping"\0}': [(PARSE_ERROR, None)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping"} {}': [(PARSE_ERROR, None)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping", "params": ' + "[" * 10**5: [(PARSE_ERROR, None)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping", "params": {"a": ' + "[" * 300 + "]" * 300 + "}}": [
        (INVALID_PARAMS, 3)
    ],
    '{"jsonrpc": "2.0", "id": ' + "1" * 10**4 + ', "method": "ping"}': [(PARSE_ERROR, None)],
    "5": [(INVALID_REQUEST, None)],
    "[]": [(INVALID_REQUEST, None)],
    f"[{request('a', 4)}, {request('a', 5)}]": [(INVALID_REQUEST, 4), (INVALID_REQUEST, 5)],
    '{"id": 3, "method": "ping"}': [(INVALID_REQUEST, 3)],
    '{"jsonrpc": "2.0"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": "x"}': [(INVALID_REQUEST, "x")],
    '{"jsonrpc": "2.0", "id": 3, "method": 1}': [(INVALID_REQUEST, 3)],
    '{"jsonrpc": "2.0", "method": "ping"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": null, "method": "ping"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": {"a": 1}, "method": "ping"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": true, "method": "ping"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": 1e400, "method": "ping"}': [(INVALID_REQUEST, None)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping", "params": "text"}': [(INVALID_PARAMS, 3)],
    '{"jsonrpc": "2.0", "id": 3, "method": "ping", "params": []}': [(INVALID_PARAMS, 3)],
    request(r"\ud83d"): [(INVALID_PARAMS, 3)],
    request(r"\ud83d, and more"): [(INVALID_PARAMS, 3)],
    '{"jsonrpc": "2.0", "id": 3, "result": 5}': [(INVALID_REQUEST, None)],
    request("x" * 2**23): [(INVALID_REQUEST, None)],
    request(r"a\u0000b"): [(0, 3)],
    request("a").replace('"path"', '"path": 1, "path"').replace(", ", ",\r"): [(0, 3)],
    request("a", 2**200): [(0, 2**200)],
    "": [],
    '{"jsonrpc": "2.0", "method": "notifications/unknown"}': [],
}


def test_every_request_is_answered():
    with greeted(LOAD_S="60") as server:
        for text, refused in REFUSED.items():
            server.stdin.write(f"{text}\n{line('ping', 9)}")
            server.stdin.flush()
            answers = [json.loads(server.stdout.readline()) for _ in range(len(refused) + 1)]
            answers.sort(key=lambda answer: answer.get("id") == 9)  # a ping may overtake a tool
            assert answers.pop() == {"jsonrpc": "2.0", "id": 9, "result": {}}, text[:99]
            codes = [(answer.get("error", {"code": 0})["code"], answer["id"]) for answer in answers]
            assert codes == refused, (text[:99], answers)
        server.stdin.buffer.write(b"\xef\xbb\xbf" + request("PATH").encode().replace(b"PATH", b"\xff\xfe") + b"\n")
        server.stdin.flush()
        assert json.loads(server.stdout.readline())["result"]["isError"]
        out, err = server.communicate('{"a last line":', timeout=30)
        assert json.loads(out)["error"]["code"] == PARSE_ERROR and server.returncode == 0 and "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.few(3)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
@pytest.mark.parametrize("state", ["idle", "loading", "answering"])
def test_signals_end_it(tmp_path, state, number, code):
    shutil.copy(SAMPLES / "square.mp4", tmp_path / "slow.mp4")
    server = greeted("--allow-dir", str(tmp_path), LOAD_S="60" if state == "loading" else "0")
    if state == "answering":
        ask(server, str(tmp_path / "slow.mp4"))
        wait_until_it_encodes(server)
    server.send_signal(number)
    assert server.wait(30) == code
    out, err = server.communicate()
    assert "Traceback" not in err and all(json.loads(each)["id"] == 2 for each in out.splitlines())


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.few(2)
@pytest.mark.parametrize("moment_s", [0.3, 0.6, 0.9, 1.2, 1.8])
def test_ctrl_c_ends_it_before_it_serves(moment_s):
    with started(SAY_BEGUN="1") as server:
        assert server.stderr.readline() == BEGUN
        time.sleep(moment_s)
        server.send_signal(signal.SIGINT)
        code, err = server.wait(30), server.stderr.read()
        assert code == -signal.SIGINT, err
        assert "Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.few(1)
@pytest.mark.parametrize("gap_s", [0, 0.02, 0.1])
def test_ctrl_c_twice_says_nothing_more(gap_s):
    with greeted() as server:
        for _ in range(2):
            server.send_signal(signal.SIGINT)
            time.sleep(gap_s)
        assert server.wait(30) == -signal.SIGINT and "Traceback" not in server.stderr.read()


def test_a_client_that_is_gone_ends_it_quietly():
    with greeted() as server:
        server.stdout.close()
        server.stdin.write(line("tools/list", 2))
        server.stdin.close()
        assert server.wait(30) == 0 and "Traceback" not in server.stderr.read()


def test_folders_are_required_and_must_exist(tmp_path):
    (tmp_path / "file").write_text("")
    for options, says in (
        ((), "--allow-dir DIR"),
        (("--allow-dir", str(tmp_path / "none")), "is not a folder"),
        (("--allow-dir", str(tmp_path / "file")), "is not a folder"),
        (("--allow-dir", str(tmp_path), "-b", "7"), "budget"),
        (("--allow-dir", str(tmp_path), "-m", str(tmp_path / "none")), "none"),
    ):
        arguments, environment = command(*options)
        done = subprocess.run(
            arguments, env=os.environ | environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.stdout == "" and says in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr
        assert done.returncode == (4 if "-m" in options else 2)


def test_the_configuration_of_the_page():
    page = (ROOT / "docs" / "agents.md").read_text("utf-8")
    (block,) = re.findall(r"^```json\n(.*?)^```", page, re.S | re.M)
    configured = json.loads(block)["mcpServers"]["evoprune"]
    assert os.path.basename(configured["command"]) == "evoprune" and configured["args"][:2] == ["mcp", "--allow-dir"]
    with greeted(*configured["args"][3:]) as server:
        server.stdin.close()
        assert server.wait(30) == 0

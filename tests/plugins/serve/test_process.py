"""`evoprune serve` as a process, used by real clients: curl, the package `openai`, the program `llm`."""

import base64
import json
import logging
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.gguf_files import Folder
from tests.plugins.serve.serving import CHAT, COLOUR, REASON, SAMPLES, body, message, url_of, video
from tests.tiny import save_tiny

pytest.importorskip("starlette", reason=REASON)
from evoprune_serve.loading import _accept

ROOT = SAMPLES.parent
PROGRESS = "loading model, "  # begins the lines printed while the model loads
START_S = 120
BEGUN = "the program has begun\n"
# The command without an installed entry point: the plug-in is found as pytest finds it.
PROGRAM = f"""
import os, signal, sys
usual = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the installed command does, however slow these imports are
if "SAY_BEGUN" in os.environ:
    print({BEGUN!r}, end="", file=sys.stderr, flush=True)
from importlib.metadata import EntryPoint
from evoprune_cli import main
entry = EntryPoint("serve", "evoprune_serve:serve", main.COMMANDS)
main.plugged = lambda: {{"serve": entry}}
from evoprune_cli.__main__ import start
signal.signal(signal.SIGINT, usual)
start()
"""


def command(*options: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a server, and its environment."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins" / "serve"), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, "-c", PROGRAM, "serve", *options], environment


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """Start a server. Yields the process and its port; temporary files and the log are in the folder."""
    line, environment = command("--port", "0", *options)
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(line, stdout=out, stderr=out, env=environment | {"TMPDIR": str(folder)}, cwd=folder)
    try:
        end = time.monotonic() + START_S
        while not (found := re.search(r"served at http://\S+:(\d+)/ \(API: http://\S+/v1\)", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        wait_for_health(int(found[1]))
        yield server, int(found[1])
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def wait_for_health(port: int) -> None:
    end = time.monotonic() + START_S
    while True:
        try:
            return urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), "--allow-dir", str(SAMPLES)) as (_, port):
        yield port


def run(*options: str, **variables: str) -> subprocess.CompletedProcess:
    line, environment = command(*options)
    return subprocess.run(line, env=environment | variables, capture_output=True, text=True, timeout=120)


def test_the_commands_of_the_page(port):
    """Runs the curl commands of the page as printed, except for the port."""
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"^```text\n(.*?)^```", page, re.S | re.M) if block.startswith("curl")]
    readme = (ROOT / "README.md").read_text("utf-8").splitlines()
    blocks += [line for line in readme if line.startswith("curl")]
    assert len(blocks) >= 2
    for block in blocks:
        text = block.replace("localhost:8000", f"127.0.0.1:{port}").replace("file:///DIR", SAMPLES.as_uri())
        done = subprocess.run(["bash", "-e", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "green", text


def test_collections_of_garbage_skip_what_was_loaded(tmp_path):
    """Otherwise, each full collection would block the event loop for more than 100 ms."""
    (python, flag, program, *options), environment = command("--port", "0")
    ended = "EndingServer.run = lambda self, sockets: print('objects:', len(gc.get_objects()), file=sys.stderr)"
    program = f"import gc\nimport sys\nfrom evoprune_serve.ending import EndingServer\n{ended}\n{program}"
    line = [python, flag, program, *options]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.partition("objects: ")[2]) < 10_000


def test_the_first_token_is_within_10_ms_of_video_qa(port, qa):
    """For an encoded video, asked from another process. The fastest of several runs counts, because the machine may be busy."""
    encoded = qa.encode(SAMPLES / "square.mp4")
    data = json.dumps(body(stream=True)).encode()
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(10):
        own = []
        asked = []
        for _ in range(15):
            start = time.perf_counter()
            next(encoded.ask(COLOUR))
            own.append(time.perf_counter() - start)
            start = time.perf_counter()
            connection.request("POST", CHAT, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            while b'"content": "g' not in (line := response.readline()):
                assert line, "the response ends without a token"
            asked.append(time.perf_counter() - start)
            response.read()
        if min(asked) - statistics.median(own) < 0.010:
            break
    connection.close()
    assert min(asked) - statistics.median(own) < 0.010


def test_a_killed_server_leaves_nothing_that_the_next_does_not_remove(tmp_path):
    with serving(tmp_path) as (server, port):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", CHAT, json.dumps(body()), {"Content-Type": "application/json"})
        assert json.loads(connection.getresponse().read())["choices"]
        connection.close()
        server.kill()
        server.wait()
    left = set(tmp_path.glob("evoprune-*"))
    assert left
    with serving(tmp_path):
        assert not left & set(tmp_path.glob("evoprune-*"))
    assert not list(tmp_path.glob("evoprune-*"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_signals_end_it(tmp_path, number, code):
    with serving(tmp_path) as (server, _):
        server.send_signal(number)
        assert server.wait(30) == code
    assert not list(tmp_path.glob("evoprune-*")) and "Traceback" not in (tmp_path / "server.log").read_text()


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.few(3)
@pytest.mark.parametrize("moment_s", [0.3, 0.4, 0.8, 0.9, 1.0, 1.2])
def test_ctrl_c_ends_it_before_it_serves(tmp_path, moment_s):
    line, environment = command("--port", "0")
    environment |= {"TMPDIR": str(tmp_path), "SAY_BEGUN": "1"}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as server:
        assert server.stdout.readline() == BEGUN
        time.sleep(moment_s)
        server.send_signal(signal.SIGINT)
        output, _ = server.communicate(timeout=30)
        assert server.returncode == -signal.SIGINT and "Traceback" not in output, output
    assert not list(tmp_path.glob("evoprune-*"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.few(1)
@pytest.mark.parametrize("gap_s", [0, 0.02, 0.1])
def test_ctrl_c_twice_says_nothing_more(tmp_path, gap_s):
    with serving(tmp_path) as (server, _):
        for _ in range(2):
            server.send_signal(signal.SIGINT)
            time.sleep(gap_s)
        assert server.wait(30) == -signal.SIGINT
    assert not list(tmp_path.glob("evoprune-*")) and "Traceback" not in (tmp_path / "server.log").read_text()


def test_a_second_ctrl_c_while_the_first_is_handled(monkeypatch):
    import uvicorn

    from evoprune_serve.ending import EndingServer

    class Interrupted(EndingServer):
        forced = interrupted = False

        @property
        def force_exit(self) -> bool:
            value = self.forced
            if not self.interrupted:  # the second arrives just after this was read
                self.interrupted = True
                self.handle_exit(signal.SIGINT, None)
            return value

        @force_exit.setter
        def force_exit(self, value: bool) -> None:
            self.forced = value

    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "disabled", False)
    Interrupted(uvicorn.Config(None), None).handle_exit(signal.SIGINT, None)
    assert logging.getLogger("uvicorn.error").disabled


class Hub(BaseHTTPRequestHandler):
    """A hub that keeps every client waiting until `released` is set, and then has no such model."""

    released: threading.Event

    def do_GET(self) -> None:
        self.released.wait(START_S)
        self.send_error(404)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *given) -> None:
        pass


@contextmanager
def loading(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, int, threading.Event]]:
    """Start a server whose model takes forever to load. Yields the process, its port, and an event that makes loading fail."""
    hub = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"released": threading.Event()}))
    released = hub.RequestHandlerClass.released
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, environment = command("--port", str(port), "-m", "some/model", *options)
    environment |= {"TMPDIR": str(folder), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder)}
    with (folder / "server.log").open("w") as out:
        server = subprocess.Popen(line, stdout=out, stderr=out, env=environment, cwd=folder)
    try:
        end = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < end
                time.sleep(0.02)
        yield server, port, released
    finally:
        released.set()
        server.kill()
        server.wait()
        hub.shutdown()
        hub.server_close()


def test_while_the_model_loads(tmp_path):
    """/health and the page are answered, other requests wait, and a model that cannot be loaded ends the process as ever."""
    httpx = pytest.importorskip("httpx", reason=REASON)
    log = tmp_path / "server.log"
    with loading(tmp_path, "--api-key", "secret") as (server, port, released):
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            for _ in range(2):
                health = client.get("/health")
                assert (health.status_code, health.text) == (503, '{"status":"loading"}')
                assert int(health.headers["retry-after"]) > 0
            page = client.get("/")
            assert page.status_code == 503 and "loading" in page.text and page.headers["refresh"]
        with socket.create_connection(("127.0.0.1", port)) as raw:
            raw.sendall(b"GET /v1/models HTTP/1.1\r\n\r\n")
            raw.settimeout(0.5)
            with pytest.raises(TimeoutError):
                raw.recv(1)
            taken = run("--port", str(port))
            assert taken.returncode == 2 and "cannot listen" in taken.stderr
            assert f"lsof -i :{port}" in taken.stderr and f"use --port {port + 1}" in taken.stderr
            released.set()
            assert server.wait(START_S) == 4
            with suppress(ConnectionError):
                assert raw.recv(1) == b""
        lines = [line for line in log.read_text().splitlines() if not line.startswith(PROGRESS)]
        assert len(lines) == 2 and "some/model" in lines[0], lines
    assert not list(tmp_path.glob("evoprune-*"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_signals_end_it_while_the_model_loads(tmp_path, number, code):
    with loading(tmp_path) as (server, port, _):
        with socket.create_connection(("127.0.0.1", port)):  # a client that has not sent its request
            began = time.monotonic()
            server.send_signal(number)
            assert server.wait(30) == code and time.monotonic() - began < 3
        lines = (tmp_path / "server.log").read_text().splitlines()
        assert [line for line in lines if not line.startswith(PROGRESS)] in ([], ["Stopped."])
    assert not list(tmp_path.glob("evoprune-*"))


@pytest.mark.parametrize("closed", [0, 1])
def test_a_signal_may_come_before_the_thread_that_accepts_has_begun(closed):
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.socket() as wake:
        (listening, wake)[closed].close()
        waiting: list[socket.socket] = []
        _accept(listening, wake, waiting)  # returns
        assert waiting == []


def test_requests_from_before_it_is_ready_are_answered(tmp_path):
    """Health checks get 503 and then 200; a question, and a client that has not sent anything yet, wait for their answer."""
    httpx = pytest.importorskip("httpx", reason=REASON)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, environment = command("--port", str(port), "--api-key", "secret")
    key = {"Authorization": "Bearer secret"}
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as server:
        try:
            states = []
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_S) as client:
                end = time.monotonic() + START_S
                while not states and time.monotonic() < end:
                    with suppress(httpx.ConnectError):  # it does not listen yet
                        states.append(client.get("/health").status_code)
                with socket.create_connection(("127.0.0.1", port), START_S) as silent, ThreadPoolExecutor(2) as pool:
                    asked = pool.submit(
                        httpx.post, f"http://127.0.0.1:{port}{CHAT}", json=body(), headers=key, timeout=START_S
                    )
                    refused = pool.submit(httpx.get, f"http://127.0.0.1:{port}/v1/models", timeout=START_S)
                    while 200 not in states and time.monotonic() < end:
                        states.append(client.get("/health").status_code)
                    assert states[0] == 503 and states.index(200) == len(states) - 1 and set(states) == {503, 200}
                    assert asked.result().json()["choices"][0]["message"]["content"] == "green"
                    assert refused.result().status_code == 401
                    silent.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    assert silent.recv(100).startswith(b"HTTP/1.1 200")
            assert "served at" in next(line for line in server.stderr if not line.startswith(PROGRESS))
        finally:
            server.terminate()
        assert "Traceback" not in server.stderr.read()


@pytest.mark.full
def test_quiet_prints_no_address_of_a_known_port(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, environment = command("--port", str(port), "-q")
    with subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as server:
        try:
            wait_for_health(port)
        finally:
            server.terminate()
        assert server.stderr.read() == ""
    with serving(tmp_path, "-q") as (_, port):  # a port that the system picks is printed
        assert port


def test_what_would_be_unsafe_or_cannot_be_is_refused(port, tmp_path):
    (tmp_path / "key").write_text("two words")
    for options, says in (
        (("--host", "0.0.0.0"), "there is no key"),
        (("--port", str(port)), "cannot listen"),
        (("--api-key-file", str(tmp_path / "none")), "no such file"),
        (("--api-key-file", str(tmp_path / "key")), "not one word"),
        (("--api-key", "a", "--api-key-file", str(tmp_path / "key")), "cannot be combined"),
        (("--allow-dir", str(tmp_path / "none")), "is not a folder"),
        (("--cors", "*"), "no origin"),
        (("--cors", "https://example.org/path"), "no origin"),
        (("--timeout", "0"), "above 0"),
        (("--allow-urls", "--offline"), "cannot be combined"),
    ):
        done = run(*options)
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 2 or says == "cannot listen"


def test_a_key_from_the_environment_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_API_KEY", "secret")
    with serving(tmp_path, "--host", "0.0.0.0") as (_, port):
        for key, status in (("other", 401), ("secret", 200)):
            connection = HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
            assert connection.getresponse().status == status
            connection.close()


# The package `openai`.


@pytest.fixture
def client(port):
    openai = pytest.importorskip("openai", reason=REASON)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(question: str = COLOUR, name: str = "square.mp4") -> dict:
    return {"model": "demo", "messages": [message(question, video(url_of(name)))]}


def test_openai_chats_streams_and_remembers(client, qa):
    chat = qa.encode(SAMPLES / "square.mp4").chat()
    messages = asked()["messages"]
    for question in (COLOUR, "What happens to the square?"):
        if len(messages) > 1:
            messages.append({"role": "user", "content": question})
        reply = client.chat.completions.create(model="demo", messages=messages)
        assert reply.choices[0].message.content == chat.ask(question).text
        messages.append(reply.choices[0].message)
    assert reply.usage.evoprune["encoding_kept"]
    stream = client.chat.completions.create(**asked(), stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "green"
    assert last.usage.total_tokens and not last.choices


def test_openai_has_answers_that_follow_a_schema(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Found(BaseModel):
        moving: bool

    reply = client.chat.completions.parse(**asked(), response_format=Found, max_tokens=40)
    assert isinstance(reply.choices[0].message.parsed, Found)
    messages = [*asked()["messages"], reply.choices[0].message, {"role": "user", "content": COLOUR}]
    assert client.chat.completions.create(model="demo", messages=messages).choices[0].message.content


def test_the_python_of_the_page(port, tmp_path):
    pytest.importorskip("openai", reason=REASON)
    shutil.copy(SAMPLES / "square.mp4", tmp_path / "clip.mp4")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "server.md").read_text("utf-8"), re.S | re.M)
    assert len(blocks) == 2
    text = "\n".join(blocks).replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[::2] == ["green", "green"]


def test_openai_uploads_files(client):
    import openai

    with open(SAMPLES / "square.mp4", "rb") as file:
        made = client.files.create(file=file, purpose="user_data")
    part = {"type": "file", "file": {"file_id": made.id}}
    reply = client.chat.completions.create(
        model="demo", messages=[message(COLOUR, part)], extra_body={"budget": 0.5, "frames": 8}
    )
    assert reply.choices[0].message.content == "green" and reply.usage.evoprune["frames"] == [8]
    assert client.files.retrieve(made.id).bytes == made.bytes
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_openai_knows_the_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(**asked() | {"model": "gpt-9"})
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked(), frequency_penalty=1)
    assert (caught.value.param, caught.value.code) == ("frequency_penalty", "unsupported_value")
    assert [model.id for model in client.models.list()] == ["demo"]


def shown_in(question: str, name: str = "square.mp4") -> dict:
    """Return a message in the form of /v1/responses."""
    parts = [{"type": "input_video", "video_url": url_of(name)}, {"type": "input_text", "text": question}]
    return {"role": "user", "content": parts}


def test_openai_has_responses_and_remembers(client, qa):
    chat = qa.encode(SAMPLES / "square.mp4").chat("Be brief.")
    asked = [shown_in(COLOUR)]
    for question in (COLOUR, "What happens to the square?"):
        if len(asked) > 1:
            asked.append({"role": "user", "content": question})
        reply = client.responses.create(model="demo", input=asked, instructions="Be brief.", store=False)
        assert reply.output_text == chat.ask(question).text
        asked += reply.output
    assert reply.usage.evoprune["encoding_kept"] and reply.status == "completed"


def test_openai_streams_responses(client):
    with client.responses.stream(model="demo", input=[shown_in(COLOUR)]) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "green" and final.usage.total_tokens


def test_openai_has_responses_that_follow_a_schema(client):
    pytest.importorskip("llguidance")
    from pydantic import BaseModel

    class Found(BaseModel):
        moving: bool

    reply = client.responses.parse(model="demo", input=[shown_in(COLOUR)], text_format=Found, max_output_tokens=40)
    assert isinstance(reply.output_parsed, Found)


@pytest.mark.skipif(find_spec("llm") is None, reason="llm is not installed")
def test_llm_asks_about_a_picture(port, tmp_path):
    """Uses llm's OpenAI-compatible models. Its attachments are images."""
    pictures = tmp_path / "picture.png"
    from PIL import Image

    Image.new("RGB", (112, 112), (0, 160, 0)).save(pictures)
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: demo\n  model_name: demo\n  api_base: http://127.0.0.1:{port}/v1\n  vision: true\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    for more in ([], ["--no-stream"]):
        line = [sys.executable, "-m", "llm", "-m", "demo", "-a", str(pictures), COLOUR, *more]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr


# Open WebUI 0.12.4, as in its source: `send_get_request` and `generate_chat_completion` in open_webui/routers/openai.py, after
# `chat_completion` in open_webui/main.py has removed its own fields (metadata, features, files, session, ids, `params`), with the
# headers of open_webui/utils/headers.py. Images in a message are `image_url` parts with data URLs
# (`convert_url_images_to_base64` in open_webui/utils/middleware.py).
USER = {"Name": "Ann%20B", "Id": "a1", "Email": "ann@example.org", "Role": "admin"}
OPEN_WEBUI = {
    "Content-Type": "application/json",
    "Authorization": "Bearer none",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate, br, zstd",
    "User-Agent": "Python/3.11 aiohttp/3.13.2",
    **{f"X-OpenWebUI-User-{name}": value for name, value in USER.items()},
    "X-OpenWebUI-Chat-Id": "c1",
}


def open_webui(port: int, method: str, path: str, given: dict | None = None) -> tuple[int, str, str]:
    """Return the status, the content type and the text of the response to Open WebUI."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request(method, path, given and json.dumps(given), OPEN_WEBUI)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers["Content-Type"], text


def picture(name: str) -> dict:
    """Return a sample in the form that Open WebUI sends: an `image_url` part, whatever its content is."""
    data = base64.b64encode((SAMPLES / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:video/webm;base64,{data}"}}


def test_open_webui_finds_the_model(port):
    """This happens when a connection is verified and when models are listed, by `id` if there is no `name`."""
    status, _, text = open_webui(port, "GET", "/v1/models")
    (model,) = json.loads(text)["data"]
    assert status == 200 and model["id"] == "demo" and model.get("name", "demo")


def test_open_webui_chats(port, qa):
    """Two streamed turns, with its parameters, and with `stream_options` if the model has the capability "usage"."""
    chat = qa.encode(SAMPLES / "vanish.webm").chat("You are helpful.")
    question = {"type": "text", "text": "What happens to the circle?"}
    messages = [
        {"role": "system", "content": "You are helpful."},
        {"role": "user", "content": [question, picture("vanish.webm")]},
    ]
    params = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 40, "seed": 1, "stop": ["\n\n"], "frequency_penalty": 0.0}
    for more in ({}, params | {"stream_options": {"include_usage": True}}):
        status, kind, text = open_webui(
            port, "POST", CHAT, {"stream": True, "model": "demo", "messages": messages} | more
        )
        assert status == 200 and kind.startswith("text/event-stream") and text.endswith("data: [DONE]\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
        assert bool(events[-1].get("usage")) is bool(more)
        said = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
        assert said == chat.ask(messages[-1]["content"] if len(messages) > 2 else question["text"]).text
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Which colour is it?"}]


def test_open_webui_is_told_what_is_not_supported(port):
    """Its tasks, such as titles, have no video. It offers tools by default; a setting of the model turns that off."""
    task = {"model": "demo", "messages": [{"role": "user", "content": "### Task: Generate a title"}], "stream": False}
    tool = {"type": "function", "function": {"name": "search_web", "parameters": {"type": "object", "properties": {}}}}
    asked = {"stream": True, "model": "demo", "messages": [message("What happens?", picture("vanish.webm"))]}
    for given, says in ((task, "no video or image"), (asked | {"tools": [tool]}, "tools")):
        status, kind, text = open_webui(port, "POST", CHAT, given)
        assert status == 400 and kind == "application/json" and says in json.loads(text)["error"]["message"]


def test_models_that_do_not_fit_together_are_refused_before_one_is_loaded(monkeypatch):
    from evoprune.backend import Device
    from evoprune.errors import OutOfMemory
    from evoprune.session import ModelOptions, describe, weights_of
    from evoprune_serve.command import _described

    models = [ModelOptions(name) for name in ("demo", "demo-scenes")]
    needed = sum(weights_of(describe(each)).bytes for each in models)
    monkeypatch.setattr(Device, "available_memory", lambda self: needed)
    _described(models)
    monkeypatch.setattr(Device, "available_memory", lambda self: needed - 1)
    _described(models[:1])
    with pytest.raises(OutOfMemory, match="demo and demo-scenes needs about"):
        _described(models)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--also", "demo"), "2 models are called demo\n"),
        (("--also", "demo-scenes", "--name", "demo-scenes"), "2 models are called demo-scenes\n"),
        (("--also", "demo", "--name", "a", "--name", "a"), "2 models are called a\n"),
        (("--name", "a", "--name", "b"), "there are 2 names for 1 model\n"),
    ],
)
def test_models_that_cannot_be_told_apart_are_refused(options, said):
    done = run("--port", "0", *options)  # tests in other processes may listen at the usual port
    assert done.returncode == 2 and f"error: {said}" in done.stderr


def test_the_public_name_of_a_file_has_no_folder(tmp_path):
    original = Folder(save_tiny(tmp_path / "original"))
    first, second = (original.write_pair(tmp_path / name) for name in "ab")
    done = run("--port", "0", "-m", str(first), "--also", str(second))
    assert done.returncode == 2 and f"error: 2 models are called {first.name}\n" in done.stderr


def test_models_have_the_names_that_are_given(tmp_path):
    with serving(tmp_path, "--also", "demo", "--name", "a", "--name", "b") as (_, port):
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")
        assert [each["id"] for each in json.loads(connection.getresponse().read())["data"]] == ["a", "b"]
        connection.close()

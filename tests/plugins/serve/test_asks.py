"""`evoprune ask --via` and `batch --via` ask a server in this process: same output as without a server, or an error."""

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest

import evoprune
from evoprune.session import PipelineOptions
from evoprune.video import SamplingOptions, local_file
from tests.contract.running import Terminal, command, masked_record, masked_text, materials, running
from tests.plugins.serve.serving import CHAT, COLOUR, REASON, SAMPLES, body, serving

pytest.importorskip("starlette", reason=REASON)

CLIP = "samples/square.mp4"
ALLOWED = "my videos"  # the folder whose files the server may read
LATER_LOADED = r"\b(startup|load\w*|total|read|preprocess|encode\w*|plan|overlap)(=null)?\b ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = materials(tmp_path_factory.mktemp("via"))
    (made / ALLOWED).mkdir()
    shutil.copy(SAMPLES / "square.mp4", made / ALLOWED / "square 1.mp4")
    shutil.copy(made / "spoken.srt", made / ALLOWED / "square 1.srt")
    return made


@pytest.fixture(scope="module")
def server(qa, folder, tmp_path_factory):
    with serving(qa, tmp_path_factory.mktemp("server"), folders=(folder / ALLOWED,)) as running:
        yield running


def wait(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def stable_lines(text: str) -> list[str]:
    """Return what `ask` prints, except times and the lines about loading the model."""
    lines = masked_text(text).splitlines()
    return [line for line in lines if not re.match(r"(startup|memory|total|overlap|stage|\s+now N)\b|  overlap", line)]


def stable_records(text: str) -> list:
    records = [masked_record(json.loads(line)) for line in text.splitlines()]
    return json.loads(re.sub(LATER_LOADED, "", json.dumps(records)))


def leaves(value, at: str = ""):
    """Yield the path and value of each field of a JSON value that has no fields itself."""
    if isinstance(value, dict | list) and value:
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{at}.{name}")
    else:
        yield at, value


SAME = {
    "text": [CLIP, COLOUR],
    "json": [CLIP, COLOUR, "--json"],
    "from a folder of the server": [f"{ALLOWED}/square 1.mp4", COLOUR, "--json"],
    "subtitles next to the video": [f"{ALLOWED}/square 1.mp4", COLOUR, "--json", "--subtitles", "auto"],
    "subtitles": [CLIP, COLOUR, "--subtitles", "spoken.srt", "-v"],
    "missing subtitles": [CLIP, COLOUR, "--subtitles", "gone.srt"],
    "subtitles of an image": ["picture.png", COLOUR, "--subtitles", "spoken.srt"],
    "subtitles again": [CLIP, COLOUR, "--subtitles", "spoken.srt", "--json"],
    "several questions": [CLIP, COLOUR, "-Q", "What happens?", "--json"],
    "stats of several questions": [CLIP, COLOUR, "-Q", "What happens?", "-b", "0.5"],
    "several inputs": [CLIP, "picture.png", COLOUR],
    "image": ["picture.png", COLOUR, "--fps", "2"],
    "folder of frames": ["frames", COLOUR, "--frame-rate", "4", "--json"],
    "compare": [CLIP, COLOUR, "--compare"],
    "compare json": [CLIP, COLOUR, "--compare", "--json"],
    "limits": [CLIP, COLOUR, "--max-visual-tokens", "40", "--fps", "4"],
    "sampling": [CLIP, COLOUR, "--start", "1", "--end", "-1", "--frames", "4", "--seek", "exact", "--json"],
    "sampled": [CLIP, COLOUR, "-t", "2", "--top-k", "5", "--seed", "3", "-n", "3", "--json", "--logprobs", "2"],
    "choices": [CLIP, COLOUR, "--choices", "green,red"],
    "schema": [CLIP, COLOUR, "--schema", '{"type": "integer"}', "--json"],
    "method": [CLIP, COLOUR, "--method", "random", "-b", "auto", "--json"],
    "quiet": [CLIP, COLOUR, "-q"],
    "missing": ["gone.mp4", COLOUR],
    "missing json": ["gone.mp4", COLOUR, "--json"],
    "no images": ["no_frames", COLOUR],
    "empty": ["empty.mp4", COLOUR],
    "no video": ["text.mp4", COLOUR, "--json"],
    "broken": ["broken.png", COLOUR],
    "damaged": ["damaged.mp4", COLOUR],
    "invalid option": [CLIP, COLOUR, "-b", "7"],
    "invalid span": [CLIP, COLOUR, "--start", "90"],
    "too long": [CLIP, COLOUR, "-n", "99999999"],
    "no question": [CLIP],
    "think": [CLIP, COLOUR, "--think", "on"],
}


@pytest.mark.parametrize("name", SAME)
def test_the_output_is_the_same_as_without_a_server(folder, server, name):
    words = SAME[name]
    with running(folder):
        code, out, err = command("ask", *words)
        server.state.work.kept.clear()  # otherwise, times of stages would be missing
        via = command("ask", *words, "--via", server.url)
    assert via[0] == code, via
    if "--json" in words:
        assert dict(leaves(stable_records(via[1]))) == dict(leaves(stable_records(out)))
    else:
        assert via[1] == out
    assert stable_lines(via[2]) == stable_lines(err)


ASK = ["ask", CLIP, COLOUR, "--via"]


def fails(done: tuple[int, str, str], code: int, message: str, hint: str) -> None:
    """Check that a command failed with the two lines of an error."""
    assert done[0] == code, done
    first, second = done[2].splitlines()
    assert re.search(message, first) and first.startswith("error: "), first
    assert re.search(hint, second) and second.startswith("hint: "), second
    assert not done[1]


def test_a_video_on_stdin_is_sent(folder, server, monkeypatch):
    with running(folder):
        clip = (SAMPLES / "square.mp4").read_bytes()
        monkeypatch.setattr("evoprune_cli.ask.local_file", partial(local_file, stdin=BytesIO(clip)))
        done = command("ask", "-", COLOUR, "--via", server.url, "--json")
    assert done[0] == 0 and json.loads(done[1])["inputs"][0]["path"] == "-"


def test_a_question_on_stdin_is_asked(folder, server):
    with running(folder):
        assert command("ask", CLIP, "--via", server.url, stdin=COLOUR)[:2] == (0, "green\n")


def test_a_conversation_is_the_same_as_without_a_server(folder, server):
    typed = f"{COLOUR}\n/help\nWhat moves?\n/foo\nexit\n"
    words = ("ask", CLIP, "-i", "-q")
    with running(folder):
        alone = command(*words, stdin=Terminal(typed))
        via = command(*words, "--via", server.url, stdin=Terminal(typed))
    assert via == alone and alone[0] == 0 and alone[1].startswith("green\n")
    assert len(alone[1].splitlines()) == 2 and "unknown command /foo" in alone[2]


def test_the_environment_names_the_server_and_the_key(qa, folder, tmp_path, monkeypatch):
    from evoprune_serve.guard import Access

    with serving(qa, tmp_path, access=Access(key="secret")) as locked, running(folder):
        monkeypatch.setenv("EVOPRUNE_VIA", f"{locked.url}/v1/")
        fails(command(*ASK[:-1]), 2, "needs another key", "EVOPRUNE_API_KEY")
        monkeypatch.setenv("EVOPRUNE_API_KEY", "secret")
        assert command(*ASK[:-1])[:2] == (0, "green\n")
        monkeypatch.setenv("EVOPRUNE_API_KEY", "two words")
        fails(command(*ASK[:-1]), 2, "EVOPRUNE_API_KEY is not one word", "key of the server")


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://host/", "http://", "http://host:99999", "http://a b", "http://u:p@host"]
)
def test_a_wrong_address_is_refused(folder, url):
    with running(folder):
        fails(command(*ASK, url), 2, "not the address of a server", "http://127.0.0.1:8000")


@pytest.mark.parametrize("json_lines", [False, True])
def test_there_is_no_server(folder, json_lines):
    with socket.socket() as free, running(folder):
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = command(*ASK, url, *["--json"] * json_lines)
    if json_lines:
        error = json.loads(done[1])["error"]
        assert (error["code"], error["type"]) == (4, "model") and url in error["message"]
        done = (done[0], "", done[2])
    fails(done, 4, f"cannot reach the server at {url}: Connection refused", "evoprune serve starts one; without --via")


@contextmanager
def answering(respond):
    """Yield the URL of a server for which `respond` handles each request."""

    class Handler(BaseHTTPRequestHandler):
        do_GET = do_POST = respond  # noqa: N815 (names of the base class)

        def log_message(self, *given):
            pass

    other = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=other.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{other.server_address[1]}"
    finally:
        other.shutdown()
        thread.join()
        other.server_close()


def respond(status: int, facts: dict | str) -> Callable[[BaseHTTPRequestHandler], None]:
    def handle(self) -> None:
        data = (facts if isinstance(facts, str) else json.dumps(facts)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    return handle


@pytest.mark.parametrize(
    ("status", "facts", "says"),
    [
        (200, {"evoprune": "9.9.9", "models": ["demo"]}, "is evoprune 9.9.9; this is evoprune"),
        (200, "<html>", "another version, or another program"),
        (
            404,
            {"error": {"message": "there is no /v1/evoprune", "code": "not_found"}},
            "another version, or another program",
        ),
        (404, "nothing here", "another version, or another program"),
        (301, "", "another version, or another program"),
        (503, "Service Unavailable", "too many connections"),
    ],
)
def test_a_server_of_another_version_or_another_program_is_refused(folder, status, facts, says):
    with answering(respond(status, facts)) as url, running(folder):
        fails(command(*ASK, url), 4, says, "version|later")


def test_a_client_of_another_version_is_refused(server):
    asked = {"evoprune": "9.9.9", "question": COLOUR, "inputs": []}
    reply = server.client.post("/v1/evoprune/ask", json=asked)
    assert reply.status_code == 409 and reply.json()["error"]["code"] == "other_version"


def test_a_server_that_is_loading_is_waited_for(folder, server):
    asked = []

    def handle(self) -> None:
        asked.append(self.path)
        if len(asked) < 3:
            return respond(503, {"status": "loading"})(self)
        reply = server.client.request(
            self.command,
            self.path,
            content=self.rfile.read(int(self.headers.get("content-length", 0))),
            headers=dict(self.headers),
        )
        return respond(reply.status_code, reply.text)(self)

    with answering(handle) as url, running(folder):
        assert command("ask", f"{ALLOWED}/square 1.mp4", COLOUR, "--via", url)[:2] == (0, "green\n")
    assert asked[:3] == ["/v1/evoprune"] * 3


def test_a_busy_server(qa, folder, tmp_path, slow):
    with serving(qa, tmp_path, most=1) as busy, running(folder):
        replies = []
        asking = [
            threading.Thread(target=lambda: replies.append(busy.client.post(CHAT, json=body()))) for _ in range(2)
        ]
        asking[0].start()
        assert slow.begun.wait(60)
        asking[1].start()
        wait(lambda: busy.state.work.waiting == 1)
        done = command(*ASK, busy.url)
        slow.set()
        for thread in asking:
            thread.join()
    fails(done, 4, "is busy: too many requests are waiting", r"room in \d+ s")
    assert [reply.status_code for reply in replies] == [200, 200]


def test_an_answer_streams_and_ends_with_its_client(qa, folder, tmp_path, slow):
    with serving(qa, tmp_path) as server:
        with server.client.stream("GET", "/v1/evoprune/visit") as visit:
            lines = visit.iter_lines()  # the response is closed when nothing refers to this
            sent = {"name": "square.mp4", "digest": send(server, json.loads(next(lines))["visit"])}
            inputs = [{"name": "square.mp4", "files": [sent]}]
            asked = {"evoprune": evoprune.__version__, "question": COLOUR, "inputs": inputs}
            with server.client.stream("POST", "/v1/evoprune/ask", json=asked) as response:
                events = map(json.loads, response.iter_lines())
                assert "text" in (event["event"] for event in events)
                assert server.state.work.busy
        wait(lambda: not server.state.work.busy)
        wait(lambda: server.lines[-1].split()[3] == "499")
        wait(lambda: not [*tmp_path.iterdir()])


def test_a_server_that_ends_while_it_answers(qa, folder, tmp_path, slow):
    with serving(qa, tmp_path) as server, running(folder):
        ending = threading.Thread(target=lambda: slow.begun.wait(60) and server.process.handle_exit(2, None))
        ending.start()
        done = command(*ASK, server.url)
        ending.join()
    assert done[:2] == (4, "green\n") and "shutting down" in done[2], done


def send(server, visit: str) -> str:
    """Send a sample to the server. Returns its digest."""
    content = (SAMPLES / "square.mp4").read_bytes()
    return server.client.post(f"/v1/evoprune/files?visit={visit}", content=content).json()["digest"]


def test_a_file_is_only_taken_from_a_client_that_stays(server):
    reply = server.client.post("/v1/evoprune/files?visit=unknown", content=b"data")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "visit"


REFUSED = {
    "revision": ["--revision", "main"],
    "device": ["--device", "cpu"],
    "dtype": ["--dtype", "fp32"],
    "quantize": ["--quantize", "none"],
    "store": ["--no-store"],
    "load format": ["--load-format", "auto"],
    "engine": ["--engine", "native"],
    "offline": ["--offline"],
    "threads": ["--threads", "1"],
    "cache": ["--cache"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_the_server_chose_is_refused(folder, server, name):
    with running(folder):
        fails(
            command(*ASK, server.url, *REFUSED[name]),
            2,
            f"^error: {REFUSED[name][0]}: an option that the server",
            "leave out",
        )


def test_the_model_is_one_of_the_server(folder, server, monkeypatch):
    with running(folder):
        assert command(*ASK, server.url, "-m", "demo")[0] == 0
        fails(
            command(*ASK, server.url, "-m", "demo-scenes"),
            2,
            "serves demo, not demo-scenes",
            "leave out -m, or name demo",
        )
        monkeypatch.setenv("EVOPRUNE_MODEL", "org/name")
        fails(command(*ASK, server.url), 2, "serves demo, not org/name", "EVOPRUNE_MODEL")


def test_variables_for_loading_a_model_here_are_ignored(folder, server, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_THREADS", "3")
    with running(folder):
        assert command(*ASK, server.url)[0] == 0


def test_an_upload_above_the_limit(qa, folder, tmp_path):
    from evoprune_serve.guard import Access

    with serving(qa, tmp_path, access=Access(upload_bytes=1000), folders=(folder / ALLOWED,)) as small, running(folder):
        fails(
            command(*ASK, small.url),
            3,
            "square.mp4 has .*, and the server at .* takes at most",
            "--max-upload, or with --allow-dir",
        )
        assert command("ask", f"{ALLOWED}/square 1.mp4", COLOUR, "--via", small.url)[0] == 0


def test_a_file_in_an_allowed_folder_is_not_sent(folder, server):
    server.lines.clear()
    with running(folder):
        assert command("ask", f"{ALLOWED}/square 1.mp4", COLOUR, "--via", server.url)[0] == 0
    wait(lambda: server.lines)
    assert len(server.lines) == 1 and "/v1/evoprune/ask 200" in server.lines[0]


def test_a_file_that_differs_from_the_one_of_the_server_is_sent(folder, server):
    """For example, because the server is on another machine with a folder of the same name."""
    path = folder / ALLOWED / "square 1.mp4"
    status = path.stat()
    file = {"name": "a.mp4", "path": str(path), "bytes": status.st_size, "mtime_ns": status.st_mtime_ns + 1}
    asked = {"evoprune": evoprune.__version__, "inputs": [{"name": "a.mp4", "files": [file]}]}
    reply = server.client.post("/v1/evoprune/ask", json=asked)
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "send_first"


def test_nothing_is_kept_of_what_was_sent(qa, folder, tmp_path):
    with serving(qa, tmp_path) as server, running(folder):
        assert command(*ASK, server.url, "-Q", "What happens?", "--subtitles", "spoken.srt")[0] == 0
        assert command("ask", "frames", COLOUR, "--via", server.url)[0] == 0
        wait(lambda: not [*tmp_path.iterdir()])


HARMFUL = {
    "a path as a name": {"files": [{"name": "../a.mp4", "digest": "0" * 64}]},
    "the folder above": {"files": [{"name": "..", "digest": "0" * 64}]},
    "a long name": {"files": [{"name": "a" * 300, "digest": "0" * 64}]},
    "a path as a folder": {"files": [{"name": "a.png", "digest": "0" * 64}], "folder": "/tmp"},
    "a file twice": {"files": [{"name": "a.png", "digest": "0" * 64}] * 2, "folder": "a"},
    "subtitles over the video": {
        "files": [{"name": "a", "digest": "0" * 64}],
        "beside": [{"name": "a", "digest": "0" * 64}],
    },
    "no files": {"files": []},
    "two files": {"files": [{"name": "a", "digest": "0" * 64}, {"name": "b", "digest": "0" * 64}]},
    "a path as a digest": {"files": [{"name": "a", "digest": "../a"}]},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_names_that_lead_out_of_the_folder_of_a_request_are_refused(server, name):
    asked = {"evoprune": evoprune.__version__, "inputs": [{"name": "a"} | HARMFUL[name]]}
    reply = server.client.post("/v1/evoprune/ask", json=asked)
    assert reply.status_code == 400, reply.text


@pytest.mark.parametrize(
    "options",
    [
        {"speech": "/etc"},
        {"method": "tune:recipe=/etc/passwd"},
        {"subtitles": "/etc/passwd"},
        {"model": "other"},
        {"budget": [1]},
        {"max_frames": "many"},
        {"schema": 3},
        {"fps": 1, "frames": 2},
        {"unknown": 1},
    ],
)
def test_a_client_cannot_make_the_server_read_its_files_or_set_other_options(server, options):
    asked = {"evoprune": evoprune.__version__, "options": options, "inputs": [{"name": "a", "files": [{"name": "a"}]}]}
    reply = server.client.post("/v1/evoprune/ask", json=asked)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["record"]["type"] == "usage"


def test_limits_of_the_server_hold(qa, folder, tmp_path):
    usual = PipelineOptions(sampling=SamplingOptions(max_frames=4))
    with serving(qa, tmp_path, usual=usual) as server, running(folder):
        fails(
            command(*ASK, server.url, "--max-frames", "8"),
            2,
            "max.frames is 8, but the server allows at most 4",
            "smaller",
        )
        done = command(*ASK, server.url, "--json", "--max-frames", "2")
        assert json.loads(done[1])["sampling"]["frames"] == 2
        assert json.loads(command(*ASK, server.url, "--json")[1])["sampling"]["frames"] == 4


BATCHES = {
    "rows": ["--from", "rows.jsonl"],
    "rows with paths to a table": ["--from", "rows.csv"],
    "pairs": ["samples/square.mp4", "samples/three.mp4", "frames", "-Q", COLOUR, "-Q", "What happens?", "-b", "0.5"],
    "options of rows": ["--from", "rows.jsonl", "--fps", "2", "-n", "3", "--subtitles", "auto"],
    "choices": ["samples/square.mp4", "-Q", COLOUR, "--choices", "green,red"],
    "no file": ["gone.mp4", "-Q", COLOUR],
    "no question": ["samples/square.mp4"],
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_has_the_same_records_as_without_a_server(folder, server, name):
    with running(folder):
        code, _, err = command("batch", *BATCHES[name], "-m", "demo", "-o", "out/here.jsonl")
        via = command("batch", *BATCHES[name], "--via", server.url, "-o", "out/via.jsonl")
        assert via[0] == code, via
        if code in (0, 6):
            here, there = (
                stable_records((folder / "out" / file).read_text("utf-8")) for file in ("here.jsonl", "via.jsonl")
            )
            assert dict(leaves(there)) == dict(leaves(here))
        again = command("batch", *BATCHES[name], "--via", server.url, "-o", "out/here.jsonl", "--resume")
        assert again[0] == code
    said = [[line for line in masked_text(text).splitlines() if "rows/s" not in line] for text in (err, via[2])]
    assert said[1] == said[0]


def test_a_batch_ends_if_its_server_does(qa, folder, tmp_path, slow):
    with serving(qa, tmp_path) as server, running(folder):
        ending = threading.Thread(target=lambda: slow.begun.wait(60) and server.process.handle_exit(2, None))
        ending.start()
        done = command("batch", *BATCHES["pairs"], "--via", server.url, "-o", "out/a.jsonl")
        ending.join()
        assert not (folder / "out" / "a.jsonl").exists() or not (folder / "out" / "a.jsonl").read_text()
    assert done[0] == 4 and "shutting down" in done[2], done


def test_a_batch_waits_for_a_busy_server(qa, folder, tmp_path, slow):
    with serving(qa, tmp_path, most=1) as busy, running(folder):
        asking = [threading.Thread(target=lambda: busy.client.post(CHAT, json=body())) for _ in range(2)]
        asking[0].start()
        assert slow.begun.wait(60)
        asking[1].start()
        wait(lambda: busy.state.work.waiting == 1)
        threading.Thread(target=lambda: wait(lambda: " 429 " in "".join(busy.lines)) or slow.set()).start()
        done = command("batch", *BATCHES["choices"], "--via", busy.url, "-o", "-")
        for thread in asking:
            thread.join()
    assert done[0] == 0 and json.loads(done[1])["answer"] == "green"


@pytest.mark.parametrize("options", [["--on", "ray"], ["--cache"], ["--dtype", "bf16"]])
def test_an_option_of_a_batch_that_the_server_chose_is_refused(folder, server, options):
    with running(folder):
        done = command("batch", *BATCHES["choices"], "--via", server.url, "-o", "-", *options)
    fails(done, 2, f"^error: {options[0]}: an option that the server", "leave out")

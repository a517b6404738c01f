"""Models from the hub, played by a server on this machine: downloaded once, refused early, cached, offline."""

import hashlib
import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch

from evoprune.session.loading import find
from tests.loading import edit, error_of, load_model, no_network
from tests.tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs, serving one folder as org/tiny."""

    protocol_version = "HTTP/1.1"
    folder = None
    requests = ()

    def do_GET(self):
        self.requests.append(self.path)
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        parts = self.path.split("?")[0].split("/")
        if "org/tiny" not in self.path:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer_json([{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in files.items()])
        elif "/api/models/" in self.path:
            self.answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": []})
        elif parts[4] not in ("main", COMMIT):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif parts[-1] not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            body = files[parts[-1]]
            self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def move_hub(monkeypatch, port):
    """Points the hub's client at a port of this machine."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache" / "models--org--tiny"


@pytest.fixture
def hub(folder, cache, monkeypatch):
    handler = type("Handler", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    move_hub(monkeypatch, server.server_port)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def dead_hub(cache, monkeypatch):
    move_hub(monkeypatch, 1)


def fill_cache(cache, saved):
    shutil.copytree(saved, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)


def test_a_hub_model_is_downloaded_once(hub, monkeypatch):
    loaded = load_model("org/tiny", dtype="fp32")
    assert (loaded.id, loaded.revision) == ("org/tiny", COMMIT)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    hub.requests.clear()
    assert load_model("org/tiny", revision=COMMIT).revision == COMMIT
    assert not any("safetensors" in path for path in hub.requests)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert load_model("org/tiny", offline=True).revision == COMMIT


def test_weights_of_an_unsupported_model_are_not_downloaded(hub):
    edit(hub.folder / "config.json", model_type="llava")
    assert "of type 'llava'" in error_of("org/tiny")
    assert not any("safetensors" in path for path in hub.requests)


def test_a_hub_model_without_config(hub):
    (hub.folder / "config.json").unlink()
    assert "no config.json on the hub" in error_of("org/tiny")


def test_an_unknown_hub_model(hub):
    assert "no such model on the hub" in error_of("org/other")


def test_an_unknown_revision(hub):
    assert "no revision 'v9'" in error_of("org/tiny", revision="v9")


def test_an_unreachable_hub_fails_at_once(dead_hub):
    began = time.monotonic()
    assert "the hub cannot be reached" in error_of("org/tiny")
    assert time.monotonic() - began < 3


def test_the_hubs_own_offline_switch_is_respected(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert "offline mode" in error_of("org/tiny")


def test_a_silent_hub_fails_soon(cache, monkeypatch):
    monkeypatch.setattr(find, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        move_hub(monkeypatch, silent.getsockname()[1])
        began = time.monotonic()
        assert "the hub cannot be reached" in error_of("org/tiny")
        assert time.monotonic() - began < 3


def test_stuck_name_resolution_fails_soon(cache, monkeypatch):
    monkeypatch.setattr(find, "HUB_SECONDS", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    began = time.monotonic()
    assert "no answer within 0.3 s" in error_of("org/tiny")
    assert time.monotonic() - began < 1.5


def test_without_the_hub_the_cache_serves(dead_hub, cache, saved):
    fill_cache(cache, saved)
    assert load_model("org/tiny").revision == COMMIT


def test_offline_uses_the_cache_and_no_network(cache, saved, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert "(offline)" in error_of("org/tiny", offline=True)
    fill_cache(cache, saved)
    loaded = load_model("org/tiny", offline=True)
    assert loaded.revision == COMMIT
    assert loaded.tokenizer is not None


def test_an_incomplete_cache_is_an_error(dead_hub, cache, saved):
    fill_cache(cache, saved)
    (cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert "no safetensors weights" in error_of("org/tiny")


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("openai/whisper-base", False),
        ("Qwen/Qwen3-VL-2B-Instruct", True),
        ("Qwen/Qwen3.5-4B", False),
        ("Qwen/Qwen2.5-7B-Instruct", False),
        ("Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("org/qwen2-vl-tuned", True),
        ("org/my_qwen25vl", True),
    ],
)
def test_the_hint_says_which_models_run_where_a_name_does_not_look_like_one(name, runs):
    assert find.kind_hint(name).startswith("evoprune runs Qwen3-VL, Qwen2.5-VL and") is not runs

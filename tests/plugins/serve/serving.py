"""A server in this process, at a free local port, and requests to it."""

import base64
import io
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from evoprune.errors import OutOfMemory
from evoprune.session import OpenInputs
from evoprune.video_qa import VideoQA

SAMPLES = Path(__file__).parents[3] / "samples"
COLOUR = "What colour is the square?"
CHAT = "/v1/chat/completions"
REASON = "starlette and others are not installed: python -m experiments.environments serve"


def memory_fails(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Make the next `times` encodings fail with OutOfMemory."""
    encode = OpenInputs.encode
    failures = iter([True] * times)

    def short(self, *given, **options):
        if next(failures, False):
            raise OutOfMemory("no memory", "use less", stage="encode")
        return encode(self, *given, **options)

    monkeypatch.setattr(OpenInputs, "encode", short)


def url_of(name: str) -> str:
    """Return a sample as the data URL that a client sends."""
    return "data:video/mp4;base64," + base64.b64encode((SAMPLES / name).read_bytes()).decode()


def picture(size: int = 0) -> bytes:
    """Return a PNG image that is padded to `size` bytes."""
    file = io.BytesIO()
    Image.new("RGB", (56, 56)).save(file, "PNG")
    return file.getvalue().ljust(size, b"\0")


def message(question: str, *shown: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*shown, {"type": "text", "text": question}]}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def body(question: str = COLOUR, name: str = "square.mp4", **options: Any) -> dict[str, Any]:
    """Return the request body of a question about a sample."""
    return {"model": "demo", "messages": [message(question, video(url_of(name)))]} | options


@contextmanager
def serving(
    qa: VideoQA, folder: Path, others: Mapping[str, VideoQA] | None = None, **settings: Any
) -> Iterator[SimpleNamespace]:
    """Serve a model called demo, and others. Yields `url`, an httpx `client`, `state`, log `lines` and `process`."""
    import httpx
    import uvicorn

    from evoprune_serve.app import Settings, make_app
    from evoprune_serve.connections import Connection
    from evoprune_serve.ending import CLOSING_S, EndingServer

    lines: list[str] = []
    app = make_app({"demo": qa} | (others or {}), Settings(folder=folder, log=lines.append, **settings))
    config = uvicorn.Config(
        app, port=0, http=Connection, ws="none", log_config=None, timeout_graceful_shutdown=CLOSING_S
    )
    server = EndingServer(config, app.state.server.work, activity=app.state.activity)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            assert thread.is_alive()
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=120) as client:
            state = app.state.server
            yield SimpleNamespace(url=url, client=client, state=state, lines=lines, process=server)
    finally:
        server.should_exit = True
        thread.join()

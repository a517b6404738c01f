"""A server in its own process, on the loopback interface, and requests to it by the OpenAI client."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.plugins.vllm.serving import DEMO, NEW

NAME = "demo"
START_S = 300
OURS = '{"architectures": ["EvoPruneQwen2_5_VLForConditionalGeneration"]}'
# Without this, vLLM takes 32 frames of any video if it knows no rule for the model.
RATE = {"video": {"num_frames": -1, "fps": 2}}
FIXED = [
    *("--dtype", "float32", "--enforce-eager", "--block-size", "32"),
    *("--max-model-len", "4096", "--max-num-seqs", "8", "--host", "127.0.0.1"),
]
NAMED = [
    "--model",
    str(DEMO),
    "--served-model-name",
    NAME,
    "--hf-overrides",
    OURS,
    "--media-io-kwargs",
    json.dumps(RATE),
]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """Yield the URL of a server with these options. Its output is in `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *NAMED,
        *FIXED,
        "--port",
        str(port),
        *options,
    ]
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, cwd=folder)
    try:
        wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
        assert server.poll() is None, log.read_text()[-4000:]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait(server: subprocess.Popen, health: str, log: Path) -> None:
    """Wait until the server answers."""
    end = time.monotonic() + START_S
    while True:
        try:
            return urlopen(health, timeout=5).close()
        except (URLError, OSError):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            time.sleep(1)


def data_url(content: bytes) -> str:
    """Return a video as the client sends it."""
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"


def message(url: str, question: str) -> list[dict]:
    """Return the messages of a question about a video."""
    video, text = {"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": question}
    return [{"role": "user", "content": [video, text]}]


def request(url: str, question: str, **options) -> dict:
    """Return the arguments of `chat.completions.create`. `options` go to the processor."""
    made = {"model": NAME, "messages": message(url, question), "max_tokens": NEW, "temperature": 0}
    return made | ({"extra_body": {"mm_processor_kwargs": options}} if options else {})

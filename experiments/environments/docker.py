"""Build and try the image of the Dockerfile; where no Docker answers, do its steps in an empty folder, as another user.

    python -m experiments.environments.docker
    python -m experiments.environments.docker --index ''  # PyTorch from pip's usual index

The server is installed, started, asked by curl, called healthy by the image's own check, and ended. Without Docker the user is
`nobody` where root runs this, else the same. The folder is removed in the end.
"""

import argparse
import base64
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.environments.recipes import ROOT

IMAGE = "evoprune-trial"
PORT = 8000  # inside the container, and in its check
INSTALL = "plugins/serve/install.sh"
CPU = "https://download.pytorch.org/whl/cpu"
USER = "nobody"
START_S = 180
QUESTION = "What colour is the square?"
ANSWER = "green"


def instruction(name: str) -> list[str]:
    """Return the command of the Dockerfile's HEALTHCHECK or ENTRYPOINT."""
    (found,) = re.findall(rf"^{name} .*?(\[.*\])$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    return json.loads(found)


def sent() -> list[Path]:
    """Return the files and folders that the image is built from, relative to the checkout."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    named = [Path(line[1:]) for line in lines if line.startswith("!")]
    return [path for path in named if not any(path in other.parents for other in named)]


def has_docker() -> bool:
    """Return whether a Docker daemon answers."""
    return shutil.which("docker") is not None and run(["docker", "info"], check=False, quiet=True) == 0


def run(command: list[str], check: bool = True, quiet: bool = False, **how) -> int:
    """Runs a command and returns its exit status. Raises subprocess.CalledProcessError: it failed, and `check` is true."""
    if not quiet:
        print("$", *command, flush=True)
    out = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, check=check, stdout=out, stderr=out, **how).returncode  # noqa: S603


class Container:
    """The server in a container, without rights, and with nothing that it may write but /tmp and its cache."""

    def __init__(self, key: str):
        bound = ["--publish", f"127.0.0.1::{PORT}", "--env", f"EVOPRUNE_API_KEY={key}"]
        rights = ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--read-only", "--tmpfs", "/tmp"]  # noqa: S108
        self._name = said(["docker", "run", "--detach", *rights, *bound, IMAGE])
        self.port = int(said(["docker", "port", self._name, str(PORT)]).rpartition(":")[2])

    def healthy(self) -> bool:
        return run(["docker", "exec", self._name, *instruction("HEALTHCHECK")], check=False, quiet=True) == 0

    def user(self) -> str:
        return said(["docker", "exec", self._name, "id", "-un"])

    def end(self) -> int:
        """Ends the server and returns its exit status."""
        run(["docker", "stop", self._name])
        status = int(said(["docker", "inspect", "--format", "{{.State.ExitCode}}", self._name]))
        run(["docker", "rm", self._name], quiet=True)
        return status


class Installed:
    """The server in a folder, run by another user."""

    def __init__(self, folder: Path, key: str):
        self.port = PORT
        self._folder = folder
        self._how = as_user(folder)
        self._how["env"] |= {"EVOPRUNE_API_KEY": key}
        self._server = subprocess.Popen(self._command("ENTRYPOINT"), **self._how)  # noqa: S603

    def _command(self, name: str) -> list[str]:
        program, *options = instruction(name)
        return [str(self._folder / "installed" / "bin" / program), *options]

    def healthy(self) -> bool:
        return run(self._command("HEALTHCHECK"), check=False, quiet=True, **self._how) == 0

    def user(self) -> str:
        return said(["ps", "-o", "user=", "-p", str(self._server.pid)])

    def end(self) -> int:
        """Ends the server and returns its exit status. Raises RuntimeError: it has left files."""
        self._server.send_signal(signal.SIGTERM)
        status = self._server.wait(60)
        left = list((self._folder / "tmp").iterdir())
        if left:
            raise RuntimeError(f"left behind: {left}")
        return status


def as_user(folder: Path) -> dict:
    """Return arguments of `subprocess` that run a command in the folder, as another user where that is possible."""
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "LANG"))}
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp")}
    how = {"cwd": folder, "env": kept | environment}
    if os.geteuid() == 0:
        how |= {"user": USER, "group": "nogroup", "extra_groups": []}
    return how


def said(command: list[str]) -> str:
    """Return what a command prints."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603


@contextmanager
def in_container(index: str, key: str) -> Iterator[Container]:
    """Provide the server in a new image."""
    run(["docker", "build", "--build-arg", f"PYTORCH={index}", "--tag", IMAGE, str(ROOT)])
    yield Container(key)


@contextmanager
def in_folder(index: str, key: str) -> Iterator[Installed]:
    """Provide the server in a new folder, from the files that an image is built from."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("home", "tmp"):
            (folder / name).mkdir()
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        for path in sent():
            place = folder / "source" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, place, ignore=ignored)
            else:
                shutil.copy(ROOT / path, place)
        if os.geteuid() == 0:
            for path in (folder, *folder.rglob("*")):
                shutil.chown(path, USER, "nogroup")
        run(["sh", str(folder / "source" / INSTALL), str(folder / "installed"), index], **as_user(folder))
        yield Installed(folder, key)


def ask(port: int, key: str) -> str:
    """Return what curl is answered about a sample."""
    clip = base64.b64encode((ROOT / "samples" / "square.mp4").read_bytes()).decode()
    shown = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{clip}"}}
    body = {"messages": [{"role": "user", "content": [shown, {"type": "text", "text": QUESTION}]}]}
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {key}"]
    command = ["curl", "-sS", "--fail-with-body", "--noproxy", "*", url, *headers, "-d", "@-"]
    done = subprocess.run(command, input=json.dumps(body), check=True, capture_output=True, text=True)  # noqa: S603
    return json.loads(done.stdout)["choices"][0]["message"]["content"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.environments.docker", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--index", default=CPU, help="where PyTorch's builds are; empty: pip's usual index")
    options = parser.parse_args(argv)
    way = in_container if has_docker() else in_folder
    key = secrets.token_urlsafe(24)
    begin = time.monotonic()
    with way(options.index, key) as server:
        print(f"installed after {time.monotonic() - begin:.0f} s, {way.__name__}")
        begin = time.monotonic()
        try:
            while not server.healthy():
                if time.monotonic() - begin > START_S:
                    raise RuntimeError("it did not become healthy")
                time.sleep(0.5)
            print(f"healthy after {time.monotonic() - begin:.1f} s, run by {server.user()}")
            answer = ask(server.port, key)
            print(f"{QUESTION} {answer}")
        finally:
            status = server.end()
        print(f"ended with {status}")
    return int(answer != ANSWER or status != 128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())

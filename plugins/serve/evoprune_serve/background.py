"""`evoprune serve --detach` and `--stop`: start and stop this user's server in the background. Does not import torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from evoprune.errors import UsageError
from evoprune_cli import Background

CHECK_S = 0.1  # interval between checks for whether the server has started or ended, in seconds
STOP_S = 15.0  # time for the server to end, in seconds
TOLD = 2000  # maximum number of characters of the log that are printed if the server doesn't start


def listen(background: Background, backlog: int) -> socket.socket:
    """Return a socket that only this user can connect to. Replaces the socket of a server that was killed.

    Raises:
        UsageError: If the path of the socket is too long, or the socket can't be made.
    """
    if sys.platform == "win32":
        raise NotImplementedError  # `Background` has raised an error
    background.socket.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listening.bind(str(background.socket))
        listening.listen(backlog)
    except OSError as problem:
        listening.close()
        hint = "set XDG_RUNTIME_DIR to a folder of your own with a short path"
        raise UsageError(f"cannot listen at {background.socket}: {problem.strerror or problem}", hint) from problem
    finally:
        os.umask(mask)
    return listening


def detach(words: Sequence[str], show: Callable[..., None]) -> int:
    """Start a server in the background, wait until it has loaded its models, and return its process ID.

    Args:
        words: The words of the command line after `serve` for the server's process.
        show: See `terminal.progress`.

    Raises:
        UsageError: If a server already runs.
        Failed: If the server ends while it starts.
    """
    background = Background()
    background.make_folder()
    if background.process():
        raise background.taken()
    line = [sys.executable, "-m", "evoprune_cli", "serve", *words]
    with open(background.log, "w", encoding="utf-8") as log:
        how = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
        server = subprocess.Popen(line, **how)  # this program itself  # noqa: S603
    try:
        while background.process() != (server.pid, True):
            show("waiting: the server is loading its model")
            if server.poll() is not None:
                raise Failed(background.log.read_text("utf-8", "replace")[-TOLD:], server.returncode)
            time.sleep(CHECK_S)
    except BaseException:
        server.terminate()
        server.wait()
        raise
    return server.pid


class Failed(Exception):
    """Raised if the server in the background ends while it starts. Its log says why."""

    def __init__(self, log: str, code: int):
        super().__init__(log)
        self.log = log
        self.code = code


def stop() -> int | None:
    """End the server in the background, and return its process ID, or None if there isn't one."""
    background = Background()
    if sys.platform == "win32":
        raise NotImplementedError  # `Background` has raised an error
    found = background.process()
    if found is None:
        return None
    number, _ = found
    end = time.monotonic() + STOP_S
    sent = 0
    while (found := background.process()) and found[0] in (0, number):
        number = found[0]
        if number and not sent:
            sent = signal.SIGTERM
            os.kill(number, sent)
        elif number and time.monotonic() > end:
            os.kill(number, signal.SIGKILL)
        time.sleep(CHECK_S)
    background.found()  # removes the socket of a server that had to be killed
    return number

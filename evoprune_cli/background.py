"""The server of `evoprune serve --detach`. Each user has at most one, on a Unix socket that only this user can open."""

import http.client
import os
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from evoprune.errors import UsageError

if TYPE_CHECKING:
    pass


HOLD_S = 2.0  # time for which a new server tries to lock its file, in seconds


def _user() -> int:
    if sys.platform == "win32":
        return 0  # the owner of every file, according to `os.stat`
    return os.getuid()


class Background:
    """The files of the server in the background. Each user has at most one such server.

    They are in a folder that only this user can open. While the server runs, it holds a lock on a file that contains its process
    ID, followed by "ready" once its models are loaded.

    Attributes:
        socket, log: Paths of the socket that the server listens on, and of its log.
    """

    def __init__(self):
        if sys.platform == "win32":
            raise UsageError("a server in the background needs Unix sockets, which this system lacks", "use a URL")
        parent = os.environ.get("XDG_RUNTIME_DIR")
        name = f"evoprune.{_user()}"
        self._folder = Path(parent) / "evoprune" if parent else Path(tempfile.gettempdir()) / name
        self.socket = self._folder / "serve.sock"
        self.log = self._folder / "serve.log"
        self._lock = self._folder / "serve.lock"

    def check(self) -> None:
        """Raise UsageError if another user made the files, or can open them."""
        folder = self._folder.lstat()
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != _user():
            hint = "remove it, or set XDG_RUNTIME_DIR to a folder of your own"
            raise UsageError(f"{self._folder} is not a folder of this user", hint)
        if folder.st_mode & 0o077:
            raise UsageError(f"other users can open {self._folder}", f"chmod 700 {self._folder}")
        for path, kind in ((self.socket, stat.S_ISSOCK), (self._lock, stat.S_ISREG), (self.log, stat.S_ISREG)):
            with suppress(FileNotFoundError):
                status = path.lstat()
                if status.st_uid != _user() or not kind(status.st_mode):
                    raise UsageError(f"{path} was not made by a server of this user", "remove it")

    def make_folder(self) -> None:
        """Create the folder if it doesn't exist. See also `check`."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as problem:
            hint = "set XDG_RUNTIME_DIR to a folder of your own"
            raise UsageError(f"cannot create {self._folder}: {problem.strerror}", hint) from problem
        self.check()

    def process(self) -> tuple[int, bool] | None:
        """Return the process ID of the server (0 if it has just started), and whether it is ready. None if there is no server.

        Raises:
            UsageError: See `check`.
        """
        if not os.path.lexists(self._lock):
            return None
        self.check()
        with self._lock.open(encoding="ascii") as file:
            if _locks(file, shared=True):
                return None
            number, _, state = file.read().partition(" ")
        return int(number or 0), state == "ready"

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Context manager for the server. Yields a function to call when it is ready.

        Raises:
            UsageError: If there is another server.
        """
        self.make_folder()
        with self._locked() as file:
            try:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield lambda: print(" ready", end="", file=file, flush=True)
            finally:
                for path in (self.socket, self._lock):
                    path.unlink(missing_ok=True)

    def _locked(self) -> IO[str]:
        """Open and lock the file."""
        end = time.monotonic() + HOLD_S  # others hold the lock while they look for a server
        while time.monotonic() < end:
            file = self._lock.open("a", encoding="ascii")
            if _locks(file) and os.fstat(file.fileno()).st_nlink:  # otherwise, a server that ended has removed it
                return file
            file.close()
            time.sleep(0.05)
        raise self.taken()

    def taken(self) -> UsageError:
        """Return the error for a second server."""
        number, _ = self.process() or (0, False)
        message = f"a server already runs in the background (process {number})"
        return UsageError(message, "ask it with --via auto, or end it with evoprune serve --stop")

    def found(self) -> Path | None:
        """Return the path of the socket, or None if there is no server. What a killed server left is removed.

        Raises:
            UsageError: See `check`.
        """
        if not os.path.lexists(self.socket):
            return None
        self.check()
        with suppress(FileNotFoundError), self._lock.open(encoding="ascii") as file:
            if not _locks(file):
                return self.socket
            self.socket.unlink(missing_ok=True)
        return None


def _locks(file: IO[str], shared: bool = False) -> bool:
    """Try to lock an open file. Returns False if another process has locked it."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class SocketConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str, **options: Any):
        super().__init__("localhost", **options)
        self._path = path

    def connect(self) -> None:
        if sys.platform == "win32":
            raise OSError("Windows has no Unix sockets")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)

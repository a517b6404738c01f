"""Run a server in its own process group, and measure the memory of its processes. Imported by `experiments.speed.serving`."""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from experiments.speed.processes import ROOT, Sampler, end_group, last_line

START_S = 900
STOP_S = 30
SAMPLE_S = 0.5
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


class Memory(Sampler):
    """Records the largest memory of a process and its children, in bytes, during a `with` block."""

    def __init__(self, pid: int):
        super().__init__(SAMPLE_S)
        self.peak = 0
        self._pid = pid

    def sample(self) -> None:
        self.peak = max(self.peak, memory_of(self._pid))


def memory_of(pid: int) -> int:
    """Return the memory of a process and its children in bytes, or 0 if it has ended. Shared pages are counted once."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    used = re.search(r"^Pss: +(\d+)", text, re.M)
    return (int(used[1]) << 10 if used else 0) + sum(memory_of(int(child)) for each in children for child in each)


@contextmanager
def serving(command: Sequence[str], port: int, threads: int, log: Path) -> Iterator[Memory]:
    """Run a server during a `with` block, which begins when the server is ready. Its output is appended to `log`.

    Raises:
        RuntimeError: If the server exits before it is ready, or is not ready within `START_S`.
    """
    environment = os.environ | SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    with log.open("a", encoding="utf-8") as out:
        process = subprocess.Popen(  # noqa: S603 (this Python)
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}/health", log)
        with Memory(process.pid) as memory:
            yield memory
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        finally:
            end_group(process.pid)
            process.wait()


def _wait(process: subprocess.Popen, health: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end:
        with suppress(URLError, OSError), urlopen(health, timeout=5):  # noqa: S310 (a loopback address)
            return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start: {last_line(log)}; see {log}")

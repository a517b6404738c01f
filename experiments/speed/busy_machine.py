"""Measure what other programs cost `evoprune ask`, as Markdown tables: `python -m experiments.speed.busy_machine`.

The demo model answers on an idle machine, and beside as many busy processes as there are cores; then several questions one after
another, and as many at once. Everything takes turns, round after round. Other versions of the code take part with `--against`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from evoprune.backend.limits import available_cores

ROOT = Path(__file__).parents[2]
CLIP = ROOT / "samples" / "square.mp4"
ASK = ("ask", str(CLIP), "What colour is the square?", "--json", "-q")
# Whatever sets numbers of threads, or how they wait: each version takes its own.
OURS = ("EVOPRUNE_", "OMP_", "GOMP_", "KMP_", "MKL_")


# What a busy process runs: it computes until the process whose number it is given has ended, however it did.
BUSY = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"


@dataclass(frozen=True)
class Asked:
    """One run of `ask`: milliseconds from its report, of encode and in all, seconds of the whole process, and its threads."""

    encode: float
    total: float
    process: float
    threads: int


def ask(code: Path, *more: str) -> Asked:
    """Runs the version of the program in a folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    start = time.perf_counter()
    command = [sys.executable, "-m", "evoprune_cli", *ASK, *more]
    done = subprocess.run(  # noqa: S603 (this Python, and this program)
        command, cwd=code, env=environment | {"PYTHONPATH": str(code)}, stdout=subprocess.PIPE, check=True
    )
    spent = time.perf_counter() - start
    record = json.loads(done.stdout)
    return Asked(record["time_ms"]["encode"], record["time_ms"]["total"], spent, record["env"]["threads"])


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """That many processes that compute until the block ends."""
    burners = []
    try:
        for _ in range(count):
            command = [sys.executable, "-c", BUSY, str(os.getpid())]
            burners.append(subprocess.Popen(command))  # noqa: S603 (this Python, and a program of our own)
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def seconds_of(code: Path, asks: int, at_once: int, *more: str) -> float:
    """Return seconds for so many runs, so many at a time."""
    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(lambda _: ask(code, *more), range(asks)))
    return time.perf_counter() - start


def busy_row(name: str, idle: Sequence[Asked], busy: Sequence[Asked]) -> str:
    """Return a row of the first table. A ratio is the median of the rounds' own."""

    def part(what: str) -> str:
        alone, beside = ([getattr(run, what) for run in runs] for runs in (idle, busy))
        ratio = median(b / a for a, b in zip(alone, beside, strict=True))
        digits = 1 if what == "process" else 0
        return f"{median(alone):.{digits}f} | {median(beside):.{digits}f} | {ratio:.1f}x"

    return f"| {name} | {idle[0].threads} | {part('encode')} | {part('total')} | {part('process')} |"


def at_once_row(name: str, threads: int, in_turn: Sequence[float], at_once: Sequence[float]) -> str:
    """Return a row of the second table."""
    ratio = median(a / b for a, b in zip(in_turn, at_once, strict=True))
    return f"| {name} | {threads} | {median(in_turn):.1f} | {median(at_once):.1f} | {ratio:.2f}x |"


def measure(versions: dict[str, Path], asks: int, repeat: int, *more: str) -> list[str]:
    """Return the lines of both tables."""
    cores = available_cores()
    idle, busy, in_turn, at_once = ({name: [] for name in versions} for _ in range(4))
    for code in versions.values():  # fills the page cache
        ask(code, *more)
    for _ in range(repeat):
        for name, code in versions.items():
            idle[name].append(ask(code, *more))
        with busy_processes(cores):
            for name, code in versions.items():
                busy[name].append(ask(code, *more))
        for name, code in versions.items():
            in_turn[name].append(seconds_of(code, asks, 1, *more))
            at_once[name].append(seconds_of(code, asks, asks, *more))
    return [
        f"{cores} cores, {repeat} rounds, medians; {cores} busy processes\n",
        "| version | threads | encode ms, idle | busy | | total ms, idle | busy | | process s, idle | busy | |",
        "|---|---" + "|--:" * 9 + "|",
        *(busy_row(name, idle[name], busy[name]) for name in versions),
        f"\n{asks} questions, whole processes\n",
        "| version | threads | one after another, s | at once, s | throughput |",
        "|---|---" + "|--:" * 3 + "|",
        *(at_once_row(name, idle[name][0].threads, in_turn[name], at_once[name]) for name in versions),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--asks", type=int, default=4, help="how many at once (default: 4)")
    parser.add_argument("--repeat", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--threads", default="auto", help="of this version, as `ask --threads` (default: auto)")
    parser.add_argument("--against", type=Path, nargs="*", default=[], help="folders of other versions of the code")
    args = parser.parse_args()
    versions = {"this": ROOT} | {folder.name: folder.resolve() for folder in args.against}
    more = () if args.threads == "auto" else ("--threads", args.threads)
    print("\n".join(measure(versions, args.asks, args.repeat, *more)))


if __name__ == "__main__":
    main()

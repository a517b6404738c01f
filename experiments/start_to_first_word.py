"""How long `evoprune ask` takes from the start of its process to the first word, in two checkouts that take turns.

    python -m experiments.start_to_first_word CKPT                             # this checkout; CKPT is written if it is not there
    python -m experiments.start_to_first_word CKPT --before OTHER_CHECKOUT     # the other one and this one in turn
    python -m experiments.start_to_first_word CKPT --method tome               # more options of `evoprune ask`

CKPT is a checkpoint of the 3B model's true dimensions with random weights (`experiments.checkpoint`: 7.5 GB). Everything counts:
the interpreter, imports, reading weights and video, encode and prefill. The first run of each checkout does not: it brings the
files into the page cache.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from evoprune.bench import clips
from experiments.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[1]
SIZE, SECONDS, FPS = (360, 640), 24, 24  # of the clip that is made where no video is named


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        first_word: seconds from its start to the first byte of the answer. `second_word`: to the next one.
        encode, prefill, load: seconds by its own report. `cpu`: user and system time of the whole process.
        peak: bytes, the most that were resident. `threads`: of torch.
        answer: the text.
    """

    first_word: float
    second_word: float | None
    encode: float
    prefill: float
    load: float
    cpu: float
    peak: int
    threads: int
    answer: str

    @property
    def ratio(self) -> float:
        """Start to first word over encode and prefill."""
        return self.first_word / (self.encode + self.prefill)


# Runs the command line of the checkout it is started in. The JSON record goes to a file, words to stdout as they come.
PROGRAM = """
import sys
sys.path.insert(0, sys.argv.pop(1))
record = sys.argv.pop(1)
from evoprune_cli.ask import Conversation
finish = Conversation._finish
def keep(self, report, *more):
    open(record, "w").write(report.to_json())
    finish(self, report, *more)
Conversation._finish = keep
from evoprune_cli.__main__ import start
start()
"""


def run_once(checkout: Path, arguments: list[str]) -> Run:
    """Runs `evoprune ask` of a checkout with this Python.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder, "record.json")
        command = [sys.executable, "-P", "-c", PROGRAM, str(checkout), str(record), "ask", *arguments]
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 (this Python)
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder
        )
        failed: list[bytes] = []
        drain = threading.Thread(target=lambda: failed.append(process.stderr.read()))
        drain.start()
        arrived, answer = [], b""
        while piece := os.read(process.stdout.fileno(), 65536):
            arrived.append(time.perf_counter() - begun)
            answer += piece
        process.wait()
        drain.join()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if process.returncode:
            raise RuntimeError(failed[0].decode(errors="replace"))
        report = json.loads(record.read_text())
    times = report["time_ms"]
    return Run(
        first_word=arrived[0],
        second_word=arrived[1] if len(arrived) > 1 else None,
        encode=times["encode"] / 1000,
        prefill=times["prefill"] / 1000,
        load=times["load"] / 1000,
        cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak=report["memory"]["peak_bytes"],
        threads=report["env"]["threads"],
        answer=answer.decode(errors="replace"),
    )


def write_clip(path: Path) -> None:
    """A clip of things that move before a still background."""
    import av

    frames = clips.synthetic_clip("motion", SECONDS, 364, 644)[:, : SIZE[0], : SIZE[1]]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in frames:
            for _ in range(FPS):  # each picture stays for a second
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame.copy(), format="rgb24")))
        file.mux(stream.encode())


FIGURES: dict[str, Callable[[Run], float]] = {
    "start to first word, s": lambda run: run.first_word,
    "start to second word, s": lambda run: run.second_word or 0.0,
    "load, s": lambda run: run.load,
    "encode, s": lambda run: run.encode,
    "prefill, s": lambda run: run.prefill,
    "first word / (encode + prefill)": lambda run: run.ratio,
    "CPU time of the process, s": lambda run: run.cpu,
    "peak memory, GiB": lambda run: run.peak / 2**30,
}


def table(runs: dict[str, list[Run]]) -> str:
    """Medians and ranges as Markdown."""
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    for name, figure in FIGURES.items():
        cells = [[figure(run) for run in taken] for taken in runs.values()]
        lines.append(f"| {name} | " + " | ".join(f"{median(c):.2f} ({min(c):.2f}-{max(c):.2f})" for c in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--before", type=Path, help="another checkout, which runs in turn with this one")
    parser.add_argument("--video", type=Path, help="default: a clip of moving things, 640x360, 24 s")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("-b", "--budget", default="0.25")
    parser.add_argument("-n", "--new-tokens", type=int, default=8)
    parser.add_argument("-r", "--repeat", type=int, default=5)
    given, more = parser.parse_known_args()
    if not given.checkpoint.exists():
        write_checkpoint(given.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        video = given.video or Path(folder, "motion.mp4")
        if given.video is None:
            write_clip(video)
        arguments = [str(video.resolve()), "What happens?", "-m", str(given.checkpoint.resolve()), "-b", given.budget]
        arguments += ["--frames", str(given.frames), "-n", str(given.new_tokens), "--no-stats", *more]
        checkouts = {"before": given.before.resolve()} if given.before else {}
        runs: dict[str, list[Run]] = {name: [] for name in [*checkouts, "now"]}
        for number in range(given.repeat + 1):
            for name, checkout in {**checkouts, "now": ROOT}.items():
                run = run_once(checkout, arguments)
                print(f"{name} {number}: {run.first_word:.2f} s, ratio {run.ratio:.2f}", file=sys.stderr, flush=True)
                if number:
                    runs[name].append(run)
    print(f"{run.threads} threads, {given.repeat} runs each, medians and ranges\n\n{table(runs)}\n")
    answers = {run.answer for taken in runs.values() for run in taken}
    print("all answers are equal" if len(answers) == 1 else f"{len(answers)} different answers: {answers}")


if __name__ == "__main__":
    main()

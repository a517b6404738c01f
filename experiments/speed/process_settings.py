"""Measure what settings of the process are worth: seconds to encode and read a window of video.

    python -m experiments.speed.process_settings -m CKPT --rounds 2    # CKPT: `checkpoint` writes one of the 3B model

*kept*: glibc keeps freed memory (`limits.keep_freed_memory`). *spin*: GOMP_SPINCOUNT. *thread*: the window is encoded in another
thread than the one that loaded the model. *ended*: that one has ended its OpenMP team (`release_omp_threads`). Frames all move. The
median of the windows after the first one.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from statistics import median

from evoprune.backend.limits import keep_freed_memory

# Setting by name: whether memory is kept, the spin count, whether another thread encodes, whether the first one's team is ended.
SETTINGS = {
    "as Python has them": (False, None, False, False),
    "kept": (True, None, False, False),
    "kept, spin 1,000": (True, 1_000, False, False),
    "kept, spin 10,000 (the commands)": (True, 10_000, False, False),
    "kept, thread": (True, None, True, False),
    "kept, thread, ended": (True, None, True, True),
    "kept, spin 10,000, thread, ended (watch)": (True, 10_000, True, True),
}


def measure(name: str, model: str, budget: float, frames: int, windows: int) -> float:
    """Return seconds of a window, in this process."""
    kept, _, apart, ended = SETTINGS[name]
    if kept:
        keep_freed_memory()
    from evoprune.backend.cpu.machine import release_omp_threads
    from evoprune.video_qa import VideoQA
    from experiments.speed.live_rate import Paced

    qa = VideoQA.load(model, budget=budget)
    source = Paced(280, 392, 0)
    spent = []

    def work() -> None:
        with qa.stream(window_s=frames / 4, fps=4.0, memory_s=1.5 * frames) as stream:
            for window in range(windows):
                made = [source.frame(window * frames + number) for number in range(frames)]
                begun = time.perf_counter()
                for number, frame in enumerate(made):
                    stream.add(frame, (window * frames + number) / 4)
                spent.append(time.perf_counter() - begun)

    if ended:
        release_omp_threads()
    thread = threading.Thread(target=work)
    thread.start() if apart else work()
    if apart:
        thread.join()
    return median(spent[1:])


def run(name: str, args: argparse.Namespace) -> float:
    spin = SETTINGS[name][1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MALLOC_"))}
    command = [sys.executable, "-m", "experiments.speed.process_settings", "--only", name, "-m", args.model]
    command += ["--budget", str(args.budget), "--frames", str(args.frames), "--windows", str(args.windows)]
    if spin:
        environment["GOMP_SPINCOUNT"] = str(spin)
    # this Python, and this program
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603
    return json.loads(done.stdout)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--frames", type=int, default=24, help="of a window, 280x392 pixels")
    parser.add_argument("--windows", type=int, default=4, help="of a process; the first one does not count")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=SETTINGS, help="one setting, in this process; prints seconds")
    args = parser.parse_args(arguments)
    if args.only:
        print(json.dumps(measure(args.only, args.model, args.budget, args.frames, args.windows)))
        return
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(args.rounds):
        for name, made in found.items():
            made.append(run(name, args))
            print(f"{name}: {made[-1]:.2f} s", file=sys.stderr, flush=True)
    first = median(found[next(iter(found))])
    print("| | a window, s | times as fast |\n|---|--:|--:|")
    for name, made in found.items():
        print(f"| {name} | {median(made):.2f} ({min(made):.2f}-{max(made):.2f}) | {first / median(made):.2f} |")


if __name__ == "__main__":
    main()

"""Measure the time from a video's path to the first word of an answer. All cores should be idle when this starts.

    python -m experiments.speed.first_word -o DIR                    # all parts
    python -m experiments.speed.first_word -o DIR -m CKPT            # a model folder; default: DIR/checkpoint, created if missing
    python -m experiments.speed.first_word -o DIR --parts loaded     # one part; the others keep their results
    python -m experiments.speed.first_word -o DIR --device cuda      # at most eight minutes
    python -m experiments.speed.first_word -o DIR --readme --also GPU    # measures nothing, writes the results into the documents
    python -m experiments.speed.first_word -o DIR --tiny             # trial run with small clips and the demo model

| part | measures |
|---|---|
| reading | time to read each kind of clip, with sparse and dense frames: evoprune, torchcodec, decord, OpenCV, PyAV |
| loaded | time from the path to the first and the last word with a loaded model: evoprune at each budget, and transformers |
| start | the same times from the start of a process, CPU time, memory, and the stats that `evoprune ask` prints |

First, the script creates the clips (10 and 60 minutes; 3 GB), a checkpoint with 3B dimensions and random weights (7 GB), and an
environment with the other readers. All of them are kept in DIR. Each side (evoprune, transformers, or a reader) runs in its own
process. The sides take turns in rounds, and each part ends when its time is up. On a CPU, the whole run takes a few hours.
DIR/first_word.json is updated after every turn, and the tables in DIR/first_word.md are updated after every part.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from evoprune.bundled import DEMOS
from experiments.speed.first_word_asks import QUESTION, TRANSFORMERS
from experiments.speed.first_word_clips import KINDS, TINY
from experiments.speed.first_word_readers import OURS, READERS, make_environment
from experiments.speed.processes import ROOT, Side, end_group, last_line, limits_of, run_process

PREPARE, READING, LOADED, START = PARTS = ("prepare", "reading", "loaded", "start")
# Time limits in seconds, for each part and for a single turn. On a GPU, all parts together take eight minutes.
SECONDS = {
    "cpu": {PREPARE: 1800, READING: 7200, LOADED: 3600, START: 2400},
    "cuda": {PREPARE: 150, READING: 70, LOADED: 180, START: 80},
}
TURN_S = {"cpu": {READING: 60, LOADED: 400, START: 400}, "cuda": {READING: 20, LOADED: 60, START: 40}}
TINY_S = 120  # time limit for each part of a trial run, in seconds
BUDGETS = ("full", "balanced", "fast")
# Number of frames for a whole clip; length (in seconds) and frame rate of the dense case.
SPARSE, DENSE_S, DENSE_FPS = 64, 60, 2
BEGIN_S = 1.0137  # start of the dense case, chosen so that no requested time coincides with a frame timestamp
NEW_TOKENS = 32
BEGIN_LIMIT_S = 60  # time limit for starting a reader process and reading two frames, in seconds
AGAIN = 1.5  # a turn starts only if the remaining time is at least this multiple of the previous turn's duration


@dataclass(frozen=True)
class Clip:
    """A clip file. `kind` is a key in `KINDS`."""

    kind: str
    minutes: float
    path: Path

    @property
    def seconds(self) -> int:
        return KINDS[self.kind].seconds(60 * self.minutes)

    @property
    def title(self) -> str:
        return f"{KINDS[self.kind].title}, {self.minutes:g} min"


@dataclass(frozen=True)
class Frames:
    """The frames to read from a clip: the middle frames of `count` consecutive parts that last `part_s` seconds each."""

    clip: Clip
    count: int
    part_s: float
    begin_s: float = 0.0

    @property
    def times_s(self) -> list[float]:
        return [round(self.begin_s + (number + 0.5) * self.part_s, 6) for number in range(self.count)]


class Run:
    """A measurement run. `record` contains all results and is written to the folder after each turn."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder: Path = args.output
        self.file = self.folder / "first_word.json"
        self.record: dict[str, Any] = {}
        if self.file.exists():
            self.record = json.loads(self.file.read_text(encoding="utf-8"))
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.on_gpu = args.device.startswith("cuda")
        self.peers = Path(sys.executable)  # Python interpreter of the environment with the other readers
        self.model: Path = args.model or self.folder / "checkpoint"
        minutes = (10.0, 60.0)
        kinds = ["hd"] if self.on_gpu or args.tiny else [*KINDS]
        ending = "min"
        if args.tiny:
            minutes = (0.5,)
            ending = "min-tiny"
            self.model = args.model or DEMOS["demo"].folder
        self.clips = [
            Clip(kind, m, self.folder / "clips" / f"{kind}-{m:g}{ending}.{KINDS[kind].ending}")
            for kind in kinds
            for m in (minutes if kind == "hd" else minutes[:1])
        ]

    @property
    def questions(self) -> list[tuple[Clip, int | None]]:
        """Clips to ask about, each with a number of frames, or None if the model's frame rate and limits determine the number."""
        hd = [clip for clip in self.clips if clip.kind == "hd"]
        return [(hd[-1], SPARSE), (hd[0], None)] if self.on_gpu else [(hd[0], None)]

    def turn_s(self, part: str) -> float:
        return TURN_S["cuda" if self.on_gpu else "cpu"][part]

    def save(self) -> None:
        writing = self.file.with_suffix(".writing")
        writing.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        writing.replace(self.file)  # atomic, so that the file is complete even if the process is killed

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Record the result of a turn and print it."""
        self.record[part].append(row)
        outcome = row.get("error") or f"{row.get('seconds', row.get('first_word')):.2f} s"
        say(f"{part}: {row['clip']} {row.get('part_s', '')} {row['side']}, round {row['round'] + 1}: {outcome}")
        self.save()

    def side(self, python: Path | str, module: str, *arguments: str) -> Side:
        name = "-".join([module.rpartition("_")[2], arguments[0]]).replace(", ", "-").replace(" ", "-")
        return Side([str(python), "-m", module, *arguments], self.folder / "logs" / f"{name}.txt")

    def part(self, name: str, measure: Callable[["Run", float], None]) -> None:
        """Run one part of the measurements within its time limit, and then write the tables."""
        from experiments.speed.first_word_tables import write_tables

        self.record[name] = []
        start_s = time.monotonic()
        limit_s = self.args.seconds[name]
        self.record.setdefault("parts", {})[name] = {"limit_s": limit_s, "rounds": self.args.rounds}
        try:
            measure(self, start_s + limit_s)
        finally:
            self.record["parts"][name]["seconds"] = round(time.monotonic() - start_s, 1)
            self.save()
            write_tables([self.record], self.folder)


def say(words: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S}  {words}", file=sys.stderr, flush=True)


def cached(path: Path) -> None:
    """Read a file once to bring it into the page cache, so that no side has to read it from disk."""
    if path.exists():
        with path.open("rb") as file:
            while file.read(2**24):
                pass


# Preparation.


def prepare(run: Run, until: float) -> None:
    """Create the clips, the checkpoint and the environment for the other readers, unless they already exist."""
    args = run.args
    wanted = run.clips if READING in args.parts else [clip for clip, _ in run.questions]
    (run.folder / "clips").mkdir(exist_ok=True)
    for clip in wanted:
        how = ("--seconds", str(60 * clip.minutes), "--shrink", str(TINY if args.tiny else 1))
        make(run, clip.path, ("experiments.speed.first_word_clips", clip.kind, str(clip.path), *how), until)
    if args.parts != [READING]:
        make(run, run.model, ("experiments.speed.checkpoint", str(run.model)), until)
    if not args.tiny:
        say("the other readers")
        run.peers = make_environment(run.folder.absolute() / "readers", args.wheels)
    run.record["about"] = about(run)


def make(run: Run, path: Path, module: Sequence[str], until: float) -> None:
    """Run a module that creates the file or folder `path`, unless it already exists.

    Failures are only logged. Parts that require the file or folder then report it as missing.
    """
    if not path.exists():
        log = run.folder / "logs" / f"{path.stem}.txt"
        state = run_process(("-m", *module), log, until - time.monotonic())
        say(f"making {path.name}: {state}" + f", {last_line(log)}" * (state != "done"))


def about(run: Run) -> dict[str, Any]:
    """Return the machine, the package versions, and the settings of this run."""
    from evoprune import __version__
    from evoprune.backend import Device, Host

    packages = ("torch", "transformers", "av", "torchcodec", "decord", "opencv-python-headless")
    asked = (
        "import sys\nfrom importlib.metadata import version, PackageNotFoundError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(version(name))\n"
        "    except PackageNotFoundError: print('')\n"
    )
    done = subprocess.run([str(run.peers), "-c", asked, *packages], stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": run.args.device,
        "device_name": Device(run.args.device).product_name,
        "cpu": Device("cpu").product_name,
        "cores": Host().available_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "model": run.model.name,
        "tiny": run.args.tiny,
        "new_tokens": NEW_TOKENS,
        "question": QUESTION,
        "versions": {
            "evoprune": __version__,
            "python": sys.version.split()[0],
            **{n: v or None for n, v in zip(packages, done.stdout.split("\n"), strict=False)},
        },
    }


# The parts. In the first round, each side either has a turn or records an error. In later rounds, a turn starts only if it fits
# within the remaining time.


def reading(run: Run, until: float) -> None:
    """Measure how long each reader takes to read sparse and dense frames from each clip."""
    cases = []
    for clip in run.clips:
        cases.append(Frames(clip, SPARSE, clip.seconds / SPARSE))
        if clip.minutes == run.clips[0].minutes:
            seconds = min(DENSE_S, int(clip.seconds - BEGIN_S))
            cases.append(Frames(clip, seconds * DENSE_FPS, 1 / DENSE_FPS, BEGIN_S))
    read_in_turn(run, cases, [*READERS], until)


def read_in_turn(run: Run, cases: Sequence[Frames], names: Sequence[str], until: float) -> None:
    """Run rounds in which each reader has one turn per case."""
    module = "experiments.speed.first_word_readers"
    sides = {name: run.side(sys.executable if name in OURS else run.peers, module, name) for name in names}
    done: dict[tuple, dict] = {}
    try:
        for round_ in range(run.args.rounds):
            for case in cases:
                cached(case.clip.path)
                facts = {"path": str(case.clip.path), "kind": case.clip.kind, "part_s": case.part_s}
                for name, side in sides.items():
                    left = until - time.monotonic()
                    before = done.get((case, name))
                    if round_ and ("error" in before or left < AGAIN * before["seconds"]):
                        continue
                    if not side.running:  # start the process first to exclude its imports from the measured time
                        side.ask(facts | {"times_s": case.times_s[:2]}, min(BEGIN_LIMIT_S, left))
                    limit_s = run.turn_s(READING)
                    if round_ == 0:
                        limit_s = min(limit_s, left)
                    done[case, name] = side.ask(facts | {"times_s": case.times_s}, limit_s)
                    row = {"clip": case.clip.title, "asked": case.count, "part_s": round(case.part_s, 4)}
                    run.add(READING, row | {"side": name, "round": round_, **done[case, name]})
    finally:
        for side in sides.values():
            side.end()


def loaded(run: Run, until: float) -> None:
    """Measure how long an already loaded model takes to answer questions.

    On a CPU, there may not be enough memory for more than one process, so only one runs at a time and gets each question twice. On
    a GPU, processes keep their models loaded while they wait for their turn, and get each question once per turn.
    """
    warm_files(run)
    module = "experiments.speed.first_word_asks"
    sides = {name: run.side(sys.executable, module, name, *model_options(run)) for name in BUDGETS}
    sides = {TRANSFORMERS: run.side(run.peers, module, TRANSFORMERS, *model_options(run))} | sides
    asked = [question for question in run.questions for _ in range(1 if run.on_gpu else 2)]
    lasted = dict.fromkeys(sides, 0.0)
    try:
        for round_ in range(run.args.rounds):
            for name, side in sides.items():
                start_s = time.monotonic()
                if round_ and until - start_s < AGAIN * lasted[name]:
                    continue
                for clip, frames in asked:
                    first = not side.running
                    request = {"video": str(clip.path.absolute()), "frames": frames, "new_tokens": NEW_TOKENS}
                    answer = side.ask(request, min(run.turn_s(LOADED), until - time.monotonic()))
                    facts = {"clip": clip.title, "asked_frames": frames, "side": name, "round": round_, "first": first}
                    run.add(LOADED, facts | answer)
                    if "error" in answer:
                        break
                lasted[name] = time.monotonic() - start_s
                if "error" in answer:
                    lasted[name] = float("inf")  # never start another turn
                if not run.on_gpu:
                    side.end()
    finally:
        for side in sides.values():
            side.end()


def start(run: Run, until: float) -> None:
    """Measure the times to the first and last word from process start, including imports and loading."""
    warm_files(run)
    clip, frames = run.questions[0]
    video = str(clip.path.absolute())
    more = [*model_options(run), "-n", str(NEW_TOKENS)]
    if frames is not None:
        more += ["--frames", str(frames)]
    module = "experiments.speed.first_word_asks"
    commands = {TRANSFORMERS: [str(run.peers), "-m", module, TRANSFORMERS, "--once", video, *more]}
    for budget in BUDGETS:
        commands[budget] = [sys.executable, "-m", "evoprune_cli", "ask", video, QUESTION, "-b", budget, *more]
    done: dict[str, dict] = {}
    for round_ in range(run.args.rounds):
        for name, command in commands.items():
            left = until - time.monotonic()
            before = done.get(name)
            if round_ and ("error" in before or left < AGAIN * before["ended"]):
                continue
            done[name] = run_once(command, min(run.turn_s(START), left), run.folder / "logs" / "start.txt")
            run.add(START, {"clip": clip.title, "asked_frames": frames, "side": name, "round": round_, **done[name]})


def model_options(run: Run) -> tuple[str, ...]:
    return ("-m", str(run.model.absolute()), "--device", run.args.device)


def warm_files(run: Run) -> None:
    """Read the clips and model files into the page cache."""
    for path in [*(clip.path for clip, _ in run.questions), *run.model.glob("*")]:
        cached(path)


def run_once(command: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run a process and measure when its output arrives.

    Returns:
        The times from process start to the first and last words in seconds, the CPU time, and the memory. If there is no answer,
        `"error"` with the reason instead.
    """
    if seconds <= 0:
        return {"error": "not started: no time was left"}
    with log.open("w", encoding="utf-8") as outcome:
        start_s = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 (Python, and a module of ours)
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=outcome, start_new_session=True
        )
    late = threading.Timer(seconds, end_group, [process.pid])
    late.start()
    try:
        moments = []
        answer = b""
        while piece := os.read(process.stdout.fileno(), 65536):
            moments.append(time.perf_counter() - start_s)
            answer += piece
        _, status, used = os.wait4(process.pid, 0)
    finally:
        over = not late.is_alive()
        late.cancel()
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    if over:
        return {"error": f"not done in {seconds:.0f} s", "over_s": seconds}
    if process.returncode or not moments:
        return {"error": f"ended with {process.returncode}: {last_line(log)}"}
    return {
        "first_word": moments[0],
        "second_word": moments[1] if len(moments) > 1 else None,
        "last_word": moments[-1],
        "ended": time.perf_counter() - start_s,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "answer": answer.decode(errors="replace")[:200],
        "stats": log.read_text(encoding="utf-8", errors="replace")[-4000:],
    }


MEASURES = {PREPARE: prepare, READING: reading, LOADED: loaded, START: start}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.first_word", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for all results")
    parser.add_argument(
        "-m", "--model", type=Path, metavar="CKPT", help="a folder with a model; default: DIR/checkpoint, 3B"
    )
    parser.add_argument("--parts", default=",".join(PARTS[1:]), metavar="LIST", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", default="", metavar="PART=N,...", help="time limits of parts")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install the other readers from here, without network"
    )
    parser.add_argument("--tiny", action="store_true", help="trial run with small clips and the demo model")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing, only write the tables into README.md and results/"
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="DIR", help="with --readme: runs on other machines"
    )
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    usual = SECONDS["cuda" if args.device.startswith("cuda") else "cpu"]
    if args.tiny:
        usual = dict.fromkeys(usual, TINY_S)
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    try:
        args.seconds = limits_of(args.seconds, usual)
    except ValueError as problem:
        parser.error(f"--seconds: {problem}; for example reading=600")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the measurements or, with `--readme`, write the results of an earlier run to the documents."""
    from experiments.speed.first_word_tables import document, write_documents

    args = parsed(argv)
    if args.readme:
        files = [folder / "first_word.json" for folder in (args.output, *args.also)]
        write_documents([json.loads(file.read_text(encoding="utf-8")) for file in files], ROOT)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ensures that a running side is also terminated
    run = Run(args)
    for part, measure in MEASURES.items():
        if part == PREPARE or part in args.parts:
            run.part(part, measure)
    print(document([run.record]))


if __name__ == "__main__":
    main()

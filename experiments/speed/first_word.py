"""Time the way from a video's path to the first word: `python -m experiments.speed.first_word -o DIR`, with all cores free.

    python -m experiments.speed.first_word -o DIR -m CKPT         # a folder with a model; default: DIR/checkpoint, which is made
    python -m experiments.speed.first_word -o DIR --parts reading,curve   # some parts; the others keep their results
    python -m experiments.speed.first_word -o DIR --device cuda           # at most eight minutes
    python -m experiments.speed.first_word -o DIR --parts start --before CHECKOUT   # another version takes turns with this one
    python -m experiments.speed.first_word -o DIR --readme --also GPU     # measures nothing: writes into the documents
    python -m experiments.speed.first_word -o DIR --tiny                  # small clips and the demo model: does it run?

| part | what it measures |
|---|---|
| reading | seconds for frames of each kind of clip, far apart and close together: evoprune, torchcodec, decord, OpenCV, PyAV |
| curve | the same over the distance of the frames: evoprune, and the readers that were fastest in `reading` |
| loaded | with the model loaded: from the path to the first word, and to the last; evoprune at each budget, and transformers |
| start | the same from the start of a process; also CPU time, memory, and the stats that `evoprune ask` prints |

First the clips are made (10 and 60 minutes; 3 GB), a checkpoint of 3B dimensions with random weights (7 GB), and an environment
with the other readers. All are kept in DIR. Each side is a process of its own; the sides take turns, round after round, and each
part ends after its time: on a CPU all of it takes some hours. After each turn DIR/first_word.json has all that is known, after each
part DIR/first_word.md has the tables.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from evoprune.bundled import DEMOS
from evoprune.video.info import AUTO_SEEK, SEEKS
from experiments.speed.first_word_asks import QUESTION, TRANSFORMERS
from experiments.speed.first_word_clips import KINDS, TINY
from experiments.speed.first_word_readers import EXACT, KEYFRAMES, OURS, PEERS, READERS, TORCHCODEC, make_environment
from experiments.speed.gpu import run_process
from experiments.speed.turns import Side, end_group, last_line

ROOT = Path(__file__).parents[2]
PARTS = READING, CURVE, LOADED, START = ("reading", "curve", "loaded", "start")
PREPARE = "prepare"
# The seconds that a part may take. On a GPU all together take eight minutes.
SECONDS = {
    "cpu": {PREPARE: 1800, READING: 7200, CURVE: 3600, LOADED: 3600, START: 2400},
    "cuda": {PREPARE: 150, READING: 70, LOADED: 180, START: 80},
}
TURN_S = {
    "cpu": {READING: 60, CURVE: 60, LOADED: 400, START: 400},
    "cuda": {READING: 20, CURVE: 20, LOADED: 60, START: 40},
}
DRY_S = 120  # of each part of a trial
BUDGETS = ("full", "balanced", "fast")
SPARSE, DENSE, DENSE_FPS = 64, 60, 2  # frames of a whole clip; seconds, and frames of each
CURVE_FRAMES = 16
CURVE_PARTS_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
BEGIN_S = 1.0137  # where times begin that are close together, so that none is exactly that of a frame
RIGHT_S = 0.1  # farther from its time no frame of the fastest reader may be
NEW_TOKENS = 32
BEGIN_LIMIT_S = 60  # in which a reader's process starts and reads two frames
AGAIN = 1.5  # a turn begins only if so many times its last time is left


@dataclass(frozen=True)
class Clip:
    """A file of the kind `kind` in `KINDS`."""

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
    """What is read of a clip: the middles of so many parts of equal length."""

    clip: Clip
    count: int
    part_s: float
    begin_s: float = 0.0

    @property
    def times_s(self) -> list[float]:
        return [round(self.begin_s + (number + 0.5) * self.part_s, 6) for number in range(self.count)]

    @property
    def facts(self) -> dict[str, Any]:
        return {"clip": self.clip.title, "kind": self.clip.kind, "asked": self.count, "part_s": round(self.part_s, 4)}


class Run:
    """A measurement: `record` has what is known, and is written into the folder after each turn."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.folder: Path = args.output
        self.file = self.folder / "first_word.json"
        self.record: dict[str, Any] = {}
        if self.file.exists():
            self.record = json.loads(self.file.read_text(encoding="utf-8"))
        self.begun = time.monotonic()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.peers = args.peers
        self.model: Path = args.model or self.folder / "checkpoint"
        if args.tiny and not args.model:
            self.model = DEMOS["demo"].folder
        self._read_through: set[Path] = set()

    @property
    def clips(self) -> list[Clip]:
        """Return the clips: of `hd` all lengths, of other kinds the shortest."""
        lengths = {kind: self.args.minutes[:1] for kind in self.args.kinds}
        if "hd" in lengths:
            lengths["hd"] = self.args.minutes
        shrunk = "-tiny" * self.args.tiny
        return [
            Clip(kind, m, self.folder / "clips" / f"{kind}-{m:g}min{shrunk}.{KINDS[kind].ending}")
            for kind, minutes in lengths.items()
            for m in minutes
        ]

    def save(self) -> None:
        writing = self.file.with_suffix(".writing")
        writing.write_text(json.dumps(self.record, indent=1), encoding="utf-8")
        writing.replace(self.file)  # a process that is stopped leaves a whole file

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keeps a turn, and says so."""
        self.record[part].append(row)
        said = row.get("error") or " ".join(
            f"{name} {row[name]:.2f} s" for name in ("seconds", "first_word", "last_word") if row.get(name) is not None
        )
        self.say(
            f"{part}: {row.get('clip', '')} {row.get('part_s', '')} {row['side']}, round {row['round'] + 1}: {said}"
        )
        self.save()

    def say(self, words: str) -> None:
        print(f"{time.monotonic() - self.begun:5.0f} s  {words}", file=sys.stderr, flush=True)

    def side(self, python: Path | str, module: str, *arguments: str) -> Side:
        name = "-".join([module.rpartition("_")[2], arguments[0]]).replace(", ", "-").replace(" ", "-")
        return Side([str(python), "-m", module, *arguments], self.folder / "logs" / f"{name}.txt")

    def part(self, name: str, measure: Callable[["Run", float], None]) -> None:
        """Runs a part within its seconds, and writes the tables."""
        from experiments.speed.first_word_tables import write_tables

        self.record[name] = []
        begun = time.monotonic()
        self.record.setdefault("parts", {})[name] = {"limit_s": self.args.seconds[name], "rounds": self.args.rounds}
        try:
            measure(self, begun + self.args.seconds[name])
        finally:
            self.record["parts"][name]["seconds"] = round(time.monotonic() - begun, 1)
            self.save()
            write_tables([self.record], self.folder)

    def cached(self, path: Path) -> None:
        """Reads a file once, so that it is in the page cache for all sides."""
        if path in self._read_through or not path.exists():
            return
        self._read_through.add(path)
        with path.open("rb") as file:
            while file.read(2**24):
                pass


# What the parts need.


def prepare(run: Run, until: float) -> None:
    """Makes the clips, the checkpoint and the environment of the other readers, unless they are there."""
    args = run.args
    wanted = asked_clips(run)
    if {READING, CURVE} & {*args.parts}:
        wanted = run.clips
    (run.folder / "clips").mkdir(exist_ok=True)
    shrink = "1"
    if args.tiny:
        shrink = str(TINY)
    for clip in wanted:
        if not clip.path.exists():
            how = ("--seconds", str(60 * clip.minutes), "--shrink", shrink)
            made = ("-m", "experiments.speed.first_word_clips", clip.kind, str(clip.path), *how)
            make(run, clip.path.stem, made, until)
    if {LOADED, START} & {*args.parts} and not run.model.exists():
        make(run, "checkpoint", ("-m", "experiments.speed.checkpoint", str(run.model)), until)
    if run.peers is None:
        run.say("the other readers")
        run.peers = make_environment(run.folder.absolute() / "readers", args.torchcodec, args.wheels)
    run.record["about"] = about(run)
    run.record["clips"] = [
        {"clip": clip.title, "file": clip.path.name, "seconds": clip.seconds, "bytes": clip.path.stat().st_size}
        for clip in wanted
        if clip.path.exists()
    ]


def make(run: Run, name: str, arguments: Sequence[str], until: float) -> None:
    """Runs a module that makes something. Where it fails, what needs it says so."""
    run.say(f"making {name}")
    log = run.folder / "logs" / f"{name}.txt"
    left = until - time.monotonic()
    code = run_process([sys.executable, *arguments], log, max(left, 0.1), {})
    if code is None:
        run.say(f"{name}: no time was left")
    elif code != 0:
        run.say(f"{name}: {last_line(log)}")


def about(run: Run) -> dict[str, Any]:
    """Return the machine, versions and settings."""
    from evoprune import __version__
    from evoprune.backend.devices import device_name
    from evoprune.backend.limits import available_cores

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
        "device_name": device_name(run.args.device),
        "cpu": device_name("cpu"),
        "cores": available_cores(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "model": "demo" if run.args.tiny else run.model.name,
        "tiny": run.args.tiny,
        "dtype": run.args.dtype,
        "new_tokens": run.args.new_tokens,
        "question": QUESTION,
        "versions": {
            "evoprune": __version__,
            "python": sys.version.split()[0],
            **{n: v or None for n, v in zip(packages, done.stdout.split("\n"), strict=False)},
        },
    }


# Reading.


def shortest(clips: Sequence[Clip]) -> list[Clip]:
    """Return the first clip of each kind."""
    return [clip for number, clip in enumerate(clips) if clip.kind not in {other.kind for other in clips[:number]}]


def sparse(clip: Clip) -> Frames:
    """Return frames spread over a whole clip."""
    return Frames(clip, SPARSE, clip.seconds / SPARSE)


def dense(clip: Clip) -> Frames:
    """Some frames a second of the first minute; of a shorter clip, of all of it."""
    seconds = min(DENSE, int(clip.seconds - BEGIN_S))
    return Frames(clip, seconds * DENSE_FPS, 1 / DENSE_FPS, BEGIN_S)


def reading(run: Run, until: float) -> None:
    """All readers on all clips, with frames far apart and close together."""
    cases = []
    for clip in run.clips:
        cases.append(sparse(clip))
        if clip in shortest(run.clips):
            cases.append(dense(clip))
    read_in_turn(run, READING, [(case, [*READERS]) for case in cases], until)


def curve(run: Run, until: float) -> None:
    """evoprune and the fastest other readers, over the distance of the frames."""
    cases = []
    for clip in shortest(run.clips):
        sides = [EXACT, KEYFRAMES, *fastest(run.record.get(READING, []), clip.kind)]
        for part_s in CURVE_PARTS_S:
            count = min(CURVE_FRAMES, int((clip.seconds - BEGIN_S) / part_s))
            if count > 1:
                cases.append((Frames(clip, count, part_s, BEGIN_S), sides))
    read_in_turn(run, CURVE, cases, until)


def fastest(rows: Sequence[dict[str, Any]], kind: str) -> list[str]:
    """Return the other readers that were the fastest with the right frames of a kind of clip, in any of its cases."""
    cases: dict[tuple, dict[str, list[float]]] = {}
    for row in rows:
        if row["kind"] == kind and row["side"] in PEERS and row.get("moved_s", RIGHT_S) < RIGHT_S:
            cases.setdefault((row["clip"], row["part_s"]), {}).setdefault(row["side"], []).append(row["seconds"])
    best = [min(sides, key=lambda side: median(sides[side])) for sides in cases.values()]
    return [side for side in PEERS if side in best] or ["torchcodec"]


def read_in_turn(run: Run, part: str, cases: Sequence[tuple[Frames, list[str]]], until: float) -> None:
    """Rounds of each case. Each may take its share of the time that is left."""
    wanted = run.args.sides or READERS
    pythons = {name: sys.executable if name in OURS else run.peers for name in READERS if name in wanted}
    sides = {name: run.side(python, "experiments.speed.first_word_readers", name) for name, python in pythons.items()}
    turn_s = run.args.turn_s[part]
    try:
        for number, (case, names) in enumerate(cases):
            run.cached(case.clip.path)
            request = {
                "path": str(case.clip.path),
                "kind": case.clip.kind,
                "times_s": case.times_s,
                "part_s": case.part_s,
            }
            here = [name for name in names if name in sides]
            for name in here:
                if not sides[name].running:  # it imports what it needs
                    sides[name].ask(
                        request | {"times_s": case.times_s[:2]}, min(BEGIN_LIMIT_S, until - time.monotonic())
                    )
            now = time.monotonic()
            ends = now + max(0.0, until - now) / (len(cases) - number)
            done: dict[str, dict] = {}
            for round_ in range(run.args.rounds):
                for name in here:
                    left = ends - time.monotonic()
                    before = done.get(name)
                    if round_ and ("error" in before or left < AGAIN * before["seconds"]):
                        continue
                    limit_s = turn_s
                    if round_ == 0:
                        limit_s = min(turn_s, left)
                    done[name] = sides[name].ask(request, limit_s)
                    run.add(part, {**case.facts, "side": name, "round": round_, **done[name]})
    finally:
        for side in sides.values():
            side.end()


# Asking.


def asked_clips(run: Run) -> list[Clip]:
    """Return the clips that are asked about."""
    hd = [clip for clip in run.clips if clip.kind == "hd"]
    return hd if run.args.device.startswith("cuda") else hd[:1]


def questions(run: Run) -> list[tuple[Clip, int | None]]:
    """Return clips, and how many frames are looked at; None: as many as the model's rate and limits give."""
    asked = asked_clips(run)
    if run.args.frames is not None:
        return [(asked[-1], run.args.frames)]
    if run.args.device.startswith("cuda"):
        return [(asked[-1], SPARSE), (asked[0], None)]
    return [(asked[0], None)]


def asking_sides(run: Run) -> list[str]:
    """Return the rows: transformers, then evoprune at each budget."""
    return [name for name in (TRANSFORMERS, *run.args.budgets) if not run.args.sides or name in run.args.sides]


def model_options(run: Run) -> tuple[str, ...]:
    """Return the options that all sides have. Earlier versions do not know `--seek`."""
    options = ("-m", str(run.model.absolute()), "--device", run.args.device, "--dtype", run.args.dtype)
    if run.args.seek == AUTO_SEEK:
        return options
    return *options, "--seek", run.args.seek


def loaded(run: Run, until: float) -> None:
    """Questions to a loaded model.

    On a CPU memory may be short: one process at a time, which is asked twice. On a GPU the processes wait for their turns, and each
    is asked once.
    """
    warm_files(run)
    apart = not run.args.device.startswith("cuda")
    asks = 1
    if apart:
        asks = 2
    names = asking_sides(run)
    pythons = dict.fromkeys(names, sys.executable) | {TRANSFORMERS: run.peers}
    module = "experiments.speed.first_word_asks"
    sides = {name: run.side(pythons[name], module, name, *model_options(run)) for name in names}
    lasted: dict[str, float] = dict.fromkeys(names, 0.0)
    failed: set[str] = set()
    try:
        for round_ in range(run.args.rounds):
            for name in names:
                begun = time.monotonic()
                if name in failed or (round_ and until - begun < AGAIN * lasted[name]):
                    continue
                for clip, frames, answer, first in visit(run, sides[name], until, asks):
                    facts = {"clip": clip.title, "asked_frames": frames, "side": name, "round": round_, "first": first}
                    run.add(LOADED, facts | answer)
                    if "error" in answer:
                        failed.add(name)
                lasted[name] = time.monotonic() - begun
                if apart:
                    sides[name].end()
    finally:
        for side in sides.values():
            side.end()


def visit(run: Run, side: Side, until: float, asks: int) -> Iterator[tuple[Clip, int | None, dict[str, Any], bool]]:
    """Yield the answers of one turn of a side, and whether each is the first of its process. Ends with one that failed."""
    for clip, frames in questions(run):
        for _ in range(asks):
            first = not side.running
            request = {"video": str(clip.path.absolute()), "frames": frames, "new_tokens": run.args.new_tokens}
            answer = side.ask(request, min(run.args.turn_s[LOADED], until - time.monotonic()))
            yield clip, frames, answer, first
            if "error" in answer:
                return


def warm_files(run: Run) -> None:
    """Brings the clips and the model's files into the page cache."""
    for path in [*(clip.path for clip in asked_clips(run)), *run.model.glob("*")]:
        run.cached(path)


def start(run: Run, until: float) -> None:
    """Whole processes."""
    warm_files(run)
    clip, frames = questions(run)[0]
    video = str(clip.path.absolute())
    more = ["-n", str(run.args.new_tokens)]
    if frames is not None:
        more += ["--frames", str(frames)]
    commands = {}
    for name in asking_sides(run):
        if name == TRANSFORMERS:
            side = (
                str(run.peers),
                "-m",
                "experiments.speed.first_word_asks",
                name,
                "--once",
                video,
                *model_options(run),
                *more,
            )
            commands[name] = (side, ROOT)
            continue
        ask = (sys.executable, "-m", "evoprune_cli", "ask", video, QUESTION, "-b", name, *model_options(run), *more)
        if run.args.before:
            commands[f"{name}, before"] = (ask, run.args.before.absolute())
        commands[name] = (ask, ROOT)
    done: dict[str, dict] = {}
    for round_ in range(run.args.rounds):
        for name, (command, checkout) in commands.items():
            left = until - time.monotonic()
            before = done.get(name)
            if round_ and ("error" in before or left < AGAIN * before["ended"]):
                continue
            done[name] = run_once(
                command, checkout, min(run.args.turn_s[START], left), run.folder / "logs" / "start.txt"
            )
            run.add(START, {"clip": clip.title, "asked_frames": frames, "side": name, "round": round_, **done[name]})


def run_once(command: Sequence[str], checkout: Path, seconds: float, log: Path) -> dict[str, Any]:
    """Return a process whose stdout is read as it comes: seconds from its start to the first words and the last, CPU time, memory.

    `"error"` says why there is no answer.
    """
    if seconds <= 0:
        return {"error": "not begun: no time was left"}
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with log.open("w", encoding="utf-8") as said:
        begun = time.perf_counter()
        process = subprocess.Popen(  # noqa: S603 (Python, and a module of ours)
            command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )
    late = threading.Timer(seconds, end_group, [process.pid])
    late.start()
    try:
        moments = []
        answer = b""
        while piece := os.read(process.stdout.fileno(), 65536):
            moments.append(time.perf_counter() - begun)
            answer += piece
        _, status, used = os.wait4(process.pid, 0)
    finally:
        over = not late.is_alive()
        late.cancel()
        process.stdout.close()
    process.returncode = os.waitstatus_to_exitcode(status)
    ended = time.perf_counter() - begun
    if over:
        return {"error": f"not done in {seconds:.0f} s", "over_s": seconds}
    if process.returncode or not moments:
        return {"error": f"ended with {process.returncode}: {last_line(log)}"}
    return {
        "first_word": moments[0],
        "second_word": moments[1] if len(moments) > 1 else None,
        "last_word": moments[-1],
        "ended": ended,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_bytes": used.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "answer": answer.decode(errors="replace")[:200],
        "stats": log.read_text(encoding="utf-8", errors="replace")[-4000:],
    }


MEASURES = {READING: reading, CURVE: curve, LOADED: loaded, START: start}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.speed.first_word", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a folder for all that is made")
    parser.add_argument(
        "-m", "--model", type=Path, metavar="CKPT", help="a folder with a model; default: DIR/checkpoint, 3B"
    )
    parser.add_argument(
        "--parts", metavar="LIST", help=f"of {', '.join(PARTS)}; default: all, on a GPU all but {CURVE}"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument("--dtype", default="auto", help="of both sides; auto: what evoprune chooses")
    parser.add_argument(
        "--seek", default=AUTO_SEEK, choices=SEEKS, help=f"{LOADED}, {START}: of evoprune; default: auto"
    )
    parser.add_argument("--minutes", metavar="LIST", help="of the clips, ascending; default: 10,60")
    parser.add_argument("--kinds", metavar="LIST", help=f"of {', '.join(KINDS)}; default: all, on a GPU hd")
    parser.add_argument("--budgets", default=",".join(BUDGETS), metavar="LIST", help=f"default: {','.join(BUDGETS)}")
    parser.add_argument("--sides", metavar="LIST", help="these alone: readers (separated by ;), transformers, budgets")
    parser.add_argument("--frames", type=int, help="to look at; default: what the model's rate and limits give")
    parser.add_argument("-n", "--new-tokens", type=int, default=NEW_TOKENS, help=f"default: {NEW_TOKENS}")
    parser.add_argument("-r", "--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--seconds", default="", metavar="PART=N,...", help=f"that a part may take, or {PREPARE}")
    parser.add_argument("--turn-seconds", type=float, metavar="N", help="after which one turn is ended")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help=f"{START}: another version, which takes turns")
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", help="an environment with the other readers; none is made"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install the other readers from here, without network"
    )
    parser.add_argument("--torchcodec", default=TORCHCODEC, metavar="REQUIREMENT", help=f"default: {TORCHCODEC}")
    parser.add_argument("--tiny", action="store_true", help="small clips and the demo model: does it run?")
    parser.add_argument(
        "--readme", action="store_true", help="measure nothing: write the tables into README.md and results/"
    )
    parser.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="DIR", help="--readme: runs on other machines"
    )
    args = parser.parse_args(argv)
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    if not args.minutes:
        args.minutes = "0.5,1" if args.tiny else "10,60"
    args.minutes = sorted(float(text) for text in args.minutes.split(","))
    args.budgets = args.budgets.split(",")
    if args.sides:
        args.sides = args.sides.split(";")
    if args.kinds:
        args.kinds = args.kinds.split(",")
    elif kind == "cuda":
        args.kinds = ["hd"]
    else:
        args.kinds = [*KINDS]
    if unknown := {*args.kinds} - {*KINDS}:
        parser.error(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    usual = SECONDS[kind]
    if args.tiny:
        usual = dict.fromkeys(usual, DRY_S)
    if args.parts:
        args.parts = args.parts.split(",")
    else:
        args.parts = [part for part in PARTS if part in usual]
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    limits = dict(usual)
    for text in filter(None, args.seconds.split(",")):
        name, _, number = text.partition("=")
        if name not in (PREPARE, *PARTS) or not number.replace(".", "", 1).isdigit():
            parser.error(f"--seconds {text}: a part and a number, for example reading=600")
        limits[name] = float(number)
    if missing := [part for part in args.parts if part not in limits]:
        parser.error(f"on a GPU {missing[0]} has no time unless --seconds {missing[0]}=N gives it some")
    args.seconds = limits
    args.turn_s = {part: args.turn_seconds or usual for part, usual in TURN_S[kind].items()}
    if "hd" not in args.kinds and {LOADED, START} & {*args.parts}:
        parser.error(f"{LOADED} and {START} ask about hd, which is not among --kinds")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, or writes what was measured into the documents."""
    from experiments.speed.first_word_tables import document, write_documents

    args = parsed(argv)
    if args.readme:
        folders = [args.output, *args.also]
        write_documents(
            [json.loads((folder / "first_word.json").read_text(encoding="utf-8")) for folder in folders], ROOT
        )
        return
    usual = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a side that runs is ended
    try:
        run = Run(args)
        run.part(PREPARE, prepare)
        for part in PARTS:
            if part in args.parts:
                run.part(part, MEASURES[part])
        print(document([run.record]))
    finally:
        signal.signal(signal.SIGTERM, usual)


if __name__ == "__main__":
    main()

"""Measure evoprune on one GPU in at most eight minutes, without network or checkpoint: `python -m experiments.speed.gpu -o DIR`.

    python -m experiments.speed.gpu -o DIR --parts table,first        # some parts
    python -m experiments.speed.gpu -o DIR --seconds table=300        # more time for one
    python -m experiments.speed.gpu -o DIR --dry                      # all at the size of the demo, on a CPU: does it run?

| part | what it measures |
|---|---|
| correctness | `evoprune verify --quick`: the demo in fp32, and the dimensions of the 3B model in bf16 |
| table | first token, time a token, memory: transformers (HF), the same with a varlen kernel in its tower (HF+), evoprune |
| decoding | milliseconds a token, with what speeds it up and with EVOPRUNE_PLAIN=1, beside transformers' `generate` |
| first | the first question of a process after loading, and where its time goes |
| operations | operations, launches, waits and copies of an encode; device time by kernel |

Each step runs in a process of its own within a time limit. What is known so far is in DIR after each: `gpu.json` has all figures,
`gpu.txt` tables, profiles and the output of steps that failed, and `gpu.tar.gz` both and the output of every step.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
# The seconds that a part may take, all its steps together.
SECONDS = {"correctness": 75, "table": 190, "decoding": 55, "first": 85, "operations": 65}
DRY_SECONDS = 120
SPARE = 6.0  # seconds between the last turn that a step may begin and its end
TAIL = 30  # lines of the output of a step that failed
QWEN = "Qwen/Qwen{}-Instruct"
M3, M7, Q4, Q35 = *(QWEN.format(name) for name in ("2.5-VL-3B", "2.5-VL-7B", "3-VL-4B")), "Qwen/Qwen3.5-4B"
SMALL = "8x224x336"
LONGER = "32x224x336"
MIDDLE = "32x364x644"
LARGE = "64x364x644"
LONGEST = "128x364x644"
STEP = ("-m", "experiments.speed.gpu_steps")
VERIFY = ("-m", "evoprune_cli", "verify", "--quick", "--quiet")


@dataclass(frozen=True)
class Step:
    """A process. `until`: the share of its part's seconds after which it is stopped, if it has not ended."""

    part: str
    name: str
    arguments: tuple[str, ...]
    until: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, output: Path, seconds: float) -> list[str]:
        limit = "--time-limit" if self.arguments[: len(VERIFY)] == VERIFY else "--seconds"
        return [sys.executable, *self.arguments, "-o", str(output), limit, f"{max(1.0, seconds - SPARE):.1f}"]


def steps(settings: str) -> list[Step]:
    """Return all steps in their order. `settings`: a folder with what `first` needs of the 3B model beside its weights."""
    random = ("-m", settings, "--load-format", "dummy", "--dtype", "bf16")
    plain = {"EVOPRUNE_PLAIN": "1"}
    return [
        Step("correctness", "demo", (*VERIFY, "-m", "demo", "--device", "cuda", "--dtype", "fp32"), 0.4),
        Step("correctness", "3B", (*VERIFY, *random, "--device", "cuda")),
        Step("table", "3B", _step("table", M3, SMALL, MIDDLE, LARGE, budgets=(0.25, 0.1)), 0.45),
        Step("table", "7B", _step("table", M7, LONGEST, budgets=(0.25, 0.1)), 0.7),
        Step("table", "Qwen3-VL-4B", _step("table", Q4, MIDDLE, budgets=(0.25, 0.1)), 0.8),
        Step("table", "Qwen3.5-4B", _step("table", Q35, SMALL, LONGER, MIDDLE, budgets=(0.25, 0.1))),
        Step("decoding", "3B", (*_step("decoding", M3, SMALL), "--hf"), 0.65),
        Step("decoding", "3B plain", _step("decoding", M3, SMALL), environment=plain),
        Step("first", "3B 0.25", (*STEP, "first", *random, "--tokens", "32"), 0.35),
        Step("first", "3B full", (*STEP, "first", *random, "--tokens", "32", "-b", "1"), 0.65),
        Step("first", "3B 0.25 profiled", (*STEP, "first", *random, "--tokens", "32", "--profile", "--rounds", "1")),
        Step("operations", "3B", _step("operations", M3, SMALL, LARGE)),
    ]


def _step(name: str, model: str, *cases: str, budgets: Sequence[float] = (0.25,)) -> tuple[str, ...]:
    return *STEP, name, "-m", model, "--dtype", "bf16", "--cases", *cases, "-b", *map(str, budgets)


def dry_steps() -> list[Step]:
    """Return the same at the size of the demo on a CPU, each kind once."""
    demo = ("-m", "demo", "--device", "cpu")
    small = ("--cases", "4x56x84", "--rounds", "1")
    plain = {"EVOPRUNE_PLAIN": "1"}
    return [
        Step("correctness", "demo", (*VERIFY, *demo, "--dtype", "fp32")),
        Step("table", "demo", (*STEP, "table", *demo, *small, "--cases", "4x56x84", "8x84x84", "-b", "0.25", "0.1")),
        Step("decoding", "demo", (*STEP, "decoding", *demo, *small, "--tokens", "6", "--hf"), 0.6),
        Step("decoding", "demo plain", (*STEP, "decoding", *demo, *small, "--tokens", "6"), environment=plain),
        Step("first", "demo 0.25", (*STEP, "first", *demo, *small, "--tokens", "4"), 0.3),
        Step("first", "demo full", (*STEP, "first", *demo, *small, "--tokens", "4", "-b", "1"), 0.6),
        Step("first", "demo 0.25 profiled", (*STEP, "first", *demo, *small, "--tokens", "4", "--profile")),
        Step("operations", "demo", (*STEP, "operations", *demo, *small)),
    ]


class Run:
    """The steps that ran, and their files in `folder`; `done` has a record of each."""

    def __init__(self, output: Path, folder: Path):
        self.output = output
        self.folder = folder
        self.begun = time.monotonic()
        self.done: list[dict[str, Any]] = []

    def part(self, todo: Sequence[Step], seconds: float) -> None:
        """Runs the steps of one part; what the first ones leave over is the others'."""
        begun = time.monotonic()
        for step in todo:
            left = seconds * step.until - (time.monotonic() - begun)
            print(f"{time.monotonic() - self.begun:5.0f} s  {step.part}: {step.name}", file=sys.stderr, flush=True)
            self.step(step, left)
            self.write()

    def step(self, step: Step, seconds: float) -> None:
        stem = f"{len(self.done):02}-{step.part}-{step.name}".replace(" ", "-")
        found = self.folder / f"{stem}.json"
        log = self.folder / f"{stem}.txt"
        record = {"part": step.part, "step": step.name, "state": "not begun", "seconds": 0.0, "found": {}}
        self.done.append(record)
        begun = time.monotonic()
        try:
            if seconds > SPARE:
                code = run_process(step.command(found, seconds), log, seconds, step.environment)
                record["state"] = {0: "done", None: "stopped"}.get(code, f"exit code {code}")
        finally:
            record["seconds"] = round(time.monotonic() - begun, 1)
            if found.exists():
                record["found"] = json.loads(found.read_text(encoding="utf-8"))
            if record["state"] != "done" and log.exists():
                record["output"] = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]

    def write(self) -> None:
        """Writes all that is known into the folder of the results."""
        files = {
            "gpu.json": json.dumps(self.done, indent=1),
            "gpu.txt": "\n".join([*summary(self.done), *details(self.done)]),
        }
        for name, text in files.items():
            (self.output / name).write_text(text + "\n", encoding="utf-8")
        packed = self.output / "gpu.tar.gz"
        with tarfile.open(packed.with_suffix(".writing"), "w:gz") as archive:
            for file in [*(self.output / name for name in files), *sorted(self.folder.glob("*-*.*"))]:
                archive.add(file, file.name)
        packed.with_suffix(".writing").replace(packed)


def run_process(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """Return the exit code of a process whose output goes into a file; None where it had to be stopped."""
    with log.open("w", encoding="utf-8") as out:
        print("$", *(f"{k}={v}" for k, v in environment.items()), *command, file=out, flush=True)
        process = subprocess.Popen(  # noqa: S603 (this Python)
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            for end in (signal.SIGTERM, signal.SIGKILL):  # with what it started
                if process.poll() is None:
                    os.killpg(process.pid, end)
                    try:
                        process.wait(3)
                    except subprocess.TimeoutExpired:
                        continue


# What is shown.


def lines_of(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a table; numbers to the right."""
    texts = [[*columns], *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    right = [all(not isinstance(row[n], str) for row in rows) for n in range(len(columns))]
    aligned = ([t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)] for row in texts)
    return ["  ".join(row).rstrip() for row in aligned]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def summary(done: Sequence[dict[str, Any]]) -> list[str]:
    """Return the short tables of all parts."""
    env = next((each["found"]["env"] for each in done if "env" in each["found"]), {})
    named = ("torch", "transformers", "triton", "flash_attn", "flash-linear-attention", "causal-conv1d")
    lines = [
        ", ".join([env.get("device") or env.get("device_name") or "?", *(f"{n} {env[n]}" for n in named if env.get(n))])
    ]
    for part, make in TABLES.items():
        mine = [each for each in done if each["part"] == part]
        if mine:
            states = "; ".join(f"{each['step']} {each['state']}, {each['seconds']:.0f} s" for each in mine)
            lines += ["", f"{part} ({states})", *make([each for each in mine if each["found"]])]
    return lines


def _correctness(mine: Sequence[dict]) -> list[str]:
    lines = []
    for each in mine:
        found = each["found"]
        lines.append(f"{each['step']}: {', '.join(f'{found[name]} {name}' for name in ('held', 'differs', 'skipped'))}")
        lines += [f"  {c['state']} {c['name']}: {c['says']}" for c in found["checks"] if c["state"] == "differs"]
    return lines


def _table(mine: Sequence[dict]) -> list[str]:
    columns = (
        "model",
        "case",
        "row",
        "encode",
        "pruning",
        "prefill",
        "first",
        "x HF",
        "x HF+",
        "x 1.0",
        "token",
        "GiB",
        "tokens",
    )
    names = "encode", "prune", "prefill", "first_token", "vs_hf", "vs_hf_varlen", "vs_full", "token"
    rows = []
    errors = []
    for each in mine:
        for row in each["found"].get("rows", []):
            if "error" in row:
                errors.append(f"{each['step']} {row['case']} {row['row']}: {row['error']}")
                continue
            peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
            rows.append([each["step"], row["case"], row["row"], *(row[name] for name in names), peak, row["tokens"]])
    return [*lines_of(columns, rows), *errors]


def _decoding(mine: Sequence[dict]) -> list[str]:
    rows = []
    tokens = {}
    for each in mine:
        found = each["found"]
        for name, ms in found.get("token_ms", {}).items():
            calls = found.get("calls_a_token", {}).get(name, {})
            rows.append(
                [each["step"], name, ms, found["first_turn_ms"][name], calls.get("launches"), calls.get("graphs")]
            )
            tokens.setdefault(name, []).append(found["tokens"][name])
    differ = [name for name, both in tokens.items() if any(one != both[0] for one in both)]
    lines = lines_of(("step", "row", "ms a token", "first turn", "launches", "graphs"), rows)
    return lines + [f"tokens differ between the steps: {', '.join(differ)}"] * bool(differ)


def _first(mine: Sequence[dict]) -> list[str]:
    rows = []
    for each in mine:
        seconds = each["found"]["seconds"]
        asked = each["found"]["asked"]
        for turn, one in enumerate(asked):
            times = one["time_ms"]
            title = "  again"
            before = {}
            if turn == 0:
                title = each["step"]
                before = seconds
            rows.append(
                [
                    title,
                    before.get("import"),
                    before.get("load"),
                    times["ttft_wall"],
                    *(times[n] for n in FIRST),
                    one["whole_ms"],
                ]
            )
    columns = ("question", "import s", "load s", "first token ms", *FIRST, "whole ms")
    return lines_of(columns, rows)


FIRST = "read", "encode", "encode_prune", "prefill", "generate"


def _operations(mine: Sequence[dict]) -> list[str]:
    columns = (
        "case", "row", "operations", "to first token", "value_reads", "tensor_copies", "launches", "copies_to_host", "waits",
        "device_ms",
    )  # fmt: skip
    names = [name.replace(" ", "_") for name in columns]
    return lines_of(columns, [[row[name] for name in names] for each in mine for row in each["found"].get("rows", [])])


TABLES = {
    "correctness": _correctness, "table": _table, "decoding": _decoding, "first": _first, "operations": _operations,
}  # fmt: skip


def details(done: Sequence[dict[str, Any]]) -> list[str]:
    """What does not fit into short tables: device time, where reads happen, profiles, and the output of steps that failed."""
    lines = []
    for each in done:
        title = f"== {each['part']}: {each['step']}"
        if each.get("output"):
            lines += ["", f"{title}, {each['state']}", *each["output"]]
        rows = []
        if each["part"] == "operations":
            rows = each["found"].get("rows", [])
        for row in rows:
            for what in ("by_operator", "by_kernel", "most", "read_at"):
                columns = ("name", "ms", "count") if what.startswith("by") else ("name", "count")
                lines += ["", f"{title}, {row['case']}, {row['row']}: {what}", *lines_of(columns, row[what])]
        if "profile" in each["found"]:
            lines += ["", f"{title}: where the first question goes", each["found"]["profile"]]
    return lines


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a folder for the results")
    parser.add_argument(
        "--parts", default=",".join(SECONDS), metavar="LIST", help=f"of {', '.join(SECONDS)}; default: all"
    )
    usual = ", ".join(f"{name}={seconds}" for name, seconds in SECONDS.items())
    parser.add_argument("--seconds", default="", metavar="PART=N,...", help=f"that a part may take; default: {usual}")
    parser.add_argument("--dry", action="store_true", help="everything at the size of the demo, on a CPU")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := {*args.parts} - {*SECONDS}:
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(SECONDS)}")
    limits = dict(SECONDS)
    if args.dry:
        limits = dict.fromkeys(SECONDS, DRY_SECONDS)
    for text in filter(None, args.seconds.split(",")):
        name, _, number = text.partition("=")
        if name not in limits or not number.replace(".", "", 1).isdigit():
            parser.error(f"--seconds {text}: a part and a number, for example table=300")
        limits[name] = float(number)
    args.seconds = limits
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the step that runs is ended, and its results are kept
    with TemporaryDirectory(prefix="evoprune-gpu-") as folder:
        if args.dry:
            todo = dry_steps()
        else:
            import torch

            if not torch.cuda.is_available():
                sys.exit(
                    "error: no GPU that torch can use\nhint: --dry runs everything at the size of the demo, on a CPU"
                )
            from experiments.speed.checkpoint import write_settings

            settings = Path(folder, "settings")
            settings.mkdir()
            write_settings(settings, M3)
            todo = steps(str(settings))
        run = Run(args.output, Path(folder))
        try:
            for part in SECONDS:
                if part in args.parts:
                    run.part([step for step in todo if step.part == part], args.seconds[part])
        finally:
            run.write()
            print("\n".join(summary(run.done)))


if __name__ == "__main__":
    main()

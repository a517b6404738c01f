"""Measure evoprune on one GPU. This takes at most six minutes and requires neither network access nor a checkpoint.

    python -m experiments.speed.gpu -o DIR                            # all parts
    python -m experiments.speed.gpu -o DIR --parts table,first        # some parts
    python -m experiments.speed.gpu -o DIR --seconds table=300        # more time for one part
    python -m experiments.speed.gpu -o DIR --dry                      # check that everything runs, with the demo's size on a CPU

| part | measures |
|---|---|
| table | first token, time per token and memory: transformers (HF), transformers with a varlen kernel (HF+), evoprune |
| decoding | milliseconds per token, optimized and with EVOPRUNE_PLAIN=1, compared with transformers' `generate` |
| first | the first question of a process after loading, and the same question again |

Each step runs in its own process with a time limit. Its results (JSON) and its output are written to DIR. The tables are written
after each part.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.speed.processes import last_line, limits_of, run_process
from experiments.tables import table

SECONDS = {"table": 190, "decoding": 55, "first": 85}  # combined time limit for all steps of a part, in seconds
DRY_SECONDS = 120
SPARE = 6.0  # a step starts no further turns this many seconds before its time limit
QWEN = "Qwen/Qwen{}-Instruct"
M3, M7, Q4, Q35 = *(QWEN.format(name) for name in ("2.5-VL-3B", "2.5-VL-7B", "3-VL-4B")), "Qwen/Qwen3.5-4B"
SMALL = "8x224x336"
LONGER = "32x224x336"
MIDDLE = "32x364x644"
LARGE = "64x364x644"
LONGEST = "128x364x644"
PLAIN = {"EVOPRUNE_PLAIN": "1"}


@dataclass(frozen=True)
class Step:
    """A measurement that runs in its own process, which is stopped at `until`, given as a fraction of the part's time limit."""

    part: str
    name: str
    arguments: tuple[str, ...]
    until: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)


def steps(settings: str) -> list[Step]:
    """Return the steps of all parts, in execution order.

    `settings` is a folder with the 3B model's settings but without weights, which the `first` part uses.
    """
    bf16 = ("--dtype", "bf16")
    first = ("-m", settings, "--load-format", "dummy", *bf16, "--tokens", "32")
    both = (*bf16, "-b", "0.25", "0.1", "--cases")
    one = ("-m", M3, *bf16, "--cases", SMALL)
    return [
        Step("table", "3B", ("-m", M3, *both, SMALL, MIDDLE, LARGE), 0.45),
        Step("table", "7B", ("-m", M7, *both, LONGEST), 0.7),
        Step("table", "Qwen3-VL-4B", ("-m", Q4, *both, MIDDLE), 0.8),
        Step("table", "Qwen3.5-4B", ("-m", Q35, *both, SMALL, LONGER, MIDDLE)),
        Step("decoding", "3B", (*one, "--hf"), 0.65),
        Step("decoding", "3B plain", one, environment=PLAIN),
        Step("first", "3B 0.25", first, 0.5),
        Step("first", "3B full", (*first, "-b", "1")),
    ]


def dry_steps() -> list[Step]:
    """Return small versions of the steps that run with the demo model on a CPU, to check that every part works."""
    small = ("-m", "demo", "--device", "cpu", "--rounds", "1", "--tokens", "6", "--cases", "4x56x84")
    return [
        Step("table", "demo", (*small, "8x84x84", "-b", "0.25", "0.1")),
        Step("decoding", "demo", (*small, "--hf"), 0.6),
        Step("decoding", "demo plain", small, environment=PLAIN),
        Step("first", "demo 0.25", small, 0.5),
        Step("first", "demo full", (*small, "-b", "1")),
    ]


def run_part(todo: Sequence[Step], seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Run the steps of one part, and return their records. Unused time from a step is available to the next steps."""
    begun = time.monotonic()
    done = []
    for step in todo:
        print(f"{step.part}: {step.name}", file=sys.stderr, flush=True)
        stem = f"{step.part}-{step.name}".replace(" ", "-")
        found, log = folder / f"{stem}.json", folder / f"{stem}.txt"
        found.unlink(missing_ok=True)
        left = seconds * step.until - (time.monotonic() - begun)
        own = ("-o", str(found), "--seconds", f"{max(1.0, left - SPARE):.1f}")
        command = ("-m", "experiments.speed.gpu_steps", step.part, *step.arguments, *own)
        state = run_process(command, log, left, step.environment)
        if state != "done":
            state += f": {last_line(log)}"
        record = {"part": step.part, "step": step.name, "state": state, "found": {}}
        if found.exists():
            record["found"] = json.loads(found.read_text(encoding="utf-8"))
        done.append(record)
    return done


# Output.


def cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def shown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return table(heads, [[cell(value) for value in row] for row in rows], numbers=True)


def document(done: Sequence[dict[str, Any]]) -> str:
    """Return the tables of all parts as Markdown."""
    env = next((each["found"]["env"] for each in done if each["found"]), {})
    lines = [", ".join(f"{name} {value}" for name, value in env.items() if value)]
    for part, make in TABLES.items():
        mine = [each for each in done if each["part"] == part]
        if mine:
            states = [f"- {each['step']}: {each['state']}" for each in mine]
            lines += ["", f"## {part}", "", *states, "", *make([each for each in mine if each["found"]])]
    return "\n".join(lines) + "\n"


def _table(mine: Sequence[dict]) -> list[str]:
    heads = (
        "model", "case", "row", "encode", "pruning", "prefill", "first", "x HF", "x HF+", "x 1.0", "token", "GiB", "tokens",
    )  # fmt: skip
    names = "encode", "prune", "prefill", "first_token", "vs_hf", "vs_hf_varlen", "vs_full", "token"
    rows = []
    errors = []
    for each in mine:
        for row in each["found"].get("rows", []):
            if "error" in row:
                errors.append(f"- {each['step']} {row['case']} {row['row']}: {row['error']}")
                continue
            peak = row["peak_bytes"] and row["peak_bytes"] / 2**30
            rows.append([each["step"], row["case"], row["row"], *(row[name] for name in names), peak, row["tokens"]])
    return [*shown(heads, rows), "", *errors]


def _decoding(mine: Sequence[dict]) -> list[str]:
    rows = []
    tokens = {}
    for each in mine:
        found = each["found"]
        for name, ms in found.get("token_ms", {}).items():
            rows.append([each["step"], name, ms, found["first_turn_ms"][name]])
            tokens.setdefault(name, []).append(found["tokens"][name])
    differ = [name for name, both in tokens.items() if any(one != both[0] for one in both)]
    lines = shown(("step", "row", "ms a token", "first turn"), rows)
    return lines + ["", f"Tokens differ between the steps: {', '.join(differ)}"] * bool(differ)


FIRST = "ttft_wall", "read", "encode", "encode_prune", "prefill", "generate"


def _first(mine: Sequence[dict]) -> list[str]:
    rows = []
    for each in mine:
        seconds = each["found"]["seconds"]
        for turn, one in enumerate(each["found"]["asked"]):
            begin = ["again", None, None] if turn else [each["step"], seconds["import"], seconds["load"]]
            rows.append([*begin, *(one["time_ms"][name] for name in FIRST), one["whole_ms"]])
    return shown(("question", "import s", "load s", "first token ms", *FIRST[1:], "whole ms"), rows)


TABLES = {"table": _table, "decoding": _decoding, "first": _first}


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.speed.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="a folder for the results")
    parser.add_argument("--parts", default=",".join(SECONDS), metavar="LIST", help="default: %(default)s")
    usual = ", ".join(f"{name}={seconds}" for name, seconds in SECONDS.items())
    parser.add_argument("--seconds", default="", metavar="PART=N,...", help=f"time limits of parts; default: {usual}")
    parser.add_argument("--dry", action="store_true", help="run everything at demo size, on a CPU")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    if unknown := {*args.parts} - {*SECONDS}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(SECONDS)}")
    try:
        args.seconds = limits_of(args.seconds, dict.fromkeys(SECONDS, DRY_SECONDS) if args.dry else SECONDS)
    except ValueError as problem:
        parser.error(f"--seconds: {problem}; for example table=300")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parsed(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ensures that a running step is terminated
    if args.dry:
        todo = dry_steps()
    else:
        import torch

        from experiments.speed.checkpoint import write_settings

        if not torch.cuda.is_available():
            sys.exit("error: no GPU that torch can use\nhint: --dry runs run everything at demo size, on a CPU")
        settings = args.output / "settings"
        settings.mkdir(exist_ok=True)
        write_settings(settings, M3)
        todo = steps(str(settings))
    done = []
    for part in args.parts:
        done += run_part([step for step in todo if step.part == part], args.seconds[part], args.output)
        (args.output / "gpu.md").write_text(document(done), encoding="utf-8")
    print(document(done))


if __name__ == "__main__":
    main()

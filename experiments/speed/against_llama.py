"""Compare this package in 8 bits with llama.cpp in Q8_0: the same weights, frames, prompt and threads, in turns.

    python -m experiments.speed.checkpoint CKPT
    python convert_hf_to_gguf.py CKPT --outtype q8_0 --outfile model.gguf              # of llama.cpp; and again with --mmproj
    python -m experiments.speed.against_llama CKPT model.gguf mmproj.gguf --python ENV/bin/python

ENV is an environment with llama-cpp-python. Its llama.cpp joins two frames to a frame pair, as Qwen2.5-VL does, so both have
as many visual tokens before pruning. Reading and resizing frames do not count. The first round warms up.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import torch

from evoprune.bench import clips
from evoprune.video_qa import VideoQA

SIDE = Path(__file__).with_name("against_llama_side.py")
QUESTION = "What happens in this video?"
BEFORE = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
BEHIND = f"{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


class Other:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, model: str, projector: str, threads: int):
        command = [python, str(SIDE), model, projector, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.version = json.loads(self._process.stdout.readline())["version"]

    def answer(self, frames: Path, shape: tuple[int, ...], new: int) -> dict:
        request = {"frames": str(frames), "shape": shape, "before": BEFORE, "behind": BEHIND, "new": new}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def ours(qa: VideoQA, folder: Path, new: int) -> dict:
    """Return seconds of one answer of this package about a folder of frames."""
    encoded = qa.encode(folder)
    answer = encoded.ask(QUESTION, max_new_tokens=new + 1)
    for _ in answer:
        pass
    report = answer.report
    times = report.time_ms
    tokens = report.pruning.visual_tokens_kept
    return {
        "encode": times.encode / 1000,
        "prefill": times.prefill / 1000,
        "rate": new / (times.generate / 1000),
        "visual": tokens,
        "prompt": report.tokens.prompt,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("model")
    parser.add_argument("projector")
    parser.add_argument("--python", required=True)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", default="280x420")
    parser.add_argument("-b", "--budgets", default="1.0,0.25,0.1")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=8)
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    clip = clips.synthetic_clip("motion", args.frames, height, width)
    qa = VideoQA.load(args.checkpoint, dtype="fp32", quantize="int8", threads=args.threads)
    other = Other(args.python, args.model, args.projector, args.threads)
    rows: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_frames(clip, folder / "frames")
        clip.tofile(folder / "frames.raw")
        for number in range(args.rounds + 1):
            found = {f"llama.cpp {other.version} Q8_0": other.answer(folder / "frames.raw", clip.shape, args.new)}
            for budget in map(float, args.budgets.split(",")):
                pruned = VideoQA(qa.loaded, budget=budget)
                found[f"evoprune -b {budget:g} int8"] = ours(pruned, folder / "frames", args.new)
            for row, values in found.items():
                if number:
                    rows.setdefault(row, []).append(values)
    other.close()
    show(rows)
    print(
        f"\n{args.threads} threads, PyTorch {torch.__version__}, {args.rounds} rounds after one that warms up, medians"
    )


def write_frames(clip: np.ndarray, folder: Path) -> None:
    """The frames as pictures, so that nothing is lost."""
    from PIL import Image

    folder.mkdir()
    for number, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{number:04}.png")


def show(rows: dict[str, list[dict]]) -> None:
    """Prints a table in Markdown; ratios are medians of those within a round."""
    print("| | visual tokens | prompt | encode s | prefill s | first token s | llama.cpp against it | tokens/s |")
    print("|---|---|---|---|---|---|---|---|")
    first = {name: [values["encode"] + values["prefill"] for values in made] for name, made in rows.items()}
    theirs = next(iter(first.values()))
    for name, made in rows.items():
        ratio = median(one / own for one, own in zip(theirs, first[name], strict=True))
        cells = [f"{median(values[key] for values in made):.2f}" for key in ("encode", "prefill")]
        rate = median(values["rate"] for values in made)
        print(
            f"| {name} | {made[0]['visual']} | {made[0]['prompt']} | {cells[0]} | {cells[1]} | {median(first[name]):.2f} "
            f"| {ratio:.2f}x | {rate:.2f} |"
        )


if __name__ == "__main__":
    main()

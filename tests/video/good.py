"""Measures the overhead of the worker process with 200 valid files: `python -m tests.video.good [--rounds 5]`.

The demo model is asked about each file, alternately with and without a worker process. The program prints how many files were
answered, and the overhead of the worker process, both for reading only and for the time to first token. The overhead is the median
over the files of the ratio between the times with and without the worker process.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from evoprune.video.frames import probe, read_chunks
from evoprune.video.plan import InputLimits, Plan
from evoprune.video_qa import VideoQA
from experiments.timing import medians
from tests.video.files import in_this_process, numbered_frames, write_video
from tests.video.kinds import AV1, HEVC, KINDS, OPEN_GOP, VP9, write_kind

MADE = 200 - len(KINDS)
WAYS = [
    ({}, ("mp4", "mov", "mkv", "ts", "flv", "avi")),
    (HEVC, ("mp4", "mkv", "ts")),
    (VP9, ("webm", "mkv", "mp4")),
    (AV1, ("mkv", "mp4")),
    ({"codec": "libvpx"}, ("webm", "mkv")),
    ({"codec": "mpeg4"}, ("avi", "mp4", "mkv")),
    ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, ("avi", "mov", "mkv")),
    (OPEN_GOP, ("mp4", "mkv", "ts")),
]


def some_file(folder: Path, number: int) -> Path:
    """Write a valid file whose codec, container, size, length, frame rate, rotation, start time and audio are random."""
    random = np.random.default_rng(number)
    how, endings = WAYS[number % len(WAYS)]
    ending = str(random.choice(endings))
    count, fps = int(random.integers(1, 60)), int(random.choice([5, 10, 24, 25, 30]))
    size = tuple(2 * int(n) for n in random.integers(32, 90, 2))
    how = how | {"fps": fps, "gop": int(random.choice([1, 5, 12, 250]))}
    if ending in ("mp4", "mov", "mkv"):
        how |= {"rotation": int(random.choice([0, 0, 90, 180, 270])), "start": float(random.choice([0.0, 0.0, 3.5]))}
    if ending != "webm" and random.integers(3) == 0:  # WebM does not support AAC
        how |= {"audio_s": count / fps}
    return write_video(folder / f"{number}.{ending}", numbered_frames(count, *size), **how)


def good_files(folder: Path) -> list[Path]:
    """Write one file of each kind in `KINDS`, and `MADE` random files."""
    (folder / "kinds").mkdir()
    return [write_kind(folder / "kinds", name) for name in KINDS] + [some_file(folder, i) for i in range(MADE)]


def read(path: Path) -> None:
    info = probe(path)
    for _ in read_chunks(info, Plan.of(info, InputLimits()).sampling.times_s):
        pass


def read_here(action: Callable[[Path], object], path: Path) -> None:
    with in_this_process():
        action(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds a file (default: 5)")
    rounds = parser.parse_args().rounds
    qa = VideoQA.load("demo")

    def ask(path: Path) -> list[str]:
        return list(qa.encode(path).ask("What happens?", max_new_tokens=1))

    with tempfile.TemporaryDirectory() as temporary:
        files = good_files(Path(temporary))
        print(f"{sum(map(bool, map(ask, files)))} of {len(files)} files answered\n")
        print("| | separate process | this process | ratio | worst file |")
        print("|---|---|---|---|---|")
        for what, action in {"reading": read, "path to first token": ask}.items():
            found = [medians([partial(action, path), partial(read_here, action, path)], rounds) for path in files]
            ratios = [separate / here for separate, here in found]
            separate, here = (median(times) for times in zip(*found, strict=True))
            print(
                f"| {what} | {separate:.1f} ms | {here:.1f} ms | {median(ratios):.3f} | {max(ratios):.2f} |", flush=True
            )


if __name__ == "__main__":
    main()

"""Time PyAV against decord, and a separate process against this one: `python -m experiments.speed.decoders`."""

import argparse
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

from evoprune.video.frames import probe, read_frames
from evoprune.video.info import Video
from evoprune.video.readers import decord
from evoprune.video.sandbox import isolation
from experiments.timing import medians

FPS = 25
CLIP_S = 8
LONG_SIZE = (180, 320)
CLIP_SIZE = (360, 640)
LARGE_SIZE = (1080, 1920)
FEW = 8
AT_A_TIME = 8
OTHER_FRAME = 2.0  # mean difference in levels of 255, above which two pictures are not the same frame


@dataclass(frozen=True)
class Kind:
    name: str
    ending: str
    codec: str
    gop: int  # longest distance between keyframes, in frames
    options: dict[str, str]


QUIET = {"preset": "ultrafast", "x265-params": "log-level=none"}
KINDS = (
    Kind("H.264, keyframe every 0.5 s", "mp4", "libx264", 12, {"preset": "veryfast"}),
    Kind("H.264, keyframe every 10 s", "mp4", "libx264", 250, {"preset": "veryfast"}),
    Kind("HEVC, keyframe every 0.5 s", "mp4", "libx265", 12, QUIET),
    Kind("HEVC, keyframe every 10 s", "mp4", "libx265", 250, QUIET),
    Kind("VP9, keyframe every 0.5 s", "webm", "libvpx-vp9", 12, {"deadline": "realtime", "cpu-used": "8"}),
    Kind("VP9, keyframe every 10 s", "webm", "libvpx-vp9", 250, {"deadline": "realtime", "cpu-used": "8"}),
    Kind("MPEG-4, keyframe every 0.5 s", "mp4", "mpeg4", 12, {}),
)


def moving_pictures(count: int, height: int, width: int) -> Iterator[np.ndarray]:
    """uint8 `[height, width, 3]`: a grainy picture that slides, so that no two neighbours are alike."""
    grain = np.random.default_rng(0).integers(0, 40, (height, width, 3))
    slope = np.linspace(0, 200, width)[None, :, None] * [1.0, 0.5, 0.8]
    picture = (grain + slope).astype(np.uint8)
    for i in range(count):
        yield np.roll(picture, (i, 3 * i), axis=(0, 1))


def write_clip(path: Path, kind: Kind, seconds: float, size: tuple[int, int]) -> None:
    """Encode `moving_pictures` into a file."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(kind.codec, rate=FPS, options=kind.options)
        (stream.height, stream.width), stream.pix_fmt, stream.gop_size = size, "yuv420p", kind.gop
        for i, rgb in enumerate(moving_pictures(round(seconds * FPS), *size)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, FPS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def middles(info: Video, count: int) -> list[float]:
    """`count` times in seconds, spread evenly over the video."""
    return [(i + 0.5) * info.duration_s / count for i in range(count)]


def frames_at(info: Video, times_s: Sequence[float], decoder: str) -> np.ndarray:
    """uint8 `[n, H, W, 3]`"""
    return np.concatenate([chunk.pixels for chunk in read_frames(info, times_s, decoder=decoder)])


def get_batch(info: Video, times_s: Sequence[float]) -> np.ndarray:
    """uint8 `[n, H, W, 3]`: decord's own way, which jumps and may return wrong frames."""
    reader = decord.load().VideoReader(info.path)
    return reader.get_batch([int(time_s * FPS + 0.01) for time_s in times_s]).asnumpy()


@contextmanager
def in_this_process() -> Iterator[None]:
    """Videos are read in this process, not in one of their own."""
    usual = isolation.POSSIBLE
    isolation.POSSIBLE = False
    try:
        yield
    finally:
        isolation.POSSIBLE = usual


def frames_here(info: Video, times_s: Sequence[float], decoder: str) -> np.ndarray:
    """uint8 `[n, H, W, 3]`"""
    with in_this_process():
        return frames_at(info, times_s, decoder)


def compare_decoders(folder: Path, repeat: int) -> None:
    """Print a row for each kind of file, for few and for many frames of it."""
    print(f"Milliseconds from path to RGB; {CLIP_S} s of {CLIP_SIZE[1]}x{CLIP_SIZE[0]} at {FPS} fps\n")
    print("| file | frames | pyav | decord | decord / pyav | decord.get_batch | of its frames wrong |")
    print("|---|---|---|---|---|---|---|")
    for number, kind in enumerate(KINDS):
        path = folder / f"{number}.{kind.ending}"
        write_clip(path, kind, CLIP_S, CLIP_SIZE)
        info = probe(path)
        for count in (FEW, CLIP_S * FPS // 2):
            times_s = middles(info, count)
            runs = [partial(frames_here, info, times_s, name) for name in ("pyav", "decord")]
            ours, theirs, batch = medians([*runs, partial(get_batch, info, times_s)], repeat)
            difference = np.abs(get_batch(info, times_s).astype(np.int16) - frames_at(info, times_s, "pyav"))
            wrong = int((difference.mean((1, 2, 3)) > OTHER_FRAME).sum())
            print(
                f"| {kind.name} | {count} of {CLIP_S * FPS} | {ours:.0f} | {theirs:.0f} | {theirs / ours:.2f} "
                f"| {batch:.0f} | {wrong} |",
                flush=True,
            )


def pass_through(info: Video, times_s: Sequence[float], here: bool) -> None:
    """Read as the encoder does, so many frames at a time, and hold none."""
    with in_this_process() if here else nullcontext():
        for _ in read_frames(info, times_s, chunk_bytes=AT_A_TIME * info.width * info.height * 3):
            pass


def compare_processes(folder: Path, repeat: int) -> None:
    """Print for each kind of file what reading it in a separate process costs against reading it in this one."""
    print(f"\nMilliseconds with PyAV; {CLIP_S} s at {FPS} fps, {AT_A_TIME} frames at a time\n")
    print("| file | size | frames | this process | separate process | ratio |")
    print("|---|---|---|---|---|---|")
    large = folder / f"large.{KINDS[1].ending}"
    write_clip(large, KINDS[1], CLIP_S, LARGE_SIZE)
    files = [(kind, folder / f"{number}.{kind.ending}") for number, kind in enumerate(KINDS)]
    for kind, path in [*files, (KINDS[1], large)]:
        info = probe(path)
        for count in (FEW, CLIP_S * FPS // 2):
            times_s = middles(info, count)
            here, separate = medians([partial(pass_through, info, times_s, here) for here in (True, False)], repeat)
            print(
                f"| {kind.name} | {info.width}x{info.height} | {count} of {CLIP_S * FPS} | {here:.0f} | {separate:.0f} "
                f"| {separate / here:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="measured rounds; their median is shown (default: 3)")
    args = parser.parse_args()
    print(f"PyAV {av.__version__}, {os.cpu_count()} processors\n")
    with tempfile.TemporaryDirectory() as folder:
        compare_decoders(Path(folder), args.repeat)
        if isolation.POSSIBLE:
            compare_processes(Path(folder), args.repeat)


if __name__ == "__main__":
    main()

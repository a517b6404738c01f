"""Read frames for `experiments.speed.first_word` with each reader, following the reader's documentation or its use in transformers.

`python -m experiments.speed.first_word_readers NAME` starts a process that reads frames with the given reader on request (see
`serve`). All readers except evoprune's are installed in a separate environment, which `make_environment` layers on top of the
current one.
"""

import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.speed.first_word_clips import KINDS, number_of
from experiments.speed.processes import serve

# How many seconds before a requested time `pyav_seeking` seeks to, one attempt after another.
EARLIER_S = (0.0, 1.0, 4.0, 16.0)
TOLERANCE_S = 1e-6
BLOCK = 16  # number of frames per call, for readers that return all requested frames at once
OURS = EXACT, KEYFRAMES = "evoprune", "evoprune, keyframes"
# Later versions of torchcodec require CUDA libraries.
PACKAGES = ("torchcodec==0.13.0", "decord==0.6.0", "opencv-python-headless")

Frames = Iterator[np.ndarray]  # RGB frames, uint8 [height, width, 3], in the order of the requested times


def evoprune(path: str, times_s: Sequence[float], part_s: float, seek: str = "exact") -> Frames:
    """Read frames with evoprune. `part_s` is the interval between the requested times.

    If `seek` is "keyframes", a frame may be off by half of this interval.
    """
    from evoprune.video import probe, read_chunks

    for chunk in read_chunks(probe(path), times_s, seek=seek, part_s=part_s):
        yield from chunk.pixels


def keyframes(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    return evoprune(path, times_s, part_s, "keyframes")


def torchcodec(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Read frames with torchcodec, opening the file as transformers does. Timestamps include the stream's start time."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode="exact", num_ffmpeg_threads=0, dimension_order="NHWC")
    begin = decoder.metadata.begin_stream_seconds or 0.0
    for block in blocks(times_s):
        yield from decoder.get_frames_played_at([begin + time_s for time_s in block]).data.numpy()


def decord(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Read frames with decord as transformers does, by index computed from the average frame rate."""
    from decord import VideoReader, cpu

    reader = VideoReader(path, ctx=cpu(0))
    for block in blocks(times_s):
        yield from reader.get_batch([index_of(t, reader.get_avg_fps(), len(reader)) for t in block]).asnumpy()


def opencv_seeking(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Read frames with OpenCV, seeking to each frame's index. Raises OSError if OpenCV does not find a frame there."""
    import cv2

    video = cv2.VideoCapture(path)
    rate = video.get(cv2.CAP_PROP_FPS)
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    for time_s in times_s:
        video.set(cv2.CAP_PROP_POS_FRAMES, index_of(time_s, rate, count))
        found, frame = video.read()
        if not found:
            raise OSError("OpenCV found no frame")
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def pyav_seeking(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Read frames with PyAV. Seeks to each time, and then decodes with FFmpeg's threads up to the frame on screen at that time.

    If a seek lands after the requested time, which happens in files without an index, the next attempt seeks to an earlier time.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        begin = float((stream.start_time or 0) * stream.time_base)
        for time_s in times_s:
            until = begin + time_s + TOLERANCE_S
            for earlier_s in EARLIER_S:
                container.seek(int(max(0.0, begin + time_s - earlier_s) / stream.time_base), stream=stream)
                shown = None
                for frame in takewhile(lambda frame, until=until: frame.time <= until, container.decode(stream)):
                    shown = frame
                if shown is not None:
                    yield shown.to_ndarray(format="rgb24")
                    break


def blocks(times_s: Sequence[float]) -> Iterator[Sequence[float]]:
    """Split the times into blocks of at most `BLOCK`."""
    return (times_s[first : first + BLOCK] for first in range(0, len(times_s), BLOCK))


def index_of(time_s: float, rate: float, count: int) -> int:
    """Return the index of the frame at a given time, computed from the average frame rate."""
    return max(0, min(count - 1, int(time_s * rate + 0.01)))


READERS: dict[str, Callable[[str, Sequence[float], float], Frames]] = {
    EXACT: evoprune,
    KEYFRAMES: keyframes,
    "torchcodec": torchcodec,
    "decord": decord,
    "OpenCV, seeking": opencv_seeking,
    "PyAV, seeking": pyav_seeking,
}


def read(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Read frames from a clip, and report how long this took and whether the reader returned the right frames.

    Args:
        name: A key in `READERS`.
        request: A dict with "path", "kind", "times_s" (in ascending order), and "part_s".

    Returns:
        A dict with the time in "seconds", the number of "frames", and their "size". "others" counts frames that are not on screen
        at the requested times, and "moved_s" is the largest distance of such a frame, in seconds. If the reader returned the wrong
        number of frames, the dict contains only an "error".
    """
    kind = KINDS[request["kind"]]
    times_s = request["times_s"]
    numbers = []
    begun = time.perf_counter()
    for frame in READERS[name](request["path"], times_s, request["part_s"]):
        numbers.append(number_of(frame))
    seconds = time.perf_counter() - begun
    if len(numbers) != len(times_s):
        return {"error": f"{len(numbers)} frames of {len(times_s)}"}
    moved = [distance(kind, number, kind.number_at(time_s)) for number, time_s in zip(numbers, times_s, strict=True)]
    return {
        "seconds": round(seconds, 4),
        "frames": len(numbers),
        "size": [*frame.shape[:2]],
        "others": sum(number != kind.number_at(time_s) for number, time_s in zip(numbers, times_s, strict=True)),
        "moved_s": round(max(moved), 3),
    }


def distance(kind, number: int, other: int) -> float:
    """Return the seconds between two frames in a repeating piece, or half the piece's length if `number` is invalid."""
    shown = kind.times_s
    if not 0 <= number < len(shown):
        return kind.piece_s / 2
    apart = abs(shown[number] - shown[other])
    return min(apart, kind.piece_s - apart)


def make_environment(folder: Path, wheels: Path | None = None) -> Path:
    """Create an environment that adds the other readers to the current environment's packages, and return its Python.

    Packages are installed one at a time and without dependencies, so that a failed installation does not affect the other packages.

    Args:
        folder: The folder in which to create the environment. If it exists, it is reused.
        wheels: A folder of wheels for installing without network access, or None to use the package index.
    """
    python = folder / "bin" / "python"
    if not folder.exists():
        venv.create(folder, with_pip=True)
        packages = next(folder.glob("lib/*/site-packages"))
        (packages / "running.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
        source = ["--no-index", "--find-links", str(wheels)] if wheels else []
        for package in PACKAGES:
            subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *source, package], check=False)  # noqa: S603
    return python


def main() -> None:
    (name,) = sys.argv[1:]
    serve(lambda: lambda request: read(name, request))


if __name__ == "__main__":
    main()

"""Read for `experiments.speed.first_word` with each reader, as its own documents or transformers use it.

`python -m experiments.speed.first_word_readers NAME` is a process that reads with one of them, as often as asked (`turns.serve`).
The other readers are in an environment of their own, which `make_environment` puts on top of the running one.
"""

import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from experiments.speed.first_word_clips import KINDS, number_of
from experiments.speed.turns import serve

EARLIER_S = (0.0, 1.0, 4.0, 16.0)  # jumps of `pyav_seeking`
TOLERANCE_S = 1e-6
BLOCK = 16  # frames that are asked for at a time, where a reader gives all that it was asked for at once
OURS = EXACT, KEYFRAMES = "evoprune", "evoprune, keyframes"
TORCHCODEC = "torchcodec==0.13.0"  # later versions want libraries of CUDA
PACKAGES = ("decord==0.6.0", "opencv-python-headless")

Frames = Iterator[np.ndarray]  # uint8 [height, width, 3], RGB, in the order of the times


def evoprune(path: str, times_s: Sequence[float], part_s: float, seek: str = "exact") -> Frames:
    """`part_s`: the distance between the times; with `seek="keyframes"` a frame may be half as far from its time."""
    from evoprune.video.frames import probe, read_frames

    for chunk in read_frames(probe(path), times_s, seek=seek, part_s=part_s):
        yield from chunk.pixels


def keyframes(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    return evoprune(path, times_s, part_s, "keyframes")


def torchcodec(path: str, times_s: Sequence[float], part_s: float, mode: str = "exact") -> Frames:
    """As transformers opens it. Its times count from where the stream begins."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=0, dimension_order="NHWC")
    begin = decoder.metadata.begin_stream_seconds or 0.0
    for block in blocks(times_s):
        yield from decoder.get_frames_played_at([begin + time_s for time_s in block]).data.numpy()


def torchcodec_approximate(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Without a pass over the file's packets: it trusts the file's header."""
    return torchcodec(path, times_s, part_s, "approximate")


def decord(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """As transformers opens it: frames by their index, at the average rate."""
    from decord import VideoReader, cpu

    reader = VideoReader(path, ctx=cpu(0))
    for block in blocks(times_s):
        yield from reader.get_batch([index_of(t, reader.get_avg_fps(), len(reader)) for t in block]).asnumpy()


def opencv_seeking(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    import cv2

    video = opened(path)
    rate = video.get(cv2.CAP_PROP_FPS)
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    for time_s in times_s:
        video.set(cv2.CAP_PROP_POS_FRAMES, index_of(time_s, rate, count))
        yield in_rgb(*video.read())


def opencv_one_pass(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """As vLLM does: every frame is decoded, until the last that is wanted."""
    import cv2

    video = opened(path)
    rate = video.get(cv2.CAP_PROP_FPS)
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    at = -1
    for time_s in times_s:
        wanted = index_of(time_s, rate, count)
        while at < wanted and video.grab():
            at += 1
        yield in_rgb(*video.retrieve())


def opened(path: str):
    """Return an open file of OpenCV. Raises OSError."""
    import cv2

    video = cv2.VideoCapture(path)
    if not video.isOpened():
        raise OSError("OpenCV cannot open the file")
    return video


def in_rgb(found: bool, frame: np.ndarray) -> np.ndarray:
    """Return a frame of OpenCV. Raises OSError: there was none."""
    import cv2

    if not found:
        raise OSError("OpenCV found no frame")
    return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def pyav_seeking(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    """Jumps before each time, and decodes with FFmpeg's threads until the frame that is on screen then.

    Where a jump lands behind its time, as in files without an index, the next one begins earlier.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        begin = float((stream.start_time or 0) * stream.time_base)
        for time_s in times_s:
            for earlier_s in EARLIER_S:
                container.seek(int(max(0.0, begin + time_s - earlier_s) / stream.time_base), stream=stream)
                decoded = container.decode(stream)
                first = next(decoded, None)
                if first is not None and first.time - begin <= time_s + TOLERANCE_S:
                    yield from on_screen(chain([first], decoded), [time_s], begin)
                    break


def pyav_one_pass(path: str, times_s: Sequence[float], part_s: float) -> Frames:
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        begin = float((stream.start_time or 0) * stream.time_base)
        yield from on_screen(container.decode(stream), times_s, begin)


def on_screen(decoded, times_s: Sequence[float], begin: float) -> Frames:
    """Of frames in the order of their times those that are on screen at times that ascend."""
    shown = None
    left = [*times_s]
    for frame in decoded:
        while left and shown is not None and frame.time - begin > left[0] + TOLERANCE_S:
            yield shown.to_ndarray(format="rgb24")
            left.pop(0)
        if not left:
            return
        shown = frame
    for _ in left:
        yield shown.to_ndarray(format="rgb24")


def blocks(times_s: Sequence[float]) -> Iterator[Sequence[float]]:
    """Return the times, so many at once."""
    return (times_s[first : first + BLOCK] for first in range(0, len(times_s), BLOCK))


def index_of(time_s: float, rate: float, count: int) -> int:
    """Return the number of a frame by the average rate."""
    return max(0, min(count - 1, int(time_s * rate + 0.01)))


READERS: dict[str, Callable[[str, Sequence[float], float], Frames]] = {
    EXACT: evoprune,
    KEYFRAMES: keyframes,
    "torchcodec": torchcodec,
    "torchcodec, approximate": torchcodec_approximate,
    "decord": decord,
    "OpenCV, seeking": opencv_seeking,
    "OpenCV, one pass": opencv_one_pass,
    "PyAV, seeking": pyav_seeking,
    "PyAV, one pass": pyav_one_pass,
}
PEERS = tuple(name for name in READERS if name not in OURS)


def read(name: str, request: dict[str, Any]) -> dict[str, Any]:
    """Reads the frames at some times of a clip: how long it takes, and which frames they are.

    `request`: "path", "kind", "times_s" (ascending) and "part_s". Of the frames "others" are not those on screen at their times,
    and "moved_s" says how far the farthest is from there.
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
    """Return seconds between two frames of a piece, which is repeated. A number that no frame has is as far as can be."""
    shown = kind.times_s
    if not 0 <= number < len(shown):
        return kind.piece_s / 2
    apart = abs(shown[number] - shown[other])
    return min(apart, kind.piece_s - apart)


def make_environment(folder: Path, torchcodec: str = TORCHCODEC, wheels: Path | None = None) -> Path:
    """Makes an environment with the other readers and all packages of the running one; its Python.

    Packages are installed one by one, and without what they depend on: a reader that is missing fails alone. `wheels`: a folder to
    install from, where there is no network.
    """
    import subprocess

    from experiments.environments.__main__ import run

    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if (folder / "made").exists():
        return python
    run(sys.executable, ["-m", "venv", str(folder)])
    asked = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()  # noqa: S603
    below = sysconfig.get_path("purelib")
    Path(packages, "running.pth").write_text(f"import site; site.addsitedir({below!r})\n", encoding="utf-8")
    source = ["--no-index", "--find-links", str(wheels)] if wheels else []
    for package in (torchcodec, *PACKAGES):
        run(python, ["-m", "pip", "install", "-q", "--no-deps", *source, package], check=False)
    (folder / "made").touch()
    return python


def main() -> None:
    (name,) = sys.argv[1:]
    serve(lambda: lambda request: read(name, request))


if __name__ == "__main__":
    main()

"""The entry to the sandbox: runs a task, or streams frames, in a worker process, which reads one video at a time.

If it crashes or takes too much memory, the request is repeated once in a new process, because an earlier video may have caused it;
the second time it is the video's fault. A process that hangs is ended, and the request is not repeated.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from evoprune.video.info import Video
from evoprune.video.sandbox import pool
from evoprune.video.sandbox.memory import FrameMemory
from evoprune.video.sandbox.process import Crash

if TYPE_CHECKING:
    import numpy as np

# Elsewhere everything runs in this process, and FFmpeg is trusted. The executable of a frozen program is no Python.
POSSIBLE = sys.platform == "linux" and bool(sys.executable) and not hasattr(sys, "frozen")

# uint8 [n, H, W, 3], the time of each frame in seconds, and the number of damaged packets met on the way.
FilledArray = tuple["np.ndarray", list[float], int]


def warm_up() -> None:
    """Start a process for the first video, without waiting for it. Imports little."""
    if POSSIBLE:
        pool.start_idle()


def run_task(task: str, path: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    """The result of one of `tasks.TASKS` as plain data. `path` is the video's, for messages.

    Raises:
        VideoError: the process crashed or took too much memory, twice, or made no progress for `process.SILENCE_S`.
        OutOfMemory: no process can be started, or the system ended it because memory ran out.
        What the task raises.
    """
    if not POSSIBLE:
        from evoprune.video.sandbox.tasks import run

        return run(task, arguments)
    try:
        return _run_once(task, path, arguments)
    except Crash:
        return _run_once(task, path, arguments)


def _run_once(task: str, path: str, arguments: dict[str, Any]) -> dict[str, Any] | None:
    with pool.borrow(path) as worker:
        worker.send(worker.request(task, arguments))
        return worker.answer()


def stream_frames(info: Video, times_s: Sequence[float], decoder: str, sizes: Sequence[int]) -> Iterator[FilledArray]:
    """The frames on screen at given times, as `frames.read_frames`, in arrays; raises what `run_task` raises.

    The worker fills one array while the caller uses the one before it, in memory that both processes share. `sizes` are the frames
    of each array, of which there is at least one; their sum is the number of times.
    """
    stream, done = _stream_once if POSSIBLE else _stream_here, 0
    try:
        with closing(stream(info, times_s, decoder, sizes)) as arrays:
            for filled in arrays:
                done += 1
                yield filled
    except Crash:
        yield from stream(info, times_s[sum(sizes[:done]) :], decoder, sizes[done:])


def _stream_here(info: Video, times_s: Sequence[float], decoder: str, sizes: Sequence[int]) -> Iterator[FilledArray]:
    """The same without a worker process."""
    import numpy as np

    from evoprune.video.sandbox.tasks import FrameReader

    with closing(FrameReader(info, times_s, decoder)) as reader:
        for size in sizes:
            frames = np.empty((size, info.height, info.width, 3), np.uint8)
            yield frames, *reader.fill(frames)


def _stream_once(info: Video, times_s: Sequence[float], decoder: str, sizes: Sequence[int]) -> Iterator[FilledArray]:
    shapes = [(size, info.height, info.width, 3) for size in sizes]
    memory = FrameMemory(max(map(prod, shapes)))
    with pool.borrow(info.path) as worker:
        begin = worker.request("frames", {"info": asdict(info), "times_s": list(times_s), "decoder": decoder})
        # One message opens the video and asks for its first array: a round trip costs as much as a small picture.
        coming = worker.ask_to_fill(memory, shapes[0], begin | {"last": len(shapes) == 1})
        for number, shape in enumerate(shapes[1:], 2):
            filled = coming, *worker.answer()
            del coming  # so that only the caller holds the array, and its memory can be reused once the caller drops it
            coming = worker.ask_to_fill(memory, shape, {"last": number == len(shapes)})
            yield filled
            del filled
        filled = coming, *worker.answer()
        del coming
    yield filled

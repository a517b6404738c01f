"""Reads a video's metadata (`probe`, `scan`), subtitles (`read_subtitles`), and frames (`read_chunks`).

Frames are decoded to RGB at full size and yielded in chunks of bounded size, so the cost depends on the number of requested frames
rather than on the file size. To read from standard input or a URL, save it to a temporary file with `local_file` first.
"""

import math
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from evoprune.errors import UsageError, VideoError
from evoprune.util import is_url
from evoprune.video.info import (
    FOLDER_FPS,
    MAX_TIMES,
    Decoder,
    FrameTimes,
    ScanResult,
    Subtitles,
    Video,
    check_seek,
    is_held,
)
from evoprune.video.reader_table import reader_of
from evoprune.video.sandbox.isolation import run_task, stream_frames

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from evoprune.video.held import HeldVideo

DECODERS = get_args(Decoder)
STDIN = "-"
OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/")  # paths that refer to files that this process has open
CHUNK_BYTES = 2**20  # chunk size for copying standard input


def probe(path: "str | os.PathLike[str] | HeldVideo", *, folder_fps: float = FOLDER_FPS) -> Video:
    """Read the metadata of a video file, a still image, or a folder of images treated as a video.

    To keep this fast, only the first frame is decoded, and the duration is measured from the packets of the last few seconds. If
    FFmpeg cannot seek to the end of the file, all packets are read instead, but still without decoding them.

    Args:
        path: Path of the input. It is never interpreted as a URL or a file name pattern, and playlists are not followed. A
            `HeldVideo` is returned unchanged.
        folder_fps: Frame rate for a folder of images, in images per second of video.

    Raises:
        UsageError: `folder_fps` is not positive.
        VideoError: The file does not exist, is not a video, has no video stream, or has no decodable frames; or the folder contains
            no images. See also `isolation.run_task`.
    """
    if is_held(path):
        return path
    return Video(**_run("probe", path, folder_fps=folder_fps))


def scan(
    path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS, on_frames: Callable[[int], None] | None = None
) -> ScanResult:
    """Decode an entire video to find damage, measure its actual length, and determine the spacing of its frames and keyframes.

    Memory usage does not grow with the video length, because only a few frames and a histogram of frame intervals are kept.

    Args:
        path, folder_fps: See `probe`.
        on_frames: Called about once a second with the number of frames decoded so far.

    Raises:
        UsageError, VideoError: See `probe`. VideoError is also raised for still images, which cannot be scanned.
    """
    return ScanResult(**_run("scan", path, on_frames, folder_fps=folder_fps))


def frame_times(info: Video) -> FrameTimes:
    """Return the display time of every frame in a video file, for callers that address frames by number.

    The times are taken from the packets if these contain display times, as they usually do in MP4, MOV, Matroska, WebM, and
    MPEG-TS. Otherwise, the entire video has to be decoded. Raises the same errors as `probe`.
    """
    return FrameTimes(**run_task("frame_times", info.path, {"info": asdict(info)}))


def read_subtitles(info: Video, choice: str, start_s: float = 0.0, end_s: float = 1e9) -> Subtitles:
    """Return the subtitles that overlap a span of a video.

    Args:
        choice: Path of a subtitle file (SRT, WebVTT, ASS, or SSA) or of a video with a text track. "auto" uses the subtitle file
            next to the video, if any; otherwise, the video's default text track; and otherwise, its only text track. "none" returns
            no subtitles. Still images never have subtitles, so this argument is ignored for them.
        start_s, end_s: Start and end of the span, in seconds from the first frame.

    Raises:
        VideoError: The file does not exist, has no subtitles, has only image subtitles, or has an unknown encoding. See also
            `isolation.run_task`.
    """
    if choice == "none":
        return Subtitles()
    if info.is_picture:
        return Subtitles(note=f"{info.path} is an image")
    path = info.path
    if not info.is_file:
        if choice == "auto":
            return Subtitles(note="an array of frames has no file")
        path = choice
    elif choice != "auto" and os.path.isabs(path):
        # The reading process enters the current folder only if the video's path is relative.
        with suppress(FileNotFoundError):  # the current folder no longer exists
            choice = os.path.abspath(choice)
    values = _run("subtitles", path, origin_s=info.start_s, choice=choice, start_s=start_s, end_s=end_s)
    return Subtitles(**values | {"lines": [tuple(line) for line in values["lines"]]})


def _run(
    task: str, path: str | os.PathLike[str], on_frames: Callable[[int], None] | None = None, **arguments
) -> dict[str, Any]:
    return run_task(task, os.fspath(path), {"path": os.fspath(path), **arguments}, on_frames)


@dataclass(frozen=True)
class FrameChunk:
    """A chunk of frames for consecutive requested times."""

    first: int  # index of the first frame's requested time
    # uint8 `[n, H, W, 3]`, RGB with the video's rotation applied, C-contiguous; or the same frames resized and cut into patches,
    # uint8 `[rows, values]`, on the device that computed them
    pixels: "np.ndarray | Tensor"
    times_s: tuple[float, ...]  # actual frame timestamps from the first frame; may be earlier than the requested times
    damaged: int = 0  # number of damaged packets (or images, in a folder) found since the previous chunk
    other_size: bool = False  # whether any frame differed in size from the video and was scaled
    moved: bool = False  # whether any frame is a nearby keyframe instead of the frame on screen

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    @property
    def end(self) -> int:
        """Index of the first requested time after this chunk, or the number of requested times if this is the last chunk."""
        return self.first + len(self.times_s)


def read_chunks(
    info: Video,
    times_s: Sequence[float],
    *,
    decoder: str = "auto",
    chunk_bytes: int = 8 * 2**20,
    seek: str = "exact",
    part_s: float = 0.0,
    cores: int | None = None,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[FrameChunk]:
    """Yield the frame on screen at each requested time, in chunks.

    Times before the start of the video yield the first frame, and times after its end yield the last frame. All frames have the
    size given in `info`; if a frame was stored at a different size, it is scaled, with black borders if its aspect ratio differs.
    Damaged packets are skipped, so the preceding frame stays on screen. (decord does not report damage, but either stops or
    silently conceals it.) To stop early, close the iterator.

    Args:
        times_s: Timestamps in seconds from the video's first frame, in ascending order. Duplicates are allowed.
        decoder: See `choose_decoder`.
        chunk_bytes: Maximum chunk size in bytes. Each chunk contains at least two frames, even if they exceed this size. Every
            chunk except the last contains an even number of frames, so that frame pairs are never split.
        seek: "exact" reads the frame on screen. "keyframes" reads the nearest keyframe instead if there is one within half of
            `part_s`, because a keyframe can be decoded without any other frames. A keyframe on the boundary between two parts
            belongs to the later part. "auto" uses keyframes only if that saves a lot of time (see readers/pyav.py); this decision
            depends only on the file and the times. Only PyAV supports "keyframes" and "auto".
        part_s: Length of a part in seconds, if the times are the midpoints of equal parts of the video.
        cores: Number of CPU cores to use, or None for all cores available to this process. It does not affect the decoded frames.
        on_frames: Called about once a second, from the thread that iterates, with a lower bound on the number of frames read so
            far.

    Raises:
        UsageError: `checked_times` rejected the times, `seek` is unknown, or `choose_decoder` raised UsageError.
        VideoError: `choose_decoder` raised VideoError; or, during iteration, the file becomes unreadable or no frame can be
            decoded. See also `isolation.run_task`.
    """
    times = checked_times(times_s)
    check_seek(seek)
    decoder = choose_decoder(decoder, info)
    per_chunk = info.frames_at_once(chunk_bytes)
    if is_held(info):
        return _held_chunks(info, times, per_chunk)
    firsts = range(0, len(times), per_chunk)
    sizes = [min(per_chunk, len(times) - first) for first in firsts]
    how = {"decoder": decoder, "seek": seek, "part_s": part_s, "cores": cores}
    filled = stream_frames(info, times, sizes, how, on_frames) if sizes else ()
    return (
        FrameChunk(first, frames, **facts | {"times_s": tuple(facts["times_s"])})
        for first, (frames, facts) in zip(firsts, filled, strict=True)
    )


def checked_times(times_s: Iterable[float]) -> tuple[float, ...]:
    """Return the times of the frames to read as floats.

    Raises:
        UsageError: The times are not finite, not in ascending order, or more than `MAX_TIMES`.
    """
    times = tuple(float(time) for time in islice(times_s, MAX_TIMES + 1))
    if len(times) > MAX_TIMES:
        raise UsageError(f"more than {MAX_TIMES:,} frames are requested at once", "read them in several parts")
    if not all(map(math.isfinite, times)) or any(later < earlier for earlier, later in pairwise(times)):
        raise UsageError(
            "frame times must be finite numbers in ascending order", "sort them, and leave out nan and inf"
        )
    return times


def _held_chunks(info: "HeldVideo", times: Sequence[float], per_chunk: int) -> Iterator[FrameChunk]:
    for first in range(0, len(times), per_chunk):
        frames, own_s = info.on_screen(times[first : first + per_chunk])
        yield FrameChunk(first, frames, own_s)


def choose_decoder(decoder: str, info: Video | None = None) -> str:
    """Return the decoder to use (`decord`, `none`, or the `decoder` of an entry in `READERS`) after checking that it works.

    Still images are always read with `pillow`. Arrays need no decoder (`none`). For all other inputs, `auto` means the decoder of
    the input's reader, which for video files is PyAV. Note that decord decodes every frame up to the last requested one (see
    readers/decord.py), does not support AV1, and gives up on damaged files.

    Raises:
        UsageError: The decoder is unknown, or decord is requested but not installed.
        VideoError: decord is requested, but it is known to fail on this kind of video.
    """
    if is_held(info):
        return "none"
    if info is not None and info.is_picture:
        return reader_of(info).decoder
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}", f"choose one of {', '.join(DECODERS)}")
    if decoder != "decord":
        return "pyav" if info is None else reader_of(info).decoder
    if info is None:
        run_task("check_decord", "", {"info": None})
    else:
        run_task("check_decord", info.path, {"info": asdict(info)})
    return "decord"


@contextmanager
def local_file(
    source: str,
    stdin: BinaryIO | None = None,
    *,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[str]:
    """Yield a local path for an input, which may be a path, a URL, or standard input.

    For `-`, standard input is copied to a temporary file, because readers need to seek. For an http or https URL, the file is
    downloaded. A path such as `/dev/stdin` refers to a file that is open in this process, so it is resolved to the file's real
    path, which the decoder process can open. All other paths are yielded unchanged.

    Args:
        source: A path, a URL, or `-` for standard input. To read a file named `-`, pass `./-`.
        stdin: The file to read as standard input. Defaults to `sys.stdin.buffer`.
        offline, progress: See `download.downloaded`.

    Raises:
        UsageError: Standard input is a terminal, or `downloaded` raised UsageError.
        VideoError: Standard input is closed, is empty, is a device, or cannot be stored; `source` is a pipe; or `downloaded` raised
            VideoError.
    """
    if is_url(source):
        from evoprune.video.download import downloaded

        with downloaded(source, offline=offline, progress=progress) as path:
            yield path
        return
    hint = "pipe a video into it, e.g. evoprune ask - QUESTION < video.mp4"
    if source.startswith(OPEN_FILES):
        resolved = os.path.realpath(source)
        if os.path.exists(source) and not os.path.exists(resolved):  # for example, a pipe from <(command)
            raise VideoError(f"{source} is not a regular file", f"- reads a video from standard input: {hint}")
        yield resolved
        return
    if source != STDIN:
        yield source
        return
    stdin = stdin or getattr(sys.stdin, "buffer", None)
    if stdin is None or stdin.closed:
        raise VideoError("standard input is closed", hint)
    if stdin.isatty():
        raise UsageError("- means standard input, which is a terminal", hint)
    with suppress(OSError):  # `stdin` has no file descriptor
        status = os.fstat(stdin.fileno())
        if stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, os.stat(os.devnull)):  # /dev/null is empty
            raise VideoError("standard input is a device, not a video", hint)
    from evoprune.video.temporary import temporary_file

    with temporary_file(iter(partial(stdin.read, CHUNK_BYTES), b""), "standard input", "stdin") as path:
        if not os.path.getsize(path):
            raise VideoError("standard input is empty", "did the command before the pipe fail?")
        yield path

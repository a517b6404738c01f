"""Reading videos: what is in one (`probe`, `scan`, `read_subtitles`), and its frames (`read_chunks`), full-size RGB in chunks of
bounded size. Work grows with what is asked for, not with the file. `local_file` stores standard input and what is on the web."""

import math
import os
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, BinaryIO, get_args

from evoprune.errors import UsageError, VideoError
from evoprune.util import is_url
from evoprune.video.info import (
    EXACT,
    FOLDER_FPS,
    PICTURE,
    Decoder,
    FrameTimes,
    HeldVideo,
    ScanResult,
    Subtitles,
    Video,
    check_seek,
)
from evoprune.video.sandbox.isolation import run_task, stream_frames
from evoprune.video.temporary import temporary_file

if TYPE_CHECKING:
    import numpy as np

DECODERS = get_args(Decoder)
STDIN = "-"
OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/")  # names of files that this process has open
CHUNK_BYTES = 2**20  # in which standard input is stored


def probe(path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS) -> Video:
    """Read the metadata of a video file, or of a folder of images, which then become its frames.

    Decodes the first frame and reads the packets of the last seconds. If the file cannot be entered near its end, all its
    packets are read once, without decoding.

    Args:
        path: is never taken for a URL or a pattern, and playlists are not followed.
        folder_fps: images of a folder per second of video.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: no such file, not a video, no video stream, no frame that can be decoded, or a folder without images;
            see also `isolation.run_task`.
    """
    return Video(**_run("probe", path, folder_fps=folder_fps))


def scan(
    path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS, on_frames: Callable[[int], None] | None = None
) -> ScanResult:
    """Decode a whole video once, to find damage, its true length, and how regular its frames and keyframes are.

    Memory does not grow with the video: a few frames at a time, and a count of each frame interval. `on_frames`: called about each
    second with how many frames were decoded. Otherwise as `probe`.
    """
    return ScanResult(**_run("scan", path, on_frames, folder_fps=folder_fps))


def frame_times(info: Video) -> FrameTimes:
    """When each frame of a video file is shown, for those who count frames.

    Reads all packets. Without decoding where these tell (MP4, MOV, Matroska, WebM, MPEG-TS). Raises as `probe`.
    """
    return FrameTimes(**run_task("frame_times", info.path, {"info": asdict(info)}))


def read_subtitles(info: Video, choice: str, start_s: float = 0.0, end_s: float = 1e9) -> Subtitles:
    """Return the subtitles whose time overlaps a part of a video, in seconds from the first frame.

    Args:
        choice: a file of subtitles (SRT, WebVTT, ASS, SSA), or a video with a text track; or "auto": a file beside the video, else
            the video's default text track or its only one, else none.

    Raises VideoError: no such file; or no subtitles in it, pictures of text only, or text of an unknown encoding; see also
    `isolation.run_task`.
    """
    values = _run("subtitles", info.path, origin_s=info.start_s, choice=choice, start_s=start_s, end_s=end_s)
    return Subtitles(**values | {"lines": [tuple(line) for line in values["lines"]]})


def _run(
    task: str, path: str | os.PathLike[str], on_frames: Callable[[int], None] | None = None, **arguments
) -> dict[str, Any]:
    return run_task(task, os.fspath(path), {"path": os.fspath(path), **arguments}, on_frames)


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of a plan."""

    first: int  # index among the plan's times
    pixels: "np.ndarray"  # uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), C-contiguous
    times_s: tuple[float, ...]  # of the frames themselves, from the first frame; perhaps earlier than those asked for
    damaged: int = 0  # damaged packets (of a folder: images) on the way to these frames that no earlier chunk counts
    other_size: bool = False  # whether one of the frames had another size than the video, and was scaled to it
    moved: bool = False  # whether one of them is a keyframe nearby instead of the frame on screen

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    @property
    def end(self) -> int:
        """Return the index behind the last of these frames."""
        return self.first + len(self.times_s)


def read_chunks(
    info: Video,
    times_s: Sequence[float],
    *,
    decoder: str = "auto",
    chunk_bytes: int = 64 * 2**20,
    seek: str = EXACT,
    part_s: float = 0.0,
    cores: int | None = None,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[FrameChunk]:
    """Return the frame on screen at each time: the first frame before the video begins, the last one after it ends.

    All frames have the size in `info`; where a video changes its size, they are scaled to it, with black borders where they have
    another shape. Damaged packets are skipped: the frame before them stays on screen. (decord does not report damage: it stops,
    or patches up silently.)
    Close the iterator to stop early.

    Args:
        times_s: seconds from the video's first frame, ascending; a time may repeat.
        chunk_bytes: upper limit of a chunk's size, but a chunk holds two frames even if they are larger. Every chunk but the last
            holds an even number of frames, so that no frame pair is split.
        seek: `keyframes` takes the nearest keyframe instead, if there is one at most half of `part_s` away (one between two parts
            belongs to the later), which is decoded without others. `auto` does so where it saves much (readers/pyav.py), by the
            file and the times alone. Only PyAV does.
        part_s: seconds from one time to the next, where the times are the middles of equal parts.
        cores: that may be kept busy; default: all that this process may use. The frames are the same for any number.
        on_frames: called by the thread that iterates, about each second, with how many frames were read so far, at least.

    Raises:
        UsageError: times that do not ascend, or no such `seek`. And what `choose_decoder` raises.
        VideoError: while iterating: the file cannot be read (any more), or no frame can be decoded; see also `isolation.run_task`.
    """
    times = tuple(float(t) for t in times_s)
    if not all(map(math.isfinite, times)) or any(b < a for a, b in pairwise(times)):
        raise UsageError("times of frames must be numbers that ascend")
    check_seek(seek)
    decoder = choose_decoder(decoder, info)
    per_chunk = frames_at_once(info, chunk_bytes)
    if isinstance(info, HeldVideo):
        return _held_chunks(info, times, per_chunk)
    firsts = range(0, len(times), per_chunk)
    sizes = [min(per_chunk, len(times) - first) for first in firsts]
    how = {"decoder": decoder, "seek": seek, "part_s": part_s, "cores": cores}
    filled = stream_frames(info, times, sizes, how, on_frames) if sizes else ()
    return (
        FrameChunk(first, frames, **facts | {"times_s": tuple(facts["times_s"])})
        for first, (frames, facts) in zip(firsts, filled, strict=True)
    )


def _held_chunks(info: HeldVideo, times: Sequence[float], per_chunk: int) -> Iterator[FrameChunk]:
    for first in range(0, len(times), per_chunk):
        frames, own_s = info.on_screen(times[first : first + per_chunk])
        yield FrameChunk(first, frames, own_s)


def frames_at_once(info: Video, chunk_bytes: int) -> int:
    """Return how many frames a chunk of that size holds: whole frame pairs, at least one."""
    return max(2, chunk_bytes // (info.width * info.height * 3) // 2 * 2)


def choose_decoder(decoder: str, info: Video | None = None) -> str:
    """Return the decoder to use, `pyav` or `decord`, for a picture `pillow`, and for an array `none`, after a check that it can be
    used.

    `auto` is PyAV: decord decodes every frame (readers/decord.py says why), has no AV1, and gives up on damage.

    Raises UsageError: no such decoder, or it is not installed. VideoError: decord is known to fail on videos like this one.
    """
    if info is not None and info.kind == PICTURE:
        return "pillow"
    if isinstance(info, HeldVideo):
        return "none"
    if decoder not in DECODERS:
        raise UsageError(f"unknown decoder {decoder!r}", f"choose one of {', '.join(DECODERS)}")
    if decoder != "decord":
        return "pyav"
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
    """Provide a path to read the video from: `source` itself; for `-` (a file of that name is `./-`) a copy of standard input; or a
    copy of what is at an address of http or https.

    Readers seek, so standard input itself will not do. Names of files that this process has open, such as `/dev/stdin`, are
    resolved, because another process reads the video. `offline`, `progress`: as of `download.downloaded`.

    Raises UsageError: standard input is a terminal. VideoError: it is closed, empty or a device, or cannot be stored. And what
    `downloaded` raises.
    """
    if is_url(source):
        from evoprune.video.download import downloaded

        with downloaded(source, offline=offline, progress=progress) as path:
            yield path
        return
    hint = "pipe a video into it, e.g. evoprune ask - QUESTION < video.mp4"
    if source.startswith(OPEN_FILES):
        resolved = os.path.realpath(source)
        if os.path.exists(source) and not os.path.exists(resolved):  # a pipe, as of <(command)
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
    with suppress(OSError):  # not a file of the operating system
        status = os.fstat(stdin.fileno())
        if stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, os.stat(os.devnull)):  # /dev/null does end
            raise VideoError("standard input is a device, not a video", hint)
    with temporary_file(iter(partial(stdin.read, CHUNK_BYTES), b""), "standard input", "stdin") as path:
        if not os.path.getsize(path):
            raise VideoError("standard input is empty", "did the command before the pipe fail?")
        yield path

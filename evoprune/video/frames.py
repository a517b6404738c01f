"""Reads videos: metadata (`probe`, `scan`), subtitles (`read_subtitles`), and frames (`read_chunks`), as full-size RGB in chunks of
bounded size. The work grows with the request, not with the file. `local_file` copies standard input and URLs to temporary files."""

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
from evoprune.video.held import HeldVideo
from evoprune.video.info import FOLDER_FPS, Decoder, FrameTimes, ScanResult, Subtitles, Video, check_seek
from evoprune.video.sandbox.isolation import run_task, stream_frames
from evoprune.video.temporary import temporary_file

if TYPE_CHECKING:
    import numpy as np

DECODERS = get_args(Decoder)
STDIN = "-"
OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/")  # paths that refer to open files of this process
CHUNK_BYTES = 2**20  # chunk size for copying standard input


def probe(path: str | os.PathLike[str] | HeldVideo, *, folder_fps: float = FOLDER_FPS) -> Video:
    """Read the metadata of a video file, a picture, or a folder of images that is read as a video.

    Decodes the first frame and reads the packets of the last seconds. If FFmpeg cannot seek near the end of the file, all its
    packets are read once, without decoding.

    Args:
        path: never interpreted as a URL or a pattern; playlists are not followed. A `HeldVideo` is returned as it is.
        folder_fps: images of a folder per second of video.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: no such file, not a video, no video stream, no decodable frame, or a folder without images; see also
            `isolation.run_task`.
    """
    if isinstance(path, HeldVideo):
        return path
    return Video(**_run("probe", path, folder_fps=folder_fps))


def scan(
    path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS, on_frames: Callable[[int], None] | None = None
) -> ScanResult:
    """Decode a whole video to find damage, its true length, and the regularity of its frames and keyframes.

    Memory use does not grow with the video: only a few frames and a histogram of frame intervals are kept.

    Args:
        path, folder_fps: see `probe`.
        on_frames: called about once a second with the number of frames decoded so far.

    Raises:
        UsageError, VideoError: see `probe`. Pictures cannot be scanned.
    """
    return ScanResult(**_run("scan", path, on_frames, folder_fps=folder_fps))


def frame_times(info: Video) -> FrameTimes:
    """Return the display time of every frame of a video file, for callers that address frames by number.

    Reads all packets. Decodes them only if they do not state the times; MP4, MOV, Matroska, WebM and MPEG-TS usually do. Raises
    what `probe` raises.
    """
    return FrameTimes(**run_task("frame_times", info.path, {"info": asdict(info)}))


def read_subtitles(info: Video, choice: str, start_s: float = 0.0, end_s: float = 1e9) -> Subtitles:
    """Return the subtitles that overlap a span of a video.

    Args:
        choice: a subtitle file (SRT, WebVTT, ASS, SSA), or a video with a text track. "auto" takes a file next to the video,
            otherwise the video's default text track or its only one, otherwise none. "none" takes none. A picture has none.
        start_s, end_s: the span, in seconds from the first frame.

    Raises:
        VideoError: the file does not exist, has no subtitles or only image subtitles, or its encoding is unknown; see also
            `isolation.run_task`.
    """
    if choice == "none":
        return Subtitles()
    if info.is_picture:
        return Subtitles(note=f"{info.path} is a picture")
    values = _run("subtitles", info.path, origin_s=info.start_s, choice=choice, start_s=start_s, end_s=end_s)
    return Subtitles(**values | {"lines": [tuple(line) for line in values["lines"]]})


def _run(
    task: str, path: str | os.PathLike[str], on_frames: Callable[[int], None] | None = None, **arguments
) -> dict[str, Any]:
    return run_task(task, os.fspath(path), {"path": os.fspath(path), **arguments}, on_frames)


@dataclass(frozen=True)
class FrameChunk:
    """Consecutive frames of the requested times."""

    first: int  # index of the first frame among the requested times
    pixels: "np.ndarray"  # uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), C-contiguous
    times_s: tuple[float, ...]  # the frames' own times from the first frame; may precede the requested times
    damaged: int = 0  # damaged packets (in a folder: images) found since the chunk before
    other_size: bool = False  # whether a frame differed in size from the video and was scaled
    moved: bool = False  # whether a frame is a nearby keyframe instead of the frame on screen

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    @property
    def end(self) -> int:
        """Index of the last frame, plus 1."""
        return self.first + len(self.times_s)


def read_chunks(
    info: Video,
    times_s: Sequence[float],
    *,
    decoder: str = "auto",
    chunk_bytes: int = 64 * 2**20,
    seek: str = "exact",
    part_s: float = 0.0,
    cores: int | None = None,
    on_frames: Callable[[int], None] = lambda frames: None,
) -> Iterator[FrameChunk]:
    """Yield the frame on screen at every time, in chunks.

    Times before the video begins get the first frame, times after it ends the last one. All frames have the size in `info`; a frame
    of another size is scaled, with black borders if its aspect ratio differs. Damaged packets are skipped, so the frame before them
    stays on screen. (decord does not report damage: it stops, or patches frames up silently.) Close the iterator to stop early.

    Args:
        times_s: seconds from the video's first frame, ascending; a time may repeat.
        decoder: see `choose_decoder`.
        chunk_bytes: size limit of a chunk. A chunk holds at least two frames, even if they exceed it. All chunks except the last
            hold an even number of frames, so no frame pair is split.
        seek: `keyframes` takes the nearest keyframe instead of the frame on screen, if one lies within half of `part_s`; it is
            decoded without other frames. A keyframe between two parts belongs to the later one. `auto` does so only if it saves
            much (readers/pyav.py), which depends only on the file and the times. Only PyAV supports this.
        part_s: interval between times in seconds, if the times are the middles of equal parts.
        cores: number of cores to keep busy; None uses all that this process may use. The frames do not depend on it.
        on_frames: called about once a second, by the iterating thread, with a lower bound on the number of frames read so far.

    Raises:
        UsageError: times that do not ascend, an unknown `seek`, or an error of `choose_decoder`.
        VideoError: an error of `choose_decoder`; or while iterating, if the file can no longer be read or no frame can be decoded;
            see also `isolation.run_task`.
    """
    times = tuple(float(t) for t in times_s)
    if not all(map(math.isfinite, times)) or any(b < a for a, b in pairwise(times)):
        raise UsageError("frame times must be finite numbers in ascending order")
    check_seek(seek)
    decoder = choose_decoder(decoder, info)
    per_chunk = info.frames_at_once(chunk_bytes)
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


def choose_decoder(decoder: str, info: Video | None = None) -> str:
    """Return the decoder to use, after checking that it works: `pyav`, `decord`, `pillow` or `none`.

    Pictures and some animations need `pillow`, and an array `none`. `auto` means PyAV. decord decodes every frame (see
    readers/decord.py), does not support AV1, and gives up on damage.

    Raises:
        UsageError: unknown decoder, or decord is not installed.
        VideoError: decord is known to fail on videos like this one.
    """
    if info is not None and (info.is_picture or (info.is_animation and decoder != "decord")):
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
    """Yield a path to read the video from.

    For `-` this is a temporary copy of standard input, because readers seek. For an http or https URL it is a downloaded copy.
    Paths such as `/dev/stdin`, which refer to open files of this process, are resolved, because another process reads the video.
    Other paths are yielded unchanged.

    Args:
        source: a path, a URL, or `-` (a file of that name is `./-`).
        stdin: replaces `sys.stdin.buffer`.
        offline, progress: see `download.downloaded`.

    Raises:
        UsageError: standard input is a terminal, or an error of `downloaded`.
        VideoError: standard input is closed, empty, a device, or cannot be stored; `source` is a pipe; or an error of `downloaded`.
    """
    if is_url(source):
        from evoprune.video.download import downloaded

        with downloaded(source, offline=offline, progress=progress) as path:
            yield path
        return
    hint = "pipe a video into it, e.g. evoprune ask - QUESTION < video.mp4"
    if source.startswith(OPEN_FILES):
        resolved = os.path.realpath(source)
        if os.path.exists(source) and not os.path.exists(resolved):  # a pipe, such as <(command)
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
        if stat.S_ISCHR(status.st_mode) and not os.path.samestat(status, os.stat(os.devnull)):  # /dev/null does end
            raise VideoError("standard input is a device, not a video", hint)
    with temporary_file(iter(partial(stdin.read, CHUNK_BYTES), b""), "standard input", "stdin") as path:
        if not os.path.getsize(path):
            raise VideoError("standard input is empty", "did the command before the pipe fail?")
        yield path

"""Reads videos: metadata (`probe`, `scan`), subtitles (`read_subtitles`) and frames (`read_chunks`).

Frames are full-size RGB, in chunks of bounded size. The work grows with the request, not with the file. `local_file` copies
standard input and URLs to temporary files.
"""

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
    """Read the metadata of a video file, a still image, or a folder of images that is read as a video.

    Decodes the first frame and reads the packets of the last few seconds. If FFmpeg cannot seek near the end of the file, all
    packets are read once, without decoding.

    Args:
        path: Path of the input. It is never interpreted as a URL or a pattern, and playlists are not followed. A `HeldVideo` is
            returned unchanged.
        folder_fps: Frame rate of a folder of images, in images per second of video.

    Raises:
        UsageError: `folder_fps` is not above 0.
        VideoError: The file does not exist, is not a video, or has no video stream or decodable frame; or the folder has no
            images. See also `isolation.run_task`.
    """
    if isinstance(path, HeldVideo):
        return path
    return Video(**_run("probe", path, folder_fps=folder_fps))


def scan(
    path: str | os.PathLike[str], *, folder_fps: float = FOLDER_FPS, on_frames: Callable[[int], None] | None = None
) -> ScanResult:
    """Decode a whole video to find damage, its true length, and how regular its frames and keyframes are.

    Memory use does not grow with the length of the video, because only a few frames and a histogram of frame intervals are kept.

    Args:
        path, folder_fps: See `probe`.
        on_frames: Called about once a second with the number of frames decoded so far.

    Raises:
        UsageError, VideoError: See `probe`. A still image also raises VideoError, because it cannot be scanned.
    """
    return ScanResult(**_run("scan", path, on_frames, folder_fps=folder_fps))


def frame_times(info: Video) -> FrameTimes:
    """Return the display time of every frame of a video file, for callers that address frames by number.

    Reads all packets. They are decoded only if they do not state the display times; in MP4, MOV, Matroska, WebM and MPEG-TS they
    usually do. Raises the same errors as `probe`.
    """
    return FrameTimes(**run_task("frame_times", info.path, {"info": asdict(info)}))


def read_subtitles(info: Video, choice: str, start_s: float = 0.0, end_s: float = 1e9) -> Subtitles:
    """Return the subtitles that overlap a span of a video.

    Args:
        choice: A subtitle file (SRT, WebVTT, ASS, SSA), or a video with a text track. "auto" uses a file next to the video. If
            there is none, it uses the video's default text track, or its only text track. "none" returns no subtitles, and
            neither does any choice for a still image.
        start_s, end_s: The span, in seconds from the first frame.

    Raises:
        VideoError: The file does not exist, has no subtitles or only image subtitles, or has an unknown encoding. See also
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
    """Consecutive frames that were read for consecutive requested times."""

    first: int  # index of the first frame among the requested times
    pixels: "np.ndarray"  # uint8 `[n, H, W, 3]`, RGB as displayed (rotation applied), C-contiguous
    times_s: tuple[float, ...]  # the frames' own times from the first frame; may be earlier than the requested times
    damaged: int = 0  # damaged packets (in a folder: images) found since the previous chunk
    other_size: bool = False  # whether a frame differed in size from the video and was scaled
    moved: bool = False  # whether a frame is a nearby keyframe instead of the frame on screen

    @property
    def nbytes(self) -> int:
        return self.pixels.nbytes

    @property
    def end(self) -> int:
        """Index after the last frame (exclusive)."""
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
    """Yield the frame that is on screen at each requested time, in chunks.

    A time before the video begins gets the first frame, and a time after it ends gets the last frame. All frames have the size
    given in `info`. A frame of a different size is scaled, with black borders if its aspect ratio differs. Damaged packets are
    skipped, so the preceding frame stays on screen. (decord does not report damage: it either stops or silently patches up
    frames.) Close the iterator to stop early.

    Args:
        times_s: Seconds from the video's first frame, ascending. A time may repeat.
        decoder: See `choose_decoder`.
        chunk_bytes: Size limit of a chunk. A chunk holds at least two frames, even if they exceed the limit. All chunks except
            the last hold an even number of frames, so that no frame pair is split.
        seek: "exact" reads the frame on screen. "keyframes" replaces it with the nearest keyframe if there is one within half
            of `part_s`, because a keyframe is decoded without any other frames. A keyframe on the border between two parts
            belongs to the later part. "auto" uses keyframes only if that saves much time (see readers/pyav.py); this depends
            only on the file and the times. Only PyAV supports "keyframes" and "auto".
        part_s: Interval between the times in seconds, if the times are the middles of equal parts.
        cores: Number of CPU cores to use, or None for all cores available to this process. It does not affect the frames.
        on_frames: Called about once a second, by the iterating thread, with a lower bound on the number of frames read so far.

    Raises:
        UsageError: The times do not ascend, `seek` is unknown, or `choose_decoder` raises it.
        VideoError: `choose_decoder` raises it; or, during iteration, the file can no longer be read or no frame can be decoded.
            See also `isolation.run_task`.
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
    """Return the decoder to use (`pyav`, `decord`, `pillow` or `none`), after checking that it works.

    Still images and some animations need `pillow`, and an array needs `none`. `auto` selects PyAV. decord decodes every frame (see
    readers/decord.py), does not support AV1, and gives up on damaged files.

    Raises:
        UsageError: The decoder is unknown, or decord is not installed.
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
    """Yield a path from which the video can be read.

    For `-`, this is the path of a temporary copy of standard input, because readers need to seek. For an http or https URL, it is
    the path of a downloaded copy. Paths such as `/dev/stdin` refer to open files of this process and are resolved, because a
    different process reads the video. Other paths are yielded unchanged.

    Args:
        source: A path, a URL, or `-` for standard input. A file named `-` can be given as `./-`.
        stdin: Read instead of `sys.stdin.buffer`.
        offline, progress: See `download.downloaded`.

    Raises:
        UsageError: Standard input is a terminal, or `downloaded` raises it.
        VideoError: Standard input is closed, empty, a device, or cannot be stored; `source` is a pipe; or `downloaded` raises it.
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

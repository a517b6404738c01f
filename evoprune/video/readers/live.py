"""Frames of a source that does not wait, as they come: a stream's URL, a camera, a pipe, a file that grows, or a file.

FFmpeg may open what the user typed, by the protocols that its kind of URL needs. `file` is none of them, so a playlist reaches no
file of this machine; what comes over a bare connection or from a file may not even be a playlist.
"""

import errno
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame

from evoprune.backend import available_cores
from evoprune.errors import VideoError
from evoprune.video.readers import colour, ffmpeg
from evoprune.video.readers.probing import another_follows

# By the kind of a URL: the protocols that it needs, and formats beside those of files.
WEB = "http,https,httpproxy,tcp,tls,crypto", ",hls,dash,aac,mp3,webvtt"
RTSP = "rtsp,rtsps,rtp,udp,tcp,tls", ",rtsp,rtp,sdp"
ALLOWED = {"http": WEB, "https": WEB, "rtsp": RTSP, "rtsps": RTSP, "udp": ("udp", ""), "tcp": ("tcp", "")}
FORMATS = (
    "mpegts,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,flv,avi,nut,ogg,asf,mpeg,mpegvideo,mjpeg,mpjpeg,h264,hevc,av1,ivf,gif"
    ",apng,yuv4mpegpipe,mxf"
)
JUMP_S = (
    10.0  # longer steps between two frames of a stream are no gaps, but another clock; of a file: `ffmpeg.restarts`
)
POLL_S = 0.05  # how often a file is asked whether it has grown


class LiveReader:
    """Read from one connection to a source. `facts`: "finite", whether it has an end of its own; others of `Video`.

    Args:
        source: a URL of `ALLOWED`, a path, or a camera's device; None for the pipe `descriptor`, which is closed at the end.
        name: of the source, for messages.
        timeout_s: how long it may be silent.
        follow: whether a file may grow: at its end it has so long to do so.

    Raises VideoError: no such source, none that can be read, or one that wants a password.
    """

    def __init__(
        self, source: str | None, name: str, timeout_s: float, follow: bool = False, descriptor: int | None = None
    ):
        self._source = source
        self._name = name
        self._timeout_s = timeout_s
        self._follow = follow
        self._scheme = None
        if source and "://" in source:
            self._scheme = source.partition("://")[0].lower()
        self._live = source is None or not os.path.isfile(source)  # whether what comes has just been made
        self._open = ExitStack()
        self._held = None
        self._gap_s = 0.0  # the largest step ahead that was taken for another clock
        if descriptor is not None:
            self._open.callback(os.close, descriptor)
        try:
            self._container = self._open.enter_context(self._opened(descriptor))
        except (av.error.FFmpegError, OSError, ValueError) as problem:
            raise self._error(problem) from problem
        stream = self._stream = ffmpeg.video_stream(
            self._container, name, threads=ffmpeg.thread_count(available_cores())
        )
        known = self._scheme and ((self._container.duration or 0) > 0 or (self._container.size or 0) > 0)
        codec = stream.codec_context.codec.canonical_name
        container = self._container.format.name
        self.facts = {
            "finite": bool(known),
            "codec": codec,
            "container": container,
            "tags": ffmpeg.tags(self._container),
        }
        rate, guessed = ffmpeg.frame_rate(stream)
        log = ffmpeg.stream_log(stream)
        ffmpeg.check_encryption(stream, log, name)
        hdr = colour.stated(stream, log)
        self._crop = ffmpeg.cropping(log)
        self.facts |= {"fps": rate, "rate_guessed": guessed, **ffmpeg.shown_otherwise(stream, hdr)}
        if container in ffmpeg.JOINED:
            hdr = None  # a header of MPEG-TS says nothing, so it was the first frames, and later ones may be of another video
        self._converter = colour.Converter(name, hdr)
        self._frames = self._timed()

    def next(self, after_s: float) -> dict | None:
        """Return the next frame that is not earlier than so many seconds after the first one; None where the source has ended.

        Returns its "time_s", its "height" and "width" in pixels, its "hdr_format" as in `Video`, and as "clock_gap_s" the largest
        step ahead so far that was taken for another clock; `fill` has the pixels.
        """
        for time_s, frame in self._frames:
            if time_s >= after_s - ffmpeg.TOLERANCE_S:
                turn = ffmpeg.orientation(frame)
                width, height = ffmpeg.turned_size((frame.width, frame.height), turn[0])
                self._held = frame, width, height, *turn
                hdr = colour.hdr_format(frame, self.facts["hdr_format"])
                return {
                    "time_s": time_s,
                    "height": height,
                    "width": width,
                    "hdr_format": hdr,
                    "clock_gap_s": self._gap_s,
                }
        return None

    def fill(self, frames: np.ndarray) -> None:
        """Writes the frame that `next` found into uint8 `[1, H, W, 3]`."""
        frames[0] = ffmpeg.to_rgb(*self._held, self._converter)

    def close(self) -> None:
        self._open.close()

    def _opened(self, descriptor: int | None) -> InputContainer:
        # a second
        limits = {"max_pixels": str(ffmpeg.MAX_VIDEO_PIXELS), "analyzeduration": str(10**6)}
        path = self._source
        camera = None
        if path and not self._scheme and stat.S_ISCHR(os.stat(path).st_mode):
            camera = "v4l2"
        if self._scheme:
            protocols, formats = ALLOWED[self._scheme]
            limits |= {
                "protocol_whitelist": protocols,
                "format_whitelist": FORMATS + formats,
                "rtsp_flags": "prefer_tcp",
            }
        if self._scheme or camera:
            return av.open(path, format=camera, options=limits, timeout=self._timeout_s, **ffmpeg.ANY_TAGS)
        limits |= {"protocol_whitelist": "none", "format_whitelist": FORMATS}
        end = time.monotonic() + self._timeout_s
        while True:
            if path and ffmpeg.picture_format(path) not in (None, "GIF"):  # a GIF is read as a video, even of one frame
                from evoprune.video.readers import picture  # imports Pillow

                if picture.is_picture(path):
                    raise VideoError(f"{path} is a picture, not a video", "evoprune ask answers questions about it")
            late = not self._follow or time.monotonic() > end
            number = os.open(path, os.O_RDONLY) if path else os.dup(descriptor)
            file = _Following(number, self._timeout_s)
            self._open.callback(file.close)
            try:
                container = av.open(file, options=limits, **ffmpeg.ANY_TAGS)
                file.waits = self._follow and path is not None  # not before: FFmpeg also looks at the end of a file
                return container
            except av.error.FFmpegError as problem:  # perhaps its beginning is not there yet
                file.close()
                if not path:
                    raise
                if no_video := ffmpeg.not_a_video(path, unrecognised=late):
                    raise no_video from problem
                if late:
                    raise VideoError(f"cannot read {path}: {ffmpeg.reason(problem)}", ffmpeg.INCOMPLETE) from problem
            ffmpeg.alive()
            time.sleep(POLL_S)

    def _timed(self) -> Iterator[tuple[float, VideoFrame]]:
        """Yield each frame with its seconds from the first one, which never go back, whatever the source's own clock does."""
        time_s = 0.0
        before = None
        arrived = time.monotonic()
        step = 1 / (self.facts["fps"] or ffmpeg.FALLBACK_FPS)
        for number, frame in enumerate(self._decoded()):
            stamp = ffmpeg.frame_time(frame, self._stream)
            now = time.monotonic()
            passed = step
            if stamp is not None and before is not None:
                passed = stamp - before
            ahead = passed > JUMP_S if self._scheme else ffmpeg.restarts(passed, self.facts["container"])
            if ahead and passed > 0:
                self._gap_s = max(self._gap_s, passed)
            if number and (ahead or passed < 0):  # another clock
                waited = now - arrived if self._live else 0.0  # a file is read as fast as it goes
                time_s += max(step, waited)
            elif number:
                time_s += passed
            before = stamp
            arrived = now
            yield time_s, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        """Yield all frames; what cannot be decoded is left out, unless it is all that comes for `timeout_s`."""
        since = None  # when the first packet after the latest frame came; waiting for one is no failure
        decode = ffmpeg.decoder(self._stream, self._crop)
        for packet in self._packets():
            ffmpeg.alive()
            if packet is not None and not packet.size and packet.dts is not None:
                continue  # the frame before is repeated
            try:
                frames = decode(packet)
            except ffmpeg.Encrypted as problem:
                raise ffmpeg.encrypted(self._name) from problem
            except (av.error.InvalidDataError, av.error.ArgumentError):
                frames = []
            for frame in frames:
                if frame.width * frame.height > ffmpeg.MAX_VIDEO_PIXELS:
                    continue
                ffmpeg.picture_size(frame.width * frame.height)
                yield frame
            ended = packet is None or not packet.size
            if frames or ended:
                since = None
            elif since is None:
                since = time.monotonic()
            if since and time.monotonic() - since > self._timeout_s:
                raise VideoError(f"no frame of {self._name} could be decoded for {self._timeout_s:g} s", GARBAGE)

    def _packets(self) -> Iterator[Packet | None]:
        """Yield all packets; where the source breaks off, None, which makes the decoder return what it still holds, then the
        error.
        """
        end = 0
        try:
            for packet in self._container.demux(self._stream):
                yield packet
                end = max(end, (packet.pos or 0) + packet.size)
        except (av.error.FFmpegError, OSError, IndexError) as problem:
            back = (self._scheme or not self._source) and self.facts["container"] == ffmpeg.MOV and not end
            if back and isinstance(problem, av.error.InvalidDataError | av.error.OSError):
                message = f"{self._name} has its index at its end, so it can be read only as a file"
                hint = "download it first, or have it written by ffmpeg -movflags +faststart"
                raise VideoError(message, hint) from problem
            yield None
            # So FFmpeg calls the end of a transfer whose length was not said.
            if getattr(problem, "errno", None) != errno.EIO or self.facts["finite"]:
                raise self._error(problem) from problem
        if (
            self._source
            and os.path.isfile(self._source)
            and another_follows(self._source, self.facts["container"], end)
        ):
            message = f"{self._name} holds another file after its first one, as cat writes it, which is not read"
            raise VideoError(message, "join the videos with ffmpeg -f concat")

    def _error(self, problem: Exception) -> VideoError:
        """Return what a failure means to the user. It never names the URL as it was typed, which may hold a password."""
        name = self._name
        if isinstance(problem, av.error.HTTPUnauthorizedError):
            return VideoError(f"{name} wants a user and a password, or other ones", "SCHEME://USER:PASSWORD@HOST/...")
        if isinstance(problem, av.error.ExitError | av.error.TimeoutError | TimeoutError):
            hint = "is it running, and can it be reached from here? --timeout waits longer"
            return VideoError(f"nothing came from {name} for {self._timeout_s:g} s", hint)
        if isinstance(problem, av.error.InvalidDataError | av.error.ArgumentError):
            hint = "does the command before it fail? A pipe carries MPEG-TS or Matroska, an MP4 only in fragments"
            if self._source:
                hint = GARBAGE
            return VideoError(f"{name} sends no video that can be read", hint)
        return VideoError(f"cannot read {name}: {ffmpeg.reason(problem)}", "check the address, and whether it plays")


GARBAGE = "does it play elsewhere? Formats are those of files, and of playlists over http"


class _Following:
    """Read the bytes of a pipe, or of a file, as they come. `waits`: whether the file may grow."""

    def __init__(self, descriptor: int, timeout_s: float):
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self._timeout_s = timeout_s
        self.waits = False
        self._silent = False
        self._pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.close = self._file.close
        if not self._pipe:  # FFmpeg takes what can seek for a file
            self.seek = self._file.seek
            self.tell = self._file.tell

    def read(self, count: int) -> bytes:
        """Return the next bytes, up to so many; none at the end. Raises TimeoutError: a pipe was silent for too long.

        Both come once, and nothing after it: FFmpeg reads on, in some formats ten times.
        """
        end = time.monotonic() + self._timeout_s
        while not self._silent:
            ffmpeg.alive()
            left = end - time.monotonic()
            if self._pipe and not select.select([self._file], [], [], min(1.0, max(0.0, left)))[0]:
                if left <= 0:
                    self._silent = True
                    raise TimeoutError
                continue
            content = self._file.read(count)
            self.waits = self.waits and (bool(content) or left > 0)
            if content or not self.waits:
                return content
            time.sleep(POLL_S)
        return b""

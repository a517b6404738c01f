"""Reads frames from live sources as they arrive: stream URLs, cameras, pipes, growing files, and ordinary files.

FFmpeg opens the URL exactly as typed by the user, but it may only use the protocols required for this type of URL. The `file`
protocol is never allowed, so playlists cannot refer to files on this machine. Playlists are not accepted at all from pipes, files,
and udp and tcp URLs.
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

from evoprune.backend import Host
from evoprune.errors import VideoError
from evoprune.video.info import TOLERANCE_S
from evoprune.video.reader_table import FILES, reader_at
from evoprune.video.readers import colour, ffmpeg
from evoprune.video.readers.clock import FORWARD_S, Clock, longest_gap_s
from evoprune.video.readers.deinterlacing import deinterlacing
from evoprune.video.readers.probing import another_follows
from evoprune.video.signatures import head_of, picture_format

# The FFmpeg protocols required for each URL scheme, and the formats allowed in addition to `FORMATS`.
WEB = "http,https,httpproxy,tcp,tls,crypto", ",hls,dash,aac,mp3,webvtt"
RTSP = "rtsp,rtsps,rtp,udp,tcp,tls", ",rtsp,rtp,sdp"
ALLOWED = {"http": WEB, "https": WEB, "rtsp": RTSP, "rtsps": RTSP, "udp": ("udp", ""), "tcp": ("tcp", "")}
FORMATS = (
    "mpegts,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,flv,avi,nut,ogg,asf,mpeg,mpegvideo,mjpeg,mpjpeg,h264,hevc,av1,ivf,gif"
    ",apng,yuv4mpegpipe,mxf"
)
HLS = "hls"  # FFmpeg's name for the format of a playlist, whose segments may have different clocks
POLL_S = 0.05  # interval at which to check whether a file has grown


class LiveReader:
    """Reads frames over a single connection to a source.

    Args:
        source: A URL with a scheme from `ALLOWED`, a path, or a camera device. None means to read the pipe `descriptor`.
        name: Source name for error messages.
        timeout_s: Timeout in seconds. A source that sends nothing for this long is considered to have failed.
        follow: True if the source is a file still being written. The reader then waits at the end of the file for up to `timeout_s`
            for more data.
        descriptor: File descriptor of a pipe. It is closed by `close`.

    Attributes:
        facts: A dict with some of the fields of `Video`, plus "finite", which is True if the source has a known end.

    Raises:
        VideoError: The source does not exist, cannot be read, or requires a password.
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
        self._open = ExitStack()
        self._held = None
        if descriptor is not None:
            self._open.callback(os.close, descriptor)
        try:
            self._container = self._open.enter_context(self._opened(descriptor))
        except (av.error.FFmpegError, OSError, ValueError) as problem:
            raise self._error(problem) from problem
        stream = self._stream = ffmpeg.video_stream(
            self._container, name, threads=ffmpeg.thread_count(Host().available_cores())
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
            # MPEG-TS headers do not specify the HDR format, so it was taken from the first frames. Later frames may be from another
            # video.
            hdr = None
        self._converter = colour.Converter(name, hdr)
        resets = container == HLS or (self._scheme and not known)
        self._clock = Clock(FORWARD_S if resets else longest_gap_s(container), live=True)
        self._frames = deinterlacing(self.timed())

    def next(self, after_s: float) -> dict | None:
        """Find the next frame at or after a time in seconds from the first frame. Call `fill` to get the pixels.

        Returns:
            None at the end of the source. Otherwise, a dict with "time_s"; "height" and "width" in pixels; "hdr_format" as in
            `Video`; and "clock_gap_s", the largest forward jump so far interpreted as a reset of the source's clock.
        """
        for time_s, shown in self._frames:
            if time_s >= after_s - TOLERANCE_S:
                frame = shown()
                turn = ffmpeg.orientation(frame)
                width, height = ffmpeg.displayed_size(frame, self.facts["pixel_aspect"], turn[0])
                self._held = frame, width, height, *turn
                hdr = colour.hdr_format(frame, self.facts["hdr_format"])
                return {
                    "time_s": time_s,
                    "height": height,
                    "width": width,
                    "hdr_format": hdr,
                    "clock_gap_s": self._clock.gap_s,
                }
        return None

    def fill(self, frames: np.ndarray) -> None:
        """Fill `frames`, which must be uint8 `[1, H, W, 3]`, with the frame found by `next`."""
        frames[0] = ffmpeg.to_rgb(*self._held, self._converter, self.facts["pixel_aspect"])

    def close(self) -> None:
        self._open.close()

    def _opened(self, descriptor: int | None) -> InputContainer:
        # `analyzeduration` is one second, in microseconds.
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
            # A GIF is treated as a video even if it has only one frame.
            if path and picture_format(head_of(path)) != "GIF" and (reader := reader_at(path)) is not FILES:
                hint = "evoprune ask answers questions about it"
                raise VideoError(f"{path} is {reader.noun}, not a video", hint)
            late = not self._follow or time.monotonic() > end
            number = os.open(path, os.O_RDONLY) if path else os.dup(descriptor)
            file = _Following(number, self._timeout_s)
            self._open.callback(file.close)
            try:
                container = av.open(file, options=limits, **ffmpeg.ANY_TAGS)
                # Set this only after opening, because opening may also read the end of the file.
                file.waits = self._follow and path is not None
                return container
            except av.error.FFmpegError as problem:  # the start of the file may not have been written yet
                file.close()
                if not path:
                    raise
                if no_video := ffmpeg.not_a_video(path, unrecognised=late):
                    raise no_video from problem
                if late:
                    raise VideoError(f"cannot read {path}: {ffmpeg.reason(problem)}", ffmpeg.INCOMPLETE) from problem
            ffmpeg.alive()
            time.sleep(POLL_S)

    def timed(self) -> Iterator[tuple[float, VideoFrame]]:
        """Yield frames with their timestamps in seconds from the first frame. The timestamps never decrease."""
        step = 1 / (self.facts["fps"] or ffmpeg.FALLBACK_FPS)
        last_s = -step
        origin_s = None  # corrected timestamp that corresponds to 0 s

        def stamp_of(frame: VideoFrame) -> float | None:
            return ffmpeg.frame_time(frame, self._stream)

        for frame, shift_s in self._clock.corrections(self._decoded(), stamp_of, lambda _: step):
            time_s = last_s + step
            stamp = stamp_of(frame)
            if stamp is not None:
                if origin_s is None:
                    origin_s = stamp + shift_s - time_s
                time_s = stamp + shift_s - origin_s
            last_s = max(last_s, time_s)
            yield last_s, frame

    def _decoded(self) -> Iterator[VideoFrame]:
        """Yield decoded frames, skipping damaged packets. Raises VideoError if no frame is decodable for `timeout_s` seconds."""
        # Arrival time of the first packet after the latest frame. Time spent waiting for packets is not counted.
        since = None
        decode = ffmpeg.decoder(self._stream, self._crop)
        for packet in self._packets():
            ffmpeg.alive()
            if packet is not None and not packet.size and packet.dts is not None:
                continue  # an empty packet repeats the previous frame
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
                raise VideoError(
                    f"no frame of {self._name} could be decoded for {self._timeout_s:g} s", UNREADABLE_HINT
                )

    def _packets(self) -> Iterator[Packet | None]:
        """Yield all packets. If the source is interrupted, yields None to flush the decoder and then raises VideoError."""
        end = 0
        flushed = False
        try:
            for packet in self._container.demux(self._stream):
                yield packet
                flushed = packet.dts is None and not packet.size
                end = max(end, (packet.pos or 0) + packet.size)
        except (av.error.FFmpegError, OSError, IndexError) as problem:
            back = (self._scheme or not self._source) and self.facts["container"] == ffmpeg.MOV and not end
            if back and isinstance(problem, av.error.InvalidDataError | av.error.OSError):
                message = f"{self._name} has its index at its end, so it can be read only as a file"
                hint = "download it first, or write it with ffmpeg -movflags +faststart"
                raise VideoError(message, hint) from problem
            # If a track appeared while reading, PyAV raises an IndexError after the last packet, which flushes the decoder.
            if not (flushed and isinstance(problem, IndexError)):
                yield None
                # FFmpeg reports EIO at the end of a transfer of unknown length.
                if getattr(problem, "errno", None) != errno.EIO or self.facts["finite"]:
                    raise self._error(problem) from problem
        if (
            self._source
            and os.path.isfile(self._source)
            and another_follows(self._source, self.facts["container"], end)
        ):
            message = f"{self._name} contains a second file after the first (as written by cat), which is not read"
            raise VideoError(message, "join the videos with ffmpeg -f concat")

    def _error(self, problem: Exception) -> VideoError:
        """Return the VideoError to raise for an exception. It never contains the original URL, which may include a password."""
        name = self._name
        if isinstance(problem, av.error.HTTPUnauthorizedError):
            return VideoError(f"{name} requires a valid user name and password", "SCHEME://USER:PASSWORD@HOST/...")
        if isinstance(problem, av.error.ExitError | av.error.TimeoutError | TimeoutError):
            hint = "is it running, and can it be reached from here? --timeout waits longer"
            return VideoError(f"nothing came from {name} for {self._timeout_s:g} s", hint)
        if isinstance(problem, av.error.InvalidDataError | av.error.ArgumentError):
            hint = "did the command before the pipe fail? A pipe can carry MPEG-TS, Matroska or fragmented MP4"
            if self._source:
                hint = UNREADABLE_HINT
            return VideoError(f"{name} does not send readable video", hint)
        return VideoError(
            f"cannot read {name}: {ffmpeg.reason(problem)}", "check the address and whether it plays elsewhere"
        )


UNREADABLE_HINT = "does it play elsewhere? The formats of files are supported, and playlists over http"


class _Following:
    """A file object for FFmpeg that reads from a pipe or a growing file as data arrives.

    Attributes:
        waits: True while the file may still grow. In this case, `read` waits for more data at the end of the file.
    """

    def __init__(self, descriptor: int, timeout_s: float):
        self._file = os.fdopen(descriptor, "rb", buffering=0)
        self._timeout_s = timeout_s
        self.waits = False
        self._silent = False
        self._pipe = not stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.close = self._file.close
        if not self._pipe:  # FFmpeg treats an object with `seek` as a file
            self.seek = self._file.seek
            self.tell = self._file.tell

    def read(self, count: int) -> bytes:
        """Return at most `count` bytes, or an empty result at the end of the file.

        After a timeout, this method never waits again, because FFmpeg keeps reading after a timeout or at the end of a file, up to
        ten times in some formats. Therefore, the end of a file is final once the file has stopped growing for `timeout_s`. For a
        pipe, TimeoutError is raised only once, and all later calls return an empty result.

        Raises:
            TimeoutError: No data arrived from the pipe within `timeout_s`.
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

"""Decodes a span of a video's audio to mono float32 samples at 16 kHz for speech recognition.

Memory usage does not grow with the length of the audio, because `SoundReader.fill` returns one piece at a time.
"""

import math
from collections.abc import Iterator
from contextlib import suppress

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.packet import Packet
from av.stream import Discard

from evoprune.errors import VideoError
from evoprune.video.info import AUDIO_RATE, Video
from evoprune.video.readers import ffmpeg
from evoprune.video.readers.clock import BACK_S, longest_gap_s

GAP_S = 0.1  # a larger jump in timestamps starts a new piece
EARLIER_S = 0.5  # decoding starts this long before the requested start, because decoders need a few packets to settle
# Maximum total number of decoded values in all channels, enough for 100 hours of 48 kHz stereo.
MOST_VALUES = 2 * 48_000 * 100 * 3600

Run = tuple[float, np.ndarray]  # start in seconds from the first video frame, and float32 `[n]`


class SoundReader:
    """Decodes a span of a video's audio in pieces. For the arguments, see `evoprune.video.sound.read_audio`."""

    def __init__(self, info: Video, start_s: float, end_s: float):
        self._path = info.path
        self._damaged = 0
        self._runs = self._read(info, start_s, end_s)
        self._next: Run | None = None  # decoded samples that haven't been returned yet

    def fill(self, content: np.ndarray) -> dict[str, float | int | bool]:
        """Fill `content` with the next samples, stopping at any gap in the audio.

        Args:
            content: uint8 `[4 n]`, a buffer for n float32 samples.

        Returns:
            A dict with "start_s", the timestamp of the first sample in seconds from the first video frame; "samples", the number of
            samples written, at most n; "damaged", the number of undecodable packets so far; and "done", which is True if these are
            the last samples.
        """
        room = content.view(np.float32)
        start_s = 0.0
        filled = 0
        with ffmpeg.reading(self._path):
            while filled < len(room) and self._has_next():
                at_s, samples = self._next
                if not filled:
                    start_s = at_s
                elif abs(start_s + filled / AUDIO_RATE - at_s) > 1 / AUDIO_RATE:
                    break
                taken = samples[: len(room) - filled]
                room[filled : filled + len(taken)] = taken
                filled += len(taken)
                self._next = (at_s + len(taken) / AUDIO_RATE, samples[len(taken) :])
            done = not self._has_next()
        return {"start_s": start_s, "samples": filled, "damaged": self._damaged, "done": done}

    def close(self) -> None:
        self._runs.close()

    def _has_next(self) -> bool:
        while self._next is None or not len(self._next[1]):
            self._next = next(self._runs, None)
            if self._next is None:
                return False
        return True

    def _read(self, info: Video, start_s: float, end_s: float) -> Iterator[Run]:
        """Yield the audio between two times as runs in ascending order. A gap in the audio results in a gap between two runs."""
        with ffmpeg.open_video(info.path) as container:
            stream = container.streams.best("audio")
            if stream is None:
                return
            if stream.codec_context is None:  # FFmpeg has no decoder for this audio codec
                self._damaged += 1
                return
            for at_s, samples in self._resampled(stream, info, start_s):
                if at_s >= end_s:
                    return
                first = max(0, math.ceil((start_s - at_s) * AUDIO_RATE))
                end = math.ceil((end_s - at_s) * AUDIO_RATE)
                if first < min(end, len(samples)):
                    yield at_s + first / AUDIO_RATE, samples[first:end]

    def _resampled(self, stream: AudioStream, info: Video, start_s: float) -> Iterator[Run]:
        resampler = None
        begun_s = 0.0  # timestamp of the first sample in the current run
        made = 0  # number of samples in the current run so far
        given_s = 0.0  # end time of the last frame passed to the resampler
        # If the video's clock never restarts, there may be no sound for any length of time.
        longest_s = longest_gap_s(info.container) if info.clock_restarts else math.inf
        shift_s = 0.0  # offset to add to timestamps after the file's clock has restarted
        for frame, own_s in self._frames(stream, info, start_s):
            at_s = given_s if own_s is None else own_s + shift_s
            if resampler and not -BACK_S <= at_s - given_s <= longest_s:
                shift_s += given_s - at_s
                at_s = given_s
            pieces = []
            if resampler and abs(at_s - given_s) > GAP_S:
                pieces = resampler.resample(None)
                yield begun_s + made / AUDIO_RATE, _joined(pieces)
                resampler = None
            if resampler is None:
                resampler = AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE)
                begun_s = given_s = at_s
                made = 0
            frame.pts = None  # timestamps are computed here, not by the resampler
            try:
                pieces = resampler.resample(frame)
            except ValueError:  # raised if the audio format changes
                yield begun_s + made / AUDIO_RATE, _joined(resampler.resample(None))
                resampler = AudioResampler(format="flt", layout="mono", rate=AUDIO_RATE)
                begun_s = given_s
                made = 0
                pieces = resampler.resample(frame)
            samples = _joined(pieces)
            yield begun_s + made / AUDIO_RATE, samples
            made += len(samples)
            given_s += frame.samples / frame.sample_rate
        if resampler:
            yield begun_s + made / AUDIO_RATE, _joined(resampler.resample(None))

    def _frames(self, stream: AudioStream, info: Video, start_s: float) -> Iterator[tuple[AudioFrame, float | None]]:
        """Yield decoded audio frames with their timestamps in seconds from the first video frame (None if missing)."""
        container = stream.container
        # The index of an MP4 or MOV lets FFmpeg skip the packets of other tracks.
        if container.format.name == ffmpeg.MOV:
            for other in container.streams:
                if other.index != stream.index:
                    other.discard = Discard.all
        if start_s > EARLIER_S and not info.clock_restarts:
            with suppress(av.error.FFmpegError):  # the container isn't seekable
                at = math.floor((info.start_s + start_s - EARLIER_S) / stream.time_base)
                container.seek(at, stream=stream)
        values = 0
        settled = start_s <= EARLIER_S  # False right after seeking, while damage is ignored
        for packet in ffmpeg.packets(container, stream):
            if packet is not None and not packet.size and packet.dts is not None:
                continue
            frames: list[AudioFrame] = []
            broken = packet is None or packet.is_corrupt or packet.has_sidedata("encryption_info")
            if packet is None or not packet.has_sidedata("encryption_info"):
                try:
                    frames = ffmpeg.decoded(stream.codec_context, packet)
                except av.error.FFmpegError:
                    broken = True
            own_s = _time(packet, stream, info)
            settled = settled or own_s is None or own_s >= start_s
            if broken and settled:
                self._damaged += 1
            for frame in frames:
                ffmpeg.alive()
                values += frame.samples * max(1, frame.layout.nb_channels)
                if values > MOST_VALUES:
                    hint = "choose a shorter part of the video"
                    raise VideoError(f"the sound of {info.path} is longer than 100 hours", hint)
                if frame.samples and frame.sample_rate:
                    yield frame, _time(frame, stream, info)


def _time(data: Packet | AudioFrame | None, stream: AudioStream, info: Video) -> float | None:
    if data is None or data.pts is None:
        return None
    return float(data.pts * (data.time_base or stream.time_base)) - info.start_s


def _joined(frames: list[AudioFrame]) -> np.ndarray:
    pieces = [frame.to_ndarray()[0] for frame in frames]
    return np.concatenate(pieces) if pieces else np.empty(0, np.float32)

"""Decodes a whole video, and counts its frames, damage and intervals."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from evoprune.errors import VideoError
from evoprune.video.info import PICTURE, ScanResult, VideoInfo
from evoprune.video.readers import folder, pyav
from evoprune.video.readers.container import (
    FALLBACK_FPS,
    decode_in_threads,
    nothing_decoded,
    open_video,
    reading,
    video_stream,
)
from evoprune.video.readers.metadata import RATE_JITTER_S, probe


def scan(path: str, folder_fps: float) -> ScanResult:
    """See `evoprune.video.probe.scan`."""
    began = time.perf_counter()
    info = probe(path, folder_fps)
    if info.kind == PICTURE:
        raise VideoError(f"{path} is a picture, which has nothing to scan", "leave out --scan")
    tally = _Tally()
    frames = _images(info, tally) if info.container == folder.CONTAINER else _frames(info, tally)
    with reading(info.path):
        for time_s, length_s, key in frames:
            tally.add(time_s, length_s, key)
    if not tally.frames:
        raise nothing_decoded(info.path)
    keyframes = tally.keyframes + Counter([_rounded(tally.end_s - tally.key_s)])
    median_gap = _median(tally.gaps)
    irregular = sum(n for gap, n in tally.gaps.items() if abs(gap - median_gap) > RATE_JITTER_S)
    return ScanResult(
        frames=tally.frames,
        damaged=tally.damaged,
        duration_s=tally.end_s - tally.first_s,
        stated_s=info.stated_s,
        variable_rate=irregular > tally.damaged,
        largest_gap_s=max(tally.gaps, default=0.0),
        keyframe_median_s=_median(keyframes),
        keyframe_max_s=max(keyframes),
        seconds=time.perf_counter() - began,
    )


@dataclass
class _Tally:
    """Counts over the frames so far. Times in seconds; `gaps` and `keyframes` count intervals by their rounded length."""

    frames: int = 0
    damage: set[int | None] = field(default_factory=set)
    first_s: float = 0.0
    last_s: float = 0.0
    end_s: float = 0.0
    key_s: float = 0.0
    gaps: Counter[float] = field(default_factory=Counter)
    keyframes: Counter[float] = field(default_factory=Counter)

    def add(self, time_s: float, length_s: float, key: bool) -> None:
        if not self.frames:
            self.first_s = self.key_s = time_s
        else:
            self.gaps[_rounded(time_s - self.last_s)] += 1
            if key:
                self.keyframes[_rounded(time_s - self.key_s)] += 1
                self.key_s = time_s
        self.frames += 1
        self.last_s = time_s
        self.end_s = max(self.end_s, time_s + length_s)

    @property
    def damaged(self) -> int:
        return len(self.damage)


def _frames(info: VideoInfo, tally: _Tally) -> Iterator[tuple[float, float, bool]]:
    """Of each frame: its time and duration in seconds, and whether it is a keyframe."""
    with open_video(info.path) as container:
        stream = video_stream(container, info.path)
        decode_in_threads(stream)
        step = 1 / (info.fps or FALLBACK_FPS)
        for time_s, frame in pyav.decode(container, stream, info, tally.damage.add):
            length = frame.duration if frame.pts is not None else 0
            yield time_s, float((length or 0) * stream.time_base) or step, frame.key_frame


def _images(info: VideoInfo, tally: _Tally) -> Iterator[tuple[float, float, bool]]:
    for i, image in enumerate(folder.list_images(info.path)):
        if folder.decode_image(image) is None:
            tally.damage.add(i)
        else:
            yield i / info.fps, 1 / info.fps, True


def _rounded(seconds: float) -> float:
    return round(seconds, 4)  # equal intervals are counted together


def _median(counts: Counter[float]) -> float:
    values = sorted(counts)
    half = sum(counts.values()) / 2
    sums = accumulate(counts[value] for value in values)
    return next((value for value, so_far in zip(values, sums, strict=True) if so_far >= half), 0.0)

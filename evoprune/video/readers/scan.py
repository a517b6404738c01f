"""Decodes a whole video, and counts its frames, damage and intervals."""

import time
from collections import Counter
from itertools import accumulate

from evoprune.errors import VideoError
from evoprune.video.info import PICTURE, ScanResult
from evoprune.video.readers import ffmpeg, folder, pyav
from evoprune.video.readers.metadata import RATE_JITTER_S, probe


def scan(path: str, folder_fps: float) -> ScanResult:
    """See `evoprune.video.probe.scan`."""
    began = time.perf_counter()
    info = probe(path, folder_fps)
    if info.kind == PICTURE:
        raise VideoError(f"{path} is a picture, which has nothing to scan", "leave out --scan")
    reader = folder if info.container == folder.CONTAINER else pyav
    damage, frames, end_s = set(), 0, 0.0
    gaps, keyframes = (
        Counter(),
        Counter(),
    )  # of intervals by their length, rounded so that equal ones are counted together
    with ffmpeg.reading(path):
        for time_s, length_s, key in reader.intervals(info, damage.add):
            if not frames:
                first_s = last_s = key_s = time_s
            else:
                gaps[round(time_s - last_s, 4)] += 1
                if key:
                    keyframes[round(time_s - key_s, 4)] += 1
                    key_s = time_s
            frames, last_s, end_s = frames + 1, time_s, max(end_s, time_s + length_s)
    if not frames:
        raise ffmpeg.nothing_decoded(path)
    keyframes[round(end_s - key_s, 4)] += 1
    median_gap = _median(gaps)
    irregular = sum(n for gap, n in gaps.items() if abs(gap - median_gap) > RATE_JITTER_S)
    return ScanResult(
        frames=frames,
        damaged=len(damage),
        duration_s=end_s - first_s,
        stated_s=info.stated_s,
        variable_rate=irregular > len(damage),
        largest_gap_s=max(gaps, default=0.0),
        keyframe_median_s=_median(keyframes),
        keyframe_max_s=max(keyframes),
        seconds=time.perf_counter() - began,
    )


def _median(counts: Counter[float]) -> float:
    values = sorted(counts)
    half = sum(counts.values()) / 2
    sums = accumulate(counts[value] for value in values)
    return next((value for value, so_far in zip(values, sums, strict=True) if so_far >= half), 0.0)

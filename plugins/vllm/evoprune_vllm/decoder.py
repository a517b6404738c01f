"""A decoder of videos for vLLM, beside its own (OpenCV, TorchCodec): this project's reader, in a process apart.

vLLM's loader of a model chooses frames by their numbers, as with its own decoders. The reader decodes no more than these need.
"""

import numpy as np
from vllm.multimodal.video_decoders.base import VideoSourceMetadata, VideoTargetMetadata, check_frame_pixel_limit

from evoprune.errors import VideoError
from evoprune.video import PICTURE, FrameTimes, Video, frame_times, in_one, probe, temporary_file

OPTIONS = {"num_ffmpeg_threads": 0}  # with their defaults; named as TorchCodec's in vLLM


def decode_evoprune(
    loader_cls, data: bytes, target: VideoTargetMetadata, sampling_kwargs: dict, *, num_ffmpeg_threads: int = 0
) -> tuple[np.ndarray, VideoSourceMetadata, list[int], list[int]]:
    """Return the frames that a loader of vLLM wants of a file, as `decode_opencv` returns them.

    Args:
        num_ffmpeg_threads: cores that may be kept busy; 0: all that this process may use.

    Returns uint8 `[n, H, W, 3]`, RGB; the number of frames, the rate and the length; the numbers that the loader wants, and those
    that were read, which leave out what is repeated or lies behind the last frame.

    Raises:
        ValueError: it cannot be read, is a picture, or is so short that the loader wants no frame; or threads are no number.
        OutOfMemory: there is no memory for the frames.
    """
    if not isinstance(num_ffmpeg_threads, int) or num_ffmpeg_threads < 0:
        raise ValueError(f"num_ffmpeg_threads is {num_ffmpeg_threads!r}, not a number of threads; 0: one for each core")
    try:
        with temporary_file([data], "the video") as path:
            info = probe(path)
            if info.kind == PICTURE:
                raise VideoError("a picture was sent as a video", "send it as image_url")
            check_frame_pixel_limit(info.width, info.height)
            times = frame_times(info)
            source = loader_cls._prepare_source(described(info, times))
            wanted = loader_cls.compute_frames_index_to_sample(source=source, target=target, **sampling_kwargs)
            read = sorted({number for number in wanted if number < len(times.times_s)})
            if not read:
                raise VideoError(f"no frame is sampled of a video of {source.duration:g} s", "ask for more frames")
            middles = middles_of(times.times_s)
            frames, _ = in_one(info, [middles[number] for number in read], cores=num_ffmpeg_threads or None)
    except VideoError as problem:
        raise ValueError("; ".join(filter(None, (problem.message, problem.hint)))) from problem
    return frames, source, wanted, read


def described(info: Video, times: FrameTimes) -> VideoSourceMetadata:
    """Return what vLLM's decoders say of a file. The header counts its frames as for OpenCV, if it is right within one frame."""
    count = len(times.times_s)
    total = times.stated if times.stated and abs(times.stated - count) <= 1 else count
    rate = info.fps or count / (info.duration_s or count)
    return VideoSourceMetadata(total, rate, total / rate)


def middles_of(times_s: list[float]) -> list[float]:
    """Return for each frame a time in the middle of those at which it is on screen."""
    following = [*times_s[1:], times_s[-1]]
    return [(time + end) / 2 for time, end in zip(times_s, following, strict=True)]

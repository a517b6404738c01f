"""A vLLM video decoder that uses evoprune's reader, which runs in a separate process.

It can be selected instead of vLLM's own decoders, OpenCV and TorchCodec. As with these decoders, the model's loader selects frames
by index. The reader decodes only as much of the video as required for these frames.
"""

import numpy as np
from vllm.multimodal.video_decoders.base import VideoSourceMetadata, VideoTargetMetadata, check_frame_pixel_limit

from evoprune.errors import VideoError
from evoprune.video import Video, frame_times, in_one, probe, temporary_file

OPTIONS = {"num_ffmpeg_threads": 0}  # defaults; vLLM's TorchCodec decoder uses the same option names


def decode_evoprune(
    loader_cls, data: bytes, target: VideoTargetMetadata, sampling_kwargs: dict, *, num_ffmpeg_threads: int = 0
) -> tuple[np.ndarray, VideoSourceMetadata, list[int], list[int]]:
    """Decode the video frames selected by a vLLM loader. The interface is the same as for vLLM's `decode_opencv`.

    Args:
        num_ffmpeg_threads: The number of cores to use. 0 means all cores available to this process.

    Returns:
        The RGB frames, uint8 `[n, H, W, 3]`; the file's metadata; the indices requested by the loader; and the indices of the
        frames read, without duplicates or indices beyond the last frame.

    Raises:
        ValueError: If the file can't be read, is an image, or is so short that the loader selects no frames, or if the number of
            threads is invalid.
        OutOfMemory: If the frames don't fit in memory.
    """
    if not isinstance(num_ffmpeg_threads, int) or num_ffmpeg_threads < 0:
        raise ValueError(f"num_ffmpeg_threads is {num_ffmpeg_threads!r}, not a number of threads; 0: one for each core")
    try:
        with temporary_file([data], "the video") as path:
            info = probe(path)
            if info.is_picture:
                raise VideoError("an image was sent as a video", "send it as image_url")
            check_frame_pixel_limit(info.width, info.height)
            times = frame_times(info)
            source = loader_cls._prepare_source(described(info, len(times.times_s), times.stated))
            wanted = loader_cls.compute_frames_index_to_sample(source=source, target=target, **sampling_kwargs)
            read = sorted({number for number in wanted if number < len(times.times_s)})
            if not read:
                raise VideoError(f"no frame is sampled from a video of {source.duration:g} s", "ask for more frames")
            middles = middles_of(times.times_s)
            frames, _ = in_one(info, [middles[number] for number in read], cores=num_ffmpeg_threads or None)
    except VideoError as problem:
        raise ValueError("; ".join(filter(None, (problem.message, problem.hint)))) from problem
    return frames, source, wanted, read


def described(info: Video, count: int, stated: int) -> VideoSourceMetadata:
    """Return a video file's metadata in vLLM's decoder format.

    As in OpenCV, the frame count is taken from the file header unless it differs from the actual count by more than one.

    Args:
        count: The actual number of frames.
        stated: The frame count stated in the header, or 0 if missing.
    """
    total = stated if stated and abs(stated - count) <= 1 else count
    rate = info.fps or count / (info.duration_s or count)
    return VideoSourceMetadata(total, rate, total / rate)


def middles_of(times_s: list[float]) -> list[float]:
    """Return the midpoint of each frame's display time, given the frames' start timestamps."""
    following = [*times_s[1:], times_s[-1]]
    return [(time + end) / 2 for time, end in zip(times_s, following, strict=True)]

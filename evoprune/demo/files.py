"""Video files of drawn frames, the same file each time."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from evoprune.video.info import DEMO_TAG


def write_frames(
    frames: Iterable[np.ndarray],
    path: str | Path,
    size: tuple[int, int],
    fps: int,
    codec: str = "libx264",
    crf: int = 18,
    preset: str = "medium",
    tag: str = DEMO_TAG,
) -> None:
    """Encodes uint8 frames `[height, width, 3]` as a video file, with the generator's `tag` as the container's `comment`.

    Args:
        size: height and width, even.
        crf: the codec's constant rate factor.

    Raises OSError: the file cannot be written.
    """
    import av

    # Macroblock trees differ from run to run on some processors; without them a clip is always the same file.
    x264 = {"preset": preset, "x264-params": "mbtree=0"}
    vp9 = "vp9" in codec
    with av.open(str(path), "w", options={"fflags": "+bitexact"} if vp9 else {}) as container:  # WebM: no random id
        container.metadata["comment"] = tag
        stream = container.add_stream(codec, rate=fps, options={"crf": str(crf)} | ({"b": "0"} if vp9 else x264))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # what comes out depends on their number
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())

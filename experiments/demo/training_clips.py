"""Training-only clips: crowded single grids, and frames with codec artifacts. Imported by `batches`."""

from fractions import Fraction

import numpy as np

from experiments.demo.clips import COLOURS, SHAPES, Clip, Thing, place


def dense_grid(rng: np.random.Generator, height: int, width: int, count: int) -> Clip:
    """Return a one-second scene crowded with up to `count` objects, for training the tower."""
    things: list[Thing] = []
    for _ in range(count):
        kind = str(rng.integers(10)) if rng.random() < 0.4 else str(rng.choice(SHAPES))
        place(things, rng, kind, str(rng.choice(list(COLOURS))), height, width, 1.0, 1.0, (1, 0, 0, 0))
    seed = tuple(int(v) for v in rng.integers(2**31, size=2))
    clutter = float(rng.uniform(50, 300)) if rng.random() < 0.5 else 0.0
    return Clip(seed, height, width, 1.0, tuple(things), float(rng.uniform(1, 5)), clutter=clutter)


def through_codec(frames: np.ndarray, quality: int, gop: int = 12) -> np.ndarray:
    """Return the frames after MPEG-4 compression: uint8 `[T, H, W, 3]`, with even height and width.

    Args:
        frames: uint8 `[T, H, W, 3]`.
        quality: The quantizer, from 2 (fine) to 31 (coarse).
        gop: The number of frames between keyframes.
    """
    import av

    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width = frames.shape[2]
    encoder.height = frames.shape[1]
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, 12)
    encoder.gop_size = gop
    encoder.options = {"qmin": str(quality), "qmax": str(quality)}
    encoder.thread_count = 1
    decoder = av.CodecContext.create("mpeg4", "r")
    packets = [p for f in frames for p in encoder.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
    packets += encoder.encode()
    decoder.extradata = encoder.extradata
    decoded = [f for p in packets for f in decoder.decode(p)] + decoder.decode(None)
    return np.stack([f.to_ndarray(format="rgb24") for f in decoded])

"""From a decoded frame to RGB pixels as displayed."""

import math

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter


def orientation(frame: VideoFrame) -> tuple[int, bool]:
    """Clockwise rotation in degrees (0, 90, 180 or 270), and whether a left-right flip comes before it."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV cannot list side data that includes EXIF, but it reads the rotation
        return round(-frame.rotation / 90) * 90 % 360, False
    if matrix is None:
        return 0, False
    # Row vectors times the matrix, y downwards: the image's x axis goes to (a, b), its y axis to (c, d).
    a, b, _, c, d = (int(x) for x in np.frombuffer(matrix, np.int32, count=5))
    mirrored = a * d < b * c
    if mirrored:
        a, b = -a, -b
    return round(math.degrees(math.atan2(b, a)) / 90) * 90 % 360, mirrored


def to_rgb(
    frame: VideoFrame, width: int, height: int, rotation_deg: int, mirrored: bool, reformatter: VideoReformatter
) -> np.ndarray:
    """uint8 `[height, width, 3]`: the frame by libswscale's default conversion, rotated and scaled to this size."""
    stored = (width, height) if rotation_deg % 180 == 0 else (height, width)
    return rotated(reformatter.reformat(frame, *stored, format="rgb24").to_ndarray(), rotation_deg, mirrored)


def rotated(rgb: np.ndarray, rotation_deg: int, mirrored: bool) -> np.ndarray:
    """A view of stored pixels `[h, w, 3]` as displayed: flipped left to right if `mirrored`, then rotated clockwise."""
    if mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, -rotation_deg // 90)  # rot90 rotates anticlockwise

"""From a decoded frame to RGB pixels as displayed."""

import math

import numpy as np
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

# For every value of EXIF's orientation, as `orientation`: clockwise degrees, and whether a left-right flip comes first.
ORIENTATION_TAG = 0x0112
ORIENTATIONS = {
    1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True),
    5: (270, True), 6: (90, False), 7: (90, True), 8: (270, False),
}  # fmt: skip


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


def turned_size(size: tuple[int, int], rotation_deg: int) -> tuple[int, int]:
    """The two sides of a frame after a rotation, or before it."""
    return size if rotation_deg % 180 == 0 else size[::-1]


def may_be_transparent(form: VideoFormat) -> bool:
    return form.has_palette or any(component.is_alpha for component in form.components)


def over_white(frame: VideoFrame, reformatter: VideoReformatter) -> VideoFrame:
    """The frame with its transparent parts over white, as those of pictures are; itself without any."""
    if not may_be_transparent(frame.format):
        return frame
    rgba = reformatter.reformat(frame, format="rgba").to_ndarray().astype(np.uint16)
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return frame
    mixed = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return VideoFrame.from_ndarray(mixed.astype(np.uint8), format="rgb24")


def to_rgb(
    frame: VideoFrame, width: int, height: int, rotation_deg: int, mirrored: bool, reformatter: VideoReformatter
) -> np.ndarray:
    """uint8 `[height, width, 3]`: the frame by libswscale's default conversion, rotated and scaled to this size."""
    stored, frame = turned_size((width, height), rotation_deg), over_white(frame, reformatter)
    return rotated(reformatter.reformat(frame, *stored, format="rgb24").to_ndarray(), rotation_deg, mirrored)


def rotated(rgb: np.ndarray, rotation_deg: int, mirrored: bool) -> np.ndarray:
    """A view of stored pixels `[h, w, 3]` as displayed: flipped left to right if `mirrored`, then rotated clockwise."""
    if mirrored:
        rgb = rgb[:, ::-1]
    return np.rot90(rgb, -rotation_deg // 90)  # rot90 rotates anticlockwise

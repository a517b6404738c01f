"""What `verify` looks at where no file is named: a clip and pictures made by formula, the same pixels everywhere."""

from pathlib import Path

import numpy as np

from evoprune.profiling import synthetic

FRAMES, HEIGHT, WIDTH = 8, 120, 180  # no multiples of 28 or 32: frames are resized


def write_material(folder: Path) -> tuple[Path, Path, Path]:
    """A clip in which things move, a clip that stands still, and a picture: two folders of frames and a file."""
    moving, still = (_clip(kind) for kind in ("motion", "static90"))
    clips = folder / "moving", folder / "still"
    for place, frames in zip(clips, (moving, still[:1].repeat(FRAMES, 0)), strict=True):
        place.mkdir()
        for number, frame in enumerate(frames):
            _write(place / f"{number}.png", frame)
    _write(folder / "picture.png", still[0])
    return *clips, folder / "picture.png"


def _clip(kind: str) -> np.ndarray:
    """uint8 `[frames, height, width, 3]`."""
    unit = synthetic.UNIT
    whole = synthetic.clip(kind, FRAMES, *(-(-side // unit) * unit for side in (HEIGHT, WIDTH)))
    return np.ascontiguousarray(whole[:, :HEIGHT, :WIDTH])


def _write(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path)

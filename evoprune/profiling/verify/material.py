"""What `verify` looks at where no file is named: a clip and pictures made by formula, the same pixels everywhere."""

from pathlib import Path

import numpy as np

from evoprune.profiling import synthetic

FRAMES, HEIGHT, WIDTH = 8, 120, 180  # no multiples of 28 or 32: frames are resized


def write_material(folder: Path) -> tuple[Path, Path, Path]:
    """A clip in which things move, a clip that stands still, and a picture: two folders of frames and a file."""
    from PIL import Image

    moving, still = (_clip(kind) for kind in ("motion", "static90"))
    for name, frames in (("moving", moving), ("still", still[:1].repeat(FRAMES, 0)), ("picture", still[:1])):
        (folder / name).mkdir()
        for number, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / name / f"{number}.png")
    return folder / "moving", folder / "still", folder / "picture" / "0.png"


def _clip(kind: str) -> np.ndarray:
    """uint8 `[frames, height, width, 3]`."""
    unit = synthetic.UNIT
    whole = synthetic.clip(kind, FRAMES, *(-(-side // unit) * unit for side in (HEIGHT, WIDTH)))
    return np.ascontiguousarray(whole[:, :HEIGHT, :WIDTH])

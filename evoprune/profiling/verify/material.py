"""What `verify` looks at where no file is named: a clip and pictures made by formula, the same pixels everywhere."""

from pathlib import Path

import numpy as np

from evoprune.profiling import synthetic

FRAMES, HEIGHT, WIDTH = 8, 112, 168


def write_material(folder: Path) -> tuple[Path, Path, Path]:
    """A clip in which things move, a clip that stands still, and a picture: two folders of frames and a file."""
    moving, still = (synthetic.clip(kind, FRAMES, HEIGHT, WIDTH) for kind in ("motion", "static90"))
    clips = folder / "moving", folder / "still"
    for place, frames in zip(clips, (moving, still[:1].repeat(FRAMES, 0)), strict=True):
        place.mkdir()
        for number, frame in enumerate(frames):
            _write(place / f"{number}.png", frame)
    _write(folder / "picture.png", still[0])
    return *clips, folder / "picture.png"


def _write(path: Path, frame: np.ndarray) -> None:
    from PIL import Image

    Image.fromarray(frame).save(path)

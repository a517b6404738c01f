"""The models that come with the package, by name: where each is, and what it was trained on."""

from dataclasses import dataclass
from pathlib import Path

_DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class Demo:
    """A demo model.

    Attributes:
        folder: its files.
        world: the name of the generator whose clips it knows.
        inputs: the most videos and pictures that a prompt of its training had.
    """

    folder: Path
    world: str
    inputs: int


DEMOS = {
    "demo": Demo(_DEMO / "weights", "shapes", inputs=1),
    "demo-scenes": Demo(_DEMO / "weights_scenes", "scenes", inputs=2),
}


def demo_in(folder: Path | None) -> Demo | None:
    """The demo model in a folder; None for any other folder, or none."""
    if folder is None:
        return None
    return next((demo for demo in DEMOS.values() if demo.folder.resolve() == folder.resolve()), None)


def demo_knowing(world: str) -> str | None:
    """The name of the demo model that knows the clips of a world; None if none does."""
    return next((name for name, demo in DEMOS.items() if demo.world == world), None)

"""The checkpoint, videos, images, and requests of `experiments.speed.serving`."""

import json
from pathlib import Path
from typing import Any

from experiments.speed.serving_client import message

LAYERS = 4
FRAMES = 20
FPS = 2
# The size of a frame and of an image in units. Without pruning, each unit of a frame pair or an image becomes one token.
UNITS = (4, 8)
IMAGE_UNITS = (16, 24)
FILES = 80  # enough for one server's loads
AT_ONCE = 16
IN_TURN = 5  # requests of a load without concurrency; one more is sent first and isn't counted
# Concurrent requests about the same video. All other requests ask the first question.
QUESTIONS = ("What happens first?", "What happens last?", "What moves left?", "What moves right?")
ONE = "one request at a time"
MANY = f"{AT_ONCE} concurrent requests"
IMAGES = "images, one request at a time"


def prepare(checkpoint: Path, model: str) -> None:
    """Write a checkpoint with a model's dimensions and the settings of the Hugging Face processor, which vLLM requires."""
    from evoprune.bundled import DEMOS
    from experiments.speed.checkpoint import write_checkpoint

    write_checkpoint(checkpoint, model, layers=LAYERS)
    unit = unit_of(checkpoint)
    area = FRAMES * UNITS[0] * UNITS[1] * unit**2
    more = {"patch_size": unit // 2, "size": {"shortest_edge": 12_544, "longest_edge": area}}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((DEMOS["demo"].folder / name).read_text(encoding="utf-8")) | more
        (checkpoint / name).write_text(json.dumps(settings), encoding="utf-8")


def unit_of(checkpoint: Path) -> int:
    """Return the side length of a unit in pixels."""
    return 2 * json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vision_config"]["patch_size"]


def write_files(folder: Path, unit: int) -> None:
    """Write videos and images of ordinary motion, each shifted differently. `unit` is the side length of a unit in pixels."""
    import numpy as np
    from PIL import Image

    from evoprune.bench import synthetic_clip
    from experiments.demo.painting import write_frames

    size = UNITS[0] * unit, UNITS[1] * unit
    clip = synthetic_clip("motion", FRAMES, *size, unit)
    image = synthetic_clip("motion", 2, IMAGE_UNITS[0] * unit, IMAGE_UNITS[1] * unit, unit)[0]
    for number in range(FILES):
        shifted = np.roll(clip, (7 * number, 11 * number), (1, 2))
        write_frames(shifted, folder / f"{number}.mp4", size, FPS)
        Image.fromarray(np.roll(image, (7 * number, 11 * number), (0, 1))).save(folder / f"{number}.png")


def requests_of(load: str, folder: Path, first: int) -> list[list[dict[str, Any]]]:
    """Return the messages of each of a load's requests. `first` is the number of the first file that they may be about."""

    def ask(
        number: int, question: str = QUESTIONS[0], kind: str = "video", suffix: str = "mp4"
    ) -> list[dict[str, Any]]:
        return message(kind, f"file://{folder}/{number}.{suffix}", question)

    if load == MANY:
        others = AT_ONCE - len(QUESTIONS)
        requests = [ask(first + number) for number in range(1, 1 + others)]
        for place, question in enumerate(QUESTIONS):
            requests.insert(len(QUESTIONS) * place, ask(first, question))
        return requests
    more = ("image", "png") if load == IMAGES else ()
    return [ask(first + number, QUESTIONS[0], *more) for number in range(1 + IN_TURN)]

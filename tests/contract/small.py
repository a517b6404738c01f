"""Generated inputs, and compact forms of results."""

import functools
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from PIL import Image

import evoprune
from tests.contract.running import digest, packed

Held = dict[str, object]
FRAMES, HEIGHT, WIDTH = 12, 112, 140  # 6 frame pairs of 4x5 units


def ground(seed: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return an image uint8 `[height, width, 3]` of squares of 14 pixels, each of one colour."""
    colours = np.random.default_rng(seed).integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    return colours.repeat(14, 0).repeat(14, 1)


def still(frames: int = FRAMES) -> np.ndarray:
    """Return a clip uint8 `[frames, H, W, 3]`: a red square moves over a static ground, so most units do not change."""
    clip = np.stack([ground(0)] * frames)
    for number, frame in enumerate(clip):
        left = 8 * number % (WIDTH - 28)
        frame[42:70, left : left + 28] = (255, 0, 0)
    return clip


def moving(frames: int = FRAMES) -> np.ndarray:
    """Return a clip uint8 `[frames, H, W, 3]`: the whole image moves with each frame, so all units change."""
    wide = ground(1, width=WIDTH + 14 * frames)
    return np.stack([wide[:, 11 * number : 11 * number + WIDTH] for number in range(frames)])


def picture() -> Image.Image:
    return Image.fromarray(ground(2))


def filmed(frames: int) -> np.ndarray:
    """Return a clip uint8 `[frames, H, W, 3]`: a static scene, then a local change, then a cut to another static scene."""
    first, second = frames // 3, frames * 2 // 3
    clip = np.stack([ground(3)] * second + [ground(4)] * (frames - second))
    for number in range(first, second):
        clip[number, :28, 28 : 28 + 4 * (number - first + 1)] = (0, 20 * number % 256, 255)
    return clip


@functools.cache
def demo(name: str = "demo"):
    """Return a bundled model in float32, loaded once."""
    return evoprune.VideoQA.load(name, dtype="fp32", device="cpu").loaded


def sums(rows: torch.Tensor, at: torch.Tensor | Sequence[int] | None = None) -> list[float]:
    """Return four weighted sums of the numbers in `rows`, `[n]` or `[n, D]`, divided by the Euclidean norm.

    The weight of a number depends on its column and on `at`, the position of its row (int64 `[n]`; default: 0, 1, 2, ...). The
    sums therefore change if rows are swapped, but hardly if only the last bits of a number change.
    """
    if not rows.numel():
        return []
    rows = rows.detach().cpu().double().reshape(len(rows), -1)
    at = torch.arange(len(rows)) if at is None else torch.as_tensor(at).cpu()
    columns = torch.arange(rows.shape[1]).double()
    made = []
    for step in (0.5, 1.1, 1.9, 2.7):
        weighed = torch.cos(step * at.double()) @ rows @ torch.cos(0.6 + step * columns)
        made.append(round(float(weighed / rows.norm()), 4))
    return made


def steps(pairs: Sequence[Sequence[int]] | None) -> list[list[int]] | None:
    """Return the pairs (layer, count) whose count differs from the previous layer; None for None."""
    before = [(0, -1), *(pairs or ())]
    return pairs and [list(each) for last, each in pairwise(before) if last[1:] != each[1:]]


def runs(numbers: Sequence[int]) -> str:
    """Write integers as a short text: 3..7 means 3, 4, 5, 6, 7, and 2x4 means 2, 2, 2, 2."""
    texts: list[str] = []
    at = 0
    while at < len(numbers):
        first, rest = numbers[at], numbers[at:]
        same = next((i for i, each in enumerate(rest) if each != first), len(rest))
        upwards = next((i for i, each in enumerate(rest) if each != first + i), len(rest))
        length = max(same, upwards)
        texts.append(
            f"{first}" if length == 1 else f"{first}x{length}" if same > 1 else f"{first}..{first + length - 1}"
        )
        at += length
    return " ".join(texts)


def owners(unit_to_row: torch.Tensor) -> list[int]:
    """Return, for each unit, the first unit with the same row (-1 for none). The order of rows does not matter."""
    first: dict[int, int] = {-1: -1}
    return [first.setdefault(row, unit) for unit, row in enumerate(unit_to_row.tolist())]


def encoded(made: evoprune.Encoded) -> Held:
    """Return the content of an `Encoded`: units, rows per layer, and sums of features, rows and sizes, in any order of rows."""
    units = (made.unit_to_row >= 0).nonzero()[:, 0]
    held: Held = {
        "units kept": made.kept.tolist(),
        "units owner": packed(owners(made.unit_to_row)),
        "layers": steps(made.layers),
        "features": sums(made.features, made.kept),
        "rows": [len(made.rows), *sums(made.rows[made.unit_to_row[units]], units)],
    }
    if made.size is not None:
        held["sizes"] = [round(float(made.size.max()), 3), *sums(made.size, made.kept)]
    if made.deepstack is not None:
        held["deepstack"] = [sums(level, made.kept) for level in made.deepstack]
    whole = [made.features.cpu(), *(each.cpu() for each in (made.size, made.deepstack) if each is not None)]
    return held | {"exact bits": [digest(each) for each in whole]}

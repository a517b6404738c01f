"""PixelPrune: which units are predicted, and the encoding of what is left."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from evoprune import methods
from evoprune.methods import TowerShape
from evoprune.vision import EncoderRun, encode_rows, pixel_patches
from tests.methods.tokens import encoded
from tests.vision.tower import random_patches, tiny_tower

GRID = (4, 5, 6)


def drawn(seed: int, colors: int, grid=GRID) -> torch.Tensor:
    """Return patches of units with few different contents, `[T * H * W * 4, 1176]`."""
    random = torch.Generator().manual_seed(seed)
    contents = torch.randint(0, 256, (colors, 4, 1176), generator=random, dtype=torch.uint8)
    # Blocks of equal units, with some noise, and frame pairs that mostly repeat the one before.
    which = torch.randint(0, colors, grid, generator=random)
    for axis in (1, 2):
        copied = torch.rand(grid, generator=random) < 0.5
        which = torch.where(copied, which.roll(1, axis), which)
    for pair in range(1, grid[0]):
        still = torch.rand(grid[1:], generator=random) < 0.7
        which[pair] = torch.where(still, which[pair - 1], which[pair])
    return contents[which.flatten()].flatten(0, 1)


def parent_of(units: list[list[list[bytes]]], t: int, y: int, x: int) -> tuple[int, int, int]:
    """Return the unit that predicts a unit, or the unit itself."""
    here = units[t][y][x]
    if y and x:
        a, b, c = units[t][y][x - 1], units[t][y - 1][x], units[t][y - 1][x - 1]
        guess = (t, y - 1, x) if c == a and c != b else (t, y, x - 1)
    else:
        guess = (t, y, x - 1) if x else (t, y - 1, x) if y else None
    if guess and units[t][guess[1]][guess[2]] == here:
        return guess
    if t and units[t - 1][y][x] == here:
        return t - 1, y, x
    return t, y, x


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("piece", [10**6, 1])
def test_units_are_predicted_by_the_rule(seed, piece):
    patches = drawn(seed, 2 + seed)
    t, h, w = GRID
    flat = [bytes(unit) for unit in patches.view(t * h * w, -1).numpy()]
    units = [[[flat[(i * h + y) * w + x] for x in range(w)] for y in range(h)] for i in range(t)]

    def origin(*unit: int) -> tuple[int, ...]:
        parent = parent_of(units, *unit)
        return unit if parent == unit else origin(*parent)

    places = [(i, y, x) for i in range(t) for y in range(h) for x in range(w)]
    numbers = [(i * h + y) * w + x for i, y, x in map(lambda each: origin(*each), places)]
    run = EncoderRun(tiny_tower(), plan_of("pixelprune", 9), piece_units=piece)
    rows = run.embed([patches])
    assert rows.unit[rows.unit_to_row].tolist() == numbers
    assert len(rows) == len({*numbers}) < len(places) and run.counts == tuple(
        sum(number // (h * w) == i for number in {*numbers}) for i in range(t)
    )


def plan_of(name: str, keep: int):
    return methods.MethodChain.parse(name).plan(TowerShape.of_tower(tiny_tower()), GRID, keep)


# Recorded from the rule in pixelprune/methods/pred_2d.py of OPPO-Mente-Lab/PixelPrune (0bf89f3), for single frame pairs.
AUTHORS = json.loads((Path(__file__).parent / "fixtures" / "pixelprune" / "kept.json").read_text())


@pytest.mark.parametrize("seed", range(6))
def test_a_picture_keeps_the_units_that_the_authors_code_keeps(seed):
    grid = (1, 8, 9)
    plan = methods.MethodChain.parse("pixelprune").plan(TowerShape.of_tower(tiny_tower()), grid, 9)
    rows = EncoderRun(tiny_tower(), plan).embed([drawn(seed, 2 + seed, grid)])
    assert sorted(rows.unit.tolist()) == AUTHORS[seed]


def test_without_equal_units_nothing_changes():
    patches = random_patches(GRID)
    made, expected = (
        encoded(methods.MethodChain.parse(name), patches, GRID, 20) for name in ("pixelprune", "divprune")
    )
    assert torch.equal(made.kept, expected.kept) and torch.equal(made.features, expected.features)


def test_equal_units_have_the_features_that_they_have_without_pruning():
    """All units of a frame pair without texture look the same, so their rows equal those of the whole frame pair."""
    patches = torch.full((30 * 4, 1176), 90, dtype=torch.uint8)
    grid = (1, 5, 6)
    chain = methods.MethodChain.parse("pixelprune+visionzip")
    made = encode_rows(tiny_tower(), [patches], chain.plan(TowerShape.of_tower(tiny_tower()), grid, 3))
    assert [count for _, count in made.layers] == [1] * 4
    assert len(made.select_tokens().kept) == 3


@pytest.mark.parametrize("name", ["pixelprune", "pixelprune+visionzip", "pixelprune+cdpruner"])
def test_the_result_does_not_depend_on_the_chunk_size(name):
    patches = drawn(3, 5)
    args = methods.MethodChain.parse(name), patches, GRID, 23
    question = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    whole, *others = (encoded(*args, question=question, piece_units=size) for size in (10**6, 1, 40))
    assert len(whole.kept) == 23 and whole.layers[0][1] < 120
    for other in others:
        assert torch.equal(other.kept, whole.kept)
        torch.testing.assert_close(other.features, whole.features, atol=2e-5, rtol=1e-5)


# Generated slides and screens with text, of 38x68 units.


SIZE = 68 * 28, 38 * 28
LINES = (
    "Visual tokens dominate the prompt", "Most of a slide is background", "Pruning before the encoder",
    "saves time in every layer", "Results on three benchmarks", "Limits and future work",
)  # fmt: skip


def page(color: str = "white") -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", SIZE, color)
    return image, ImageDraw.Draw(image)


def slide() -> Image.Image:
    image, draw = page()
    draw.rectangle((0, 0, SIZE[0], 140), fill="#143c78")
    draw.text((60, 35), "Why prune visual tokens?", font=ImageFont.load_default(64), fill="white")
    for i, line in enumerate(LINES):
        draw.text((100, 220 + i * 110), f"- {line}", font=ImageFont.load_default(44), fill="black")
    for i, (height, color) in enumerate(((300, "#c83c3c"), (420, "#3ca03c"), (180, "#3c3cc8"))):
        draw.rectangle((1300 + i * 160, 900 - height, 1400 + i * 160, 900), fill=color)
    return image


def document() -> Image.Image:
    image, draw = page()
    for i in range(34):
        draw.text((80, 40 + i * 29), (" ".join(LINES) * 3)[i : i + 150], font=ImageFont.load_default(22), fill="black")
    return image


def editor(lines: int, cursor: int = 900) -> Image.Image:
    image, draw = page("#1e1e1e")
    draw.rectangle((0, 0, 260, SIZE[1]), fill="#2d2d2d")
    draw.rectangle((0, SIZE[1] - 30, *SIZE), fill="#005aa0")
    for i in range(lines):
        indented = " " * 4 * (i % 4) + LINES[i % 6]
        draw.text((290, 30 + i * 34), indented, font=ImageFont.load_default(24), fill="#d2d2d2")
    draw.rectangle((cursor, 500, cursor + 12, 520), fill="white")
    return image


def encoded_percent(frames: list[Image.Image]) -> list[float]:
    """Return the percentage of units that are encoded in each frame pair."""
    grid = (len(frames) // 2, 38, 68)
    plan = methods.MethodChain.parse("pixelprune").plan(TowerShape.of_tower(tiny_tower()), grid, 9)
    run = EncoderRun(tiny_tower(), plan)
    run.embed([pixel_patches(torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])))])
    return [100 * count / (38 * 68) for count in run.counts]


def test_most_of_a_slide_or_screen_is_not_encoded():
    """The figures in docs/methods.md. They depend a little on the font."""
    for picture, percent in ((slide(), 15.8), (document(), 80.8), (editor(20), 13.4)):
        assert encoded_percent([picture, picture]) == [pytest.approx(percent, abs=2)]
    typed = encoded_percent([editor(10 + i // 2, 600 + 40 * i) for i in range(8)])
    assert all(0 < later < 2 < typed[0] for later in typed[1:])

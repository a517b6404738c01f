"""Test cases made of integers, so that all implementations of an operator agree to the last bit."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """The size of a test case in which points are divided into tubes.

    There are `rows` rows of `wide` numbers each. A fraction `same` of the rows are copies of others, and a fraction `dropped` of
    the points have no row. `tubes` contains the maximum number of points in each tube.
    """

    points: int
    tubes: tuple[int, ...]
    rows: int
    wide: int
    dropped: float = 0.0
    same: float = 0.0


SHAPES = {
    "one unit": Shape(1, (1,), 1, 16),
    "one unit of a narrow tower": Shape(1, (1,), 1, 3),
    "one tube, odd": Shape(37, (37,), 37, 5),
    "a row for many": Shape(70, (70,), 9, 33, same=0.3),
    "several tubes, padded": Shape(50, (13, 1, 20, 16), 31, 17),
    "dropped": Shape(45, (20, 25), 30, 16, dropped=0.4),
    "a tube without a row": Shape(12, (4, 8), 6, 16, dropped=0.7),
    "all dropped but one": Shape(9, (5, 4), 3, 16, dropped=0.95),
    "all equal": Shape(40, (19, 21), 1, 16),
    "more than a block of distances": Shape(150, (129, 21), 150, 70),
}


def points(shape: Shape, seed: int) -> tuple[torch.Tensor, ...]:
    """Return the arguments of `tube_radii`: `place`, `half`, `weight`, `first`, `row`, `time`, `tubes`."""
    random = torch.Generator().manual_seed(seed)
    place = 32 * (torch.rand(shape.rows, shape.wide, generator=random) - 0.5).sign()
    copies = torch.rand(shape.rows, generator=random) < shape.same
    place[copies] = place[0].clone()
    salience = torch.randint(0, 5, (shape.rows,), generator=random) / 4
    row = torch.randint(shape.rows, (shape.points,), generator=random)
    row[torch.rand(shape.points, generator=random) < shape.dropped] = -1
    row[shape.points // 2] = 0
    time = torch.arange(shape.points).float() // 3 / max(1, (shape.points - 1) // 3)
    members = torch.randperm(shape.points, generator=random).split(list(shape.tubes))
    tubes = torch.full((len(members), max(shape.tubes)), shape.points)
    for tube, units in zip(tubes, members, strict=True):
        tube[: len(units)] = units.sort().values
    return place, place.square().sum(1) / 2, 8192 * salience**2, (8192 * salience).round(), row, time, tubes


def clusters(shape: Shape, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return the arguments of `mean_rows`: `rows`, `into`, `row`, `weight`, `count`. No mean is empty."""
    random, count = torch.Generator().manual_seed(seed), max(1, shape.points // 3)
    rows = torch.randint(-8, 9, (shape.rows, shape.wide), generator=random).to(dtype)
    into = torch.cat([torch.arange(count), torch.randint(count, (shape.points,), generator=random)])
    row = torch.randint(shape.rows, (len(into),), generator=random)
    weight = torch.randint(0, 3, (len(into),), generator=random).float()
    weight[:count] = 1
    return rows, into, row, weight, count


def means(pairs: int, units: int, seed: int, kind: str) -> torch.Tensor:
    """Return block means, float32 `[pairs, units, 96]`, in whole levels. They show noise, a noisy still image, or a cut."""
    random = torch.Generator().manual_seed(seed)
    still = torch.randint(40, 200, (1, units, 96), generator=random).expand(pairs, -1, -1)
    noise = torch.randint(40, 200, (pairs, units, 96), generator=random)
    moves = torch.rand(pairs, units, 1, generator=random) < 0.2
    moves[pairs // 2] |= kind == "cut"
    return torch.where(
        moves | (kind == "noise"), noise, still + torch.randint(0, 3, noise.shape, generator=random)
    ).float()


def unit_rows(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return unit vectors float32 `[rows, 16]` whose cosines are eighths, a third of them equal, and a number per row, `[rows]`."""
    random = torch.Generator().manual_seed(seed)
    unit = (torch.rand(rows, 16, generator=random) - 0.5).sign() / 4
    unit[1::3] = unit[0]
    return unit, torch.randint(0, 4, (rows,), generator=random) / 4

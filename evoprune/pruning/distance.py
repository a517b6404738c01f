"""The distance of the selection: how much two units of a video differ, in features and in time.

    d(i, j) = |p_i - p_j|^2 / 2 + alpha / 2 * salience_j^2 * |t_i - t_j|

Unit i is selected and unit j is a candidate. p is a unit's feature minus the mean over all units of the clip, with every
channel divided by its standard deviation, and all divided by the length of the longest (results/geometry.md). t runs from 0 to 1
over the clip. salience_j = |p_j|^2: the more a thing stands out, the more it counts as new at another time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from evoprune.model.machine import to_device

ALPHA = 1.5
DIMENSIONS = 128  # of the projected features
UNPROJECTED = 512  # up to this number of rows, features are not projected
AT_ONCE = 1024  # rows that have float32 copies at a time
STILL = 1e-3  # of the mean variance, added to each channel's, so that one that hardly varies counts less
ROUNDING = 1 / 256  # of a channel's mean: a deviation as small as that of rounding does not count as one
STEP = 1 / 16384  # resolution of distances


@dataclass(frozen=True)
class Points:
    """The n units of a video as points with distances; E rows represent them."""

    units: torch.Tensor  # int64 [n], ascending
    row: torch.Tensor  # int64 [n], the row of each unit
    time: torch.Tensor  # float32 [n], from 0 to 1
    place: torch.Tensor  # float32 [E, d], at most about 1 long; distances are approximate if it is projected
    half: torch.Tensor  # float32 [E], half of the squared length of each place
    salience: torch.Tensor  # float32 [E], from 0 to 1; all 0 if all features are equal
    weight: torch.Tensor  # float32 [E], of time: alpha / 2 * salience^2

    def __len__(self) -> int:
        return len(self.units)

    def some(self, index: torch.Tensor) -> "Points":
        """The points with these indices (int64); all rows stay."""
        return replace(self, units=self.units[index], row=self.row[index], time=self.time[index])

    def in_features(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """float32 `[a, b]`: the first term of the distance, between rows `a` and rows `b` (int64), before `rounded`."""
        return torch.addmm(self.half[b], self.place[a], self.place[b].T, alpha=-1).add_(self.half[a][:, None])

    def add_time(self, distance: torch.Tensor, candidates: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Adds the second term in place to `distance` `[candidates, selected]`; both are indices of points (int64)."""
        lapse = (self.time[candidates][:, None] - self.time[selected]).abs_()
        return distance.add_(lapse.mul_(self.weight[self.row[candidates]][:, None]))


def points_of(
    rows: torch.Tensor, owner: torch.Tensor, grid: tuple[int, int, int], seconds: Sequence[float], alpha: float
) -> Points:
    """The points of one video: `rows`, `owner`, `grid` as in `Tokens`; seconds of each frame pair; `alpha`, the weight of time."""
    units = (owner >= 0).nonzero()[:, 0]
    time = torch.tensor(seconds, dtype=torch.float64, device="cpu")
    time = (time - time.min()) / (float(time.max() - time.min()) or 1.0)
    place, salience = places_and_salience(rows, owner)
    return Points(
        units=units,
        row=owner[units],
        time=to_device(time.float(), units.device)[units // (grid[1] * grid[2])],
        place=place,
        half=place.square().sum(1) / 2,
        salience=salience,
        weight=alpha / 2 * salience**2,
    )


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rounds distances, or a minimum of them, to multiples of `STEP`: equal rows are at distance 0, equal distances are ties."""
    return (x * (1 / STEP)).round_().mul_(STEP).clamp_(min=0)


def places_and_salience(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`place` and `salience` of `Points`; equal features have equal points. A row counts as often as it represents a unit."""
    count = torch.bincount(owner[owner >= 0], minlength=len(rows)).float()
    shares = (count / count.sum()).split(AT_ONCE)
    project = rows.shape[1] > 4 * DIMENSIONS and len(rows) > UNPROJECTED  # otherwise projection saves nothing
    to = to_device(_projection(rows.shape[1]), rows.device) if project else None

    def pieces() -> Iterator[torch.Tensor]:  # float32, a few rows at a time to save memory
        return (some.float() for some in rows.split(AT_ONCE))

    first = rows[0].float()  # sums of differences are exact where all rows are equal
    mean = first + sum(share @ (piece - first) for share, piece in zip(shares, pieces(), strict=True))
    variance = sum(share @ (piece - mean).square_() for share, piece in zip(shares, pieces(), strict=True))
    scale = (variance + STILL * variance.mean() + (ROUNDING * mean).square_()).clamp_(min=1e-30).rsqrt_()
    standard = ((piece - mean).mul_(scale) for piece in pieces())
    made = [(piece if to is None else piece @ to, piece.square().sum(1)) for piece in standard]
    place, salience = (torch.cat(pieces) for pieces in zip(*made, strict=True))
    largest = (salience * (count > 0)).max().clamp(min=STILL * rows.shape[1])
    salience = rounded(salience / largest) * (count > 0)
    return place / largest.sqrt(), salience


@lru_cache(maxsize=8)
def _projection(width: int) -> torch.Tensor:
    """float32 `[width, DIMENSIONS]`: orthogonal columns in random directions that keep squared lengths to about an eighth."""
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(normal).Q * math.sqrt(width / DIMENSIONS)

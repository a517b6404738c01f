"""Other distances for the selection of `evoprune`.

`python -m experiments.ablations OUT --only distance` says what each is worth, `experiments.geometry` how much each depends on the
geometry of features. What `evoprune` has was called "standardised-largest" in the results of before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from evoprune.backend.operators import rounded
from evoprune.methods import select

Distance = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
TODAY = "today"

# Each replaces `places_and_salience` of `pruning.select`. A share is the weight of a row, `[E, 1]`.


def _share(rows: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    count = torch.bincount(owner[owner >= 0], minlength=len(rows)).float()
    return (count / count.sum())[:, None]


def _salience(unlike: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    salience = rounded(unlike, select.STEPS) * (share[:, 0] > 0)
    return salience / salience.max().clamp(min=1 / select.STEPS)


def cosine(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - cosine, which `evoprune` had before; DivPrune's."""
    share, unit = _share(rows, owner), F.normalize(rows.float(), dim=1)
    return unit, _salience(1 - unit @ F.normalize((share * unit).sum(0), dim=0), share)


def by_spread(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines, divided by their spread, 1 - |mean|^2."""
    share, unit = _share(rows, owner), F.normalize(rows.float(), dim=1)
    mean = (share * unit).sum(0)
    unlike = 1 - unit @ F.normalize(mean, dim=0)
    return unit / (1 - mean.square().sum()).clamp(min=1e-6).sqrt(), _salience(unlike, share)


def centred(scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Distance:
    """Differences to the mean; `scale` divides them, of differences and shares."""

    def places(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        share, rows = _share(rows, owner), rows.float()
        off = rows - (share * rows).sum(0)
        place = off / scale(off, share).clamp(min=1e-12)
        return place, _salience(place.square().sum(1) / 2, share)

    return places


def _deviations(off: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each channel; of one that hardly varies, a little more."""
    variance = (share * off.square()).sum(0)
    return (variance + 1e-3 * variance.mean()).sqrt()


DISTANCES: dict[str, Distance | None] = {
    TODAY: None,
    "cosine": cosine,
    "spread": by_spread,
    "centred": centred(lambda off, share: (share * off.square()).sum().sqrt()),
    "centred-largest": centred(lambda off, share: off.square().sum(1).max().sqrt()),
    "standardised": centred(lambda off, share: _deviations(off, share) * off.shape[1] ** 0.5),
    "half-standardised": centred(
        lambda off, share: (d := _deviations(off, share).sqrt()) * (share * (off / d).square()).sum().sqrt()
    ),
}


@contextmanager
def using(places: Distance | None) -> Iterator[None]:
    """Has the selection use another distance."""
    today = select.places_and_salience
    select.places_and_salience = places or today
    try:
        yield
    finally:
        select.places_and_salience = today

"""IDPruner and VisionSelector, which select tokens by the scores of a scorer trained for the model."""

from dataclasses import dataclass
from typing import Any

import torch

from evoprune.contrib.mmr import diverse
from evoprune.contrib.scorer import Scorer, demo_scorers, no_scorer, scorer_for
from evoprune.contrib.shared import Share
from evoprune.methods import Selection, Selector, Tokens, TowerShape, highest, snap

EPSILON = 1e-6  # added to the range of the scores before dividing by it, as in the authors' code


@dataclass(frozen=True)
class VisionSelector(Selector):
    """VisionSelector (arXiv 2510.16598): keeps the tokens with the highest scores in the whole video.

    Users set `scorer` to a folder (see contrib/scorer.py). The demo models have bundled scorers, which are used by default.

    Differences from the authors' code: each video or image has its own budget and its own mean key, whereas the authors rank all
    visual tokens of a prompt together.
    """

    name = "visionselector"
    source = "arXiv 2510.16598"

    scorer: Scorer | None = None

    @property
    def args(self) -> dict[str, Any]:
        """The method's settings as shown in reports, with the scorer's digest in place of the scorer itself."""
        return super().args | {"scorer": self.scorer and self.scorer.digest}

    def check_tower(self, tower: TowerShape) -> None:
        if not tower.width:
            return  # unknown
        if self.scorer:
            self.scorer.check_width(tower.width)
        elif tower.width not in {scorer.width for scorer in demo_scorers().values()}:
            raise no_scorer()

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return scorer_for(tokens, self.scorer).scores(tokens.features)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(snap(importance(self.scores(tokens))), keep))


@dataclass(frozen=True)
class IdPruner(VisionSelector):
    """IDPruner (arXiv 2602.13315): maximal marginal relevance with the scores of a trained scorer as importance.

    Each step keeps the token with the highest `lam` * importance - (1 - `lam`) * (highest cosine similarity to a kept token) in the
    whole video. For the scorer and the differences from the authors' code, see `VisionSelector`.
    """

    name = "idpruner"
    source = "arXiv 2602.13315"

    lam: Share = 0.5  # weight of importance; the weight of diversity is 1 - lam

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(diverse(tokens.features, importance(self.scores(tokens)), keep, self.lam))


def importance(scores: torch.Tensor) -> torch.Tensor:
    """Scale `scores` (`[N]`) linearly to the range from 0 to almost 1. Returns zeros if all entries are equal."""
    low, high = scores.aminmax()
    return (scores - low) / (high - low + EPSILON)

"""V-CAST, which keeps more tokens where a video changes direction, and the tokens that stand out in each frame pair."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import apportion
from evoprune.methods import Selection, Selector, Tokens, highest, snap

STILL = 1e-4  # a change of a frame pair's vector shorter than this counts as none, because it may be a rounding error
EPSILON = 1e-6  # as in the authors' code


@dataclass(frozen=True)
class VCast(Selector):
    """V-CAST (arXiv 2603.27650): curvature of the video determines each frame pair's number of tokens.

    A frame pair's vector is the mean of its tokens, scaled to unit length. Its curvature is 1 minus the cosine similarity of the
    change from the previous vector and the change to the next one, and 1 for the first and last frame pair. Each frame pair gets a
    token, and the other tokens are divided in proportion to the softmax of curvature / `temperature`. A frame pair keeps the tokens
    with the highest sum of (1 - cosine similarity to the frame pair's vector) and the norm, scaled to the range from 0 to 1. Tokens
    keep their values and positions.

    Differences from the authors' code: what remains after rounding down is divided by the largest remainder method, whereas the
    authors give all of it to the frame pair with the largest remainder. The authors keep at least one token per frame pair even if
    this exceeds the budget, and do not prune images.
    """

    name = "vcast"
    source = "arXiv 2603.27650"

    temperature: float = 0.7

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature:g} is not a finite number above 0")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        pairs, per_pair = x.shape[:2]
        vector = F.normalize(x.mean(1), dim=1, eps=EPSILON)
        least = min(1, keep // pairs)
        weights = (snap(curvature(vector)).double() / self.temperature).softmax(0)
        counts = apportion(keep - least * pairs, weights.tolist(), [per_pair - least] * pairs)
        norm = x.norm(dim=2)
        low, high = norm.aminmax(dim=1, keepdim=True)
        stands_out = 1 - F.cosine_similarity(x, vector[:, None], dim=2, eps=EPSILON)
        score = snap(stands_out + (norm - low) / (high - low + EPSILON))
        return Selection.of_pairs((highest(s, least + count) for s, count in zip(score, counts, strict=True)), per_pair)


def curvature(vector: torch.Tensor) -> torch.Tensor:
    """Return how sharply a path turns at each point, from 0 to 2, and 1 at both ends and where it stands still.

    Args:
        vector: `[T, D]`, the points.
    """
    change = vector.diff(dim=0)
    change = torch.where(change.norm(dim=1, keepdim=True) < STILL, 0, change)
    turns = 1 - F.cosine_similarity(change[:-1], change[1:], dim=1, eps=EPSILON)
    ends = turns.new_ones(min(2, len(vector)))
    return torch.cat([ends[:1], turns, ends[1:]])

"""Synthetic clips with known changes."""

import torch

from tests.vision.tower import PATCH_WIDTH


def clip(
    grid: tuple[int, int, int], changed: torch.Tensor, seed: int = 0, drift: float = 0.02, width: int = PATCH_WIDTH
) -> torch.Tensor:
    """Return patches `[rows, width]`. Units in `changed` (bool `[T, H*W]`) get new noise, and all others keep their content.

    New noise differs from the old content by at least 15 levels somewhere. Unchanged units drift by less than one level.
    """
    t, h, w = grid
    random = torch.Generator().manual_seed(seed)
    now, pairs = torch.zeros(h * w, 4, width), []
    for pair in range(t):
        new = changed[pair] if pair else torch.ones(h * w, dtype=torch.bool)
        now = torch.where(new[:, None, None], torch.randn(now.shape, generator=random), now)
        pairs.append(now + drift * torch.randn(now.shape, generator=random) * ~new[:, None, None])
    return torch.stack(pairs).view(-1, width)


def changes(grid: tuple[int, int, int], share: float, seed: int = 0) -> torch.Tensor:
    """Return bool `[T, H*W]`: True in the first frame pair, and for about `share` of the units in later ones."""
    t, h, w = grid
    made = torch.rand(t, h * w, generator=torch.Generator().manual_seed(seed)) < share
    made[0] = True
    return made

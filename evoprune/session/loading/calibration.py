"""One run of a model on an input that is the same every time: 8-bit layers learn from it which input channels are large.

The input is made by formula: a picture with flat, smooth, striped and noisy parts, and tokens from all over the vocabulary.
"""

import torch

from evoprune.language.decoder import KVCache, logits
from evoprune.methods.plans import full_plan
from evoprune.methods.types import ascending
from evoprune.model.config import PATCHES
from evoprune.model.weights import QwenVL
from evoprune.vision.encoder import encode
from evoprune.vision.tower import tower_shape

GRID = (1, 8, 8)  # frame pairs, and rows and columns of units
TOKENS = 64  # of text before the visual tokens, and behind them


def calibrate(model: QwenVL) -> None:
    """Calls every linear layer of a model on the CPU; its results are not used."""
    seen = calibrate_tower(model.model.visual)
    embed = model.model.language_model.embed_tokens
    ids = torch.linspace(0, embed.num_embeddings - 1, 2 * TOKENS, dtype=torch.float64, device="cpu").long()
    before, behind = embed(ids).to(seen.dtype).split(TOKENS)
    embeds = torch.cat([before, seen, behind])
    positions = ascending(len(embeds), "cpu").expand(3, -1)
    logits(model, embeds, positions, KVCache(model, len(embeds)))


def calibrate_tower(visual) -> torch.Tensor:
    """Calls every linear layer of a tower on the CPU; the features `[N, hidden]`."""
    return encode(visual, [_patches(visual)], full_plan(tower_shape(visual), GRID)).features


def _patches(visual) -> torch.Tensor:
    """The picture, as `vision.preprocess.patchify` makes patches: float32 `[patches, values]`, about between -2 and 2."""
    config = visual.config
    count = GRID[0] * GRID[1] * GRID[2] * PATCHES
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    noise = torch.randn(count, values, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    place = torch.linspace(-2, 2, values, dtype=torch.float32, device="cpu")
    level = torch.linspace(-2, 2, count, dtype=torch.float32, device="cpu")[:, None]
    flat, smooth = level.expand(-1, values), level + place / 2
    striped = torch.sign(torch.sin(40 * place + level)) * level
    kinds = torch.stack([flat, smooth, striped, noise])
    return kinds[ascending(count, "cpu") % 4, ascending(count, "cpu")]

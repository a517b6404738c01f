"""Encodes one picture or video of a request, and appends the positions of its tokens. No vLLM here."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from evoprune.errors import PluginError, UsageError, names_plugins
from evoprune.integrations.vllm.positions import as_columns
from evoprune.language.prompt import video_positions
from evoprune.methods.chain import Pipeline
from evoprune.methods.encoder_plan import Grid
from evoprune.model.config import vision_sizes
from evoprune.vision.encoded import Encoded
from evoprune.vision.encoder import encode
from evoprune.vision.preprocess import CLIP, Normalisation
from evoprune.vision.tower import tower_shape

PATCHES = 4096  # that have float32 copies at a time
TRIAL = ((4, 4, 4), 16)  # grid and K of the clip with which a method is tried out


@dataclass(frozen=True)
class Item:
    """A picture or video."""

    grid: Grid  # (T, H, W) in units
    keep: int  # K, the number of its placeholders
    seconds: float = 1.0  # seconds per pair


@dataclass(frozen=True)
class Normalised:
    """Normalises the bytes of patches as `vision.preprocess.patchify` does, to the last bit: a token may be selected by it."""

    mean: tuple[float, ...]  # of red, green and blue, for bytes times `scale`
    std: tuple[float, ...]
    scale: float  # 1/255

    @property
    def normal(self) -> Normalisation:
        """Mean and std for bytes times 1/255, as `patchify` takes them."""
        levels = round(1 / self.scale) / 255
        return tuple(levels * each for each in self.mean), tuple(levels * each for each in self.std)

    def __call__(self, pixels: torch.Tensor) -> Iterator[torch.Tensor]:
        """Patches `[n, 1176]` in float32, some at a time, from bytes."""
        mean, std = (
            torch.tensor(each, dtype=torch.float32, device=pixels.device)[:, None] * round(1 / self.scale)
            for each in (self.mean, self.std)
        )
        for some in pixels.split(PATCHES):
            yield ((some.view(len(some), len(mean), -1).float() - mean) / std).flatten(1)


@names_plugins()
def encoded(
    visual, patches: Iterable[torch.Tensor], item: Item, method: Pipeline, normal: Normalisation = CLIP
) -> Encoded:
    """The tokens of an item, exactly K of them.

    `patches`: pieces `[n, 1176]`, float32, normalised by `normal`, mean and std.

    Raises ModelError: the tower computes NaN or infinite values. PluginError: another package's method failed, or kept another K.
    """
    plan = method.plan(tower_shape(visual), item.grid, item.keep)
    found = encode(visual, patches, plan, seconds_per_pair=item.seconds, normal=normal)
    if len(found.kept) != item.keep:
        hint = "choose another method"
        raise PluginError(f"method {method.name} kept {len(found.kept):,} tokens of {item.keep:,}", hint)
    return found


def with_columns(found: Encoded, item: Item, tokens_per_second: float | None) -> torch.Tensor:
    """`[K, D + COLUMNS]`: features, positions counted from the video's own, and the log of the cluster size."""
    features = found.features
    positions = video_positions(item.grid, item.seconds, tokens_per_second).to(features.device)[:, found.kept]
    bias = features.new_zeros(len(features), dtype=torch.float32) if found.size is None else found.size.log()
    return torch.cat([features, as_columns(positions, bias.to(features.device), features.dtype)], 1)


def try_out(visual, method: Pipeline) -> None:
    """Encodes a small clip of noise, so that a method that cannot work fails at start. Raises as `encoded`, and UsageError."""
    grid, keep = TRIAL
    sizes, weight = vision_sizes(visual.config), visual.patch_embed.proj.weight
    noise = torch.Generator().manual_seed(0)
    shape = prod(grid) * sizes.spatial_merge_size**2, weight[0].numel()
    patches = torch.randn(shape, generator=noise, dtype=torch.float32, device="cpu").to(weight.device)
    found = encoded(visual, [patches], Item(grid, keep), method)
    if found.size is not None and not method.weighs:
        hint = "its class must override `weighs` (evoprune/methods/base.py)"
        raise UsageError(f"method {method.name} gives tokens sizes, and does not declare it", hint)

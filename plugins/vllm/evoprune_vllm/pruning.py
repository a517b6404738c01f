"""Reads a server's pruning options, and encodes an image or video from a request. Does not import vLLM.

The server's `--video-pruning-rate` is the fraction of tokens to remove. A request can set the fraction of tokens to keep using
`evoprune_budget` in its `mm_processor_kwargs`. The server's method is set with `--additional-config '{"evoprune": {"method":
"divprune"}}'`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from evoprune.errors import PluginError, UsageError
from evoprune.language import Place, prompt_positions, prune_prompt
from evoprune.methods import (
    Budget,
    Grid,
    MethodChain,
    MethodText,
    TowerShape,
)
from evoprune.model import VisionConfig
from evoprune.util import did_you_mean
from evoprune.video import InputLimits
from evoprune.vision import Encoded, encode_rows
from evoprune_vllm.positions import as_columns

# Mean and standard deviation of red, green, and blue, on a scale from 0 to 1.
Normal = tuple[tuple[float, ...], tuple[float, ...]]
CLIP: Normal = InputLimits().normal
BUDGET = "evoprune_budget"
EXAMPLE = 'for example --additional-config \'{"evoprune": {"method": "divprune"}}\''
EXACT = "choose evoprune, evoprune-merge, tome, divprune or another exact method"


def served_method(additional: Any) -> MethodChain:
    """Return the pruning method set in `--additional-config`, or the default method.

    The method name may be followed by settings, as in `NAME:SETTING=VALUE`.

    Raises:
        UsageError: If a key is unknown, or the method doesn't exist or can't be used in vLLM.
    """
    section = additional.get("evoprune", {}) if isinstance(additional, Mapping) else {}
    unknown = sorted(set(section) - {"method"}) if isinstance(section, Mapping) else [str(section)]
    if unknown:
        raise UsageError(f"evoprune in --additional-config has no setting {unknown[0]!r}", EXAMPLE)
    name = section.get("method", MethodText.DEFAULT)
    if not isinstance(name, str):
        raise UsageError(f"method {name!r} is not a name", EXAMPLE)
    method = MethodChain.parse(name)
    if method.acts == "none":
        raise UsageError(f"method {name} prunes nothing", "leave --video-pruning-rate out instead")
    if method.acts == "input":
        raise UsageError(f"method {name} acts on frames, which vLLM reads and resizes", EXACT)
    if method.language:
        raise UsageError(f"method {name} acts inside the language model, which is vLLM's", EXACT)
    if method.reads_question:
        raise UsageError(f"{method.refusals[0]}, and vLLM's encoder does not see it", EXACT)
    if not method.exact:
        raise UsageError(f"method {name} does not say in advance how many tokens it keeps", EXACT)
    return method


def request_budget(options: Mapping[str, Any], rate: float | None) -> Budget:
    """Return the fraction of visual tokens to keep for a request, given its `mm_processor_kwargs` and the server's pruning rate.

    Raises:
        UsageError: If an option is unknown or invalid, or the server doesn't prune.
    """
    unknown = [name for name in options if name.startswith("evoprune_") and name != BUDGET]
    if unknown:
        raise UsageError(f"no option {unknown[0]!r}", f"{did_you_mean(unknown[0], [BUDGET])}a request may set {BUDGET}")
    if BUDGET not in options:
        share = round(1 - (rate or 0.0), 9)
        return Budget(share, share)
    budget = Budget.parse(options[BUDGET])
    if budget != Budget.FULL and not rate:
        hint = "start it with --video-pruning-rate, which may be as small as 1e-9, and set budgets in requests"
        raise UsageError("this server prunes nothing, because it was started without a rate", hint)
    return budget


def normalisation(mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> Normal:
    """Convert color means and standard deviations from levels of 0 to 255, multiplied by `scale`, to levels of 0 to 1."""
    levels = round(1 / scale) / 255
    return tuple(levels * each for each in mean), tuple(levels * each for each in std)


def encoded(
    visual, patches: torch.Tensor, grid: Grid, keep: int, method: MethodChain, normal: Normal = CLIP
) -> Encoded:
    """Encode an image or video to exactly `keep` tokens.

    Raises:
        ModelError: If the tower's output contains NaN or infinite values.
        PluginError: If a third-party method fails or keeps a different number of tokens.
    """
    plan = method.plan(TowerShape.of_tower(visual), grid, keep)
    found = encode_rows(visual, [patches], plan, normal=normal).select_tokens()
    if len(found.kept) != keep:
        hint = "choose another method"
        raise PluginError(f"method {method.name} kept {len(found.kept):,} tokens of {keep:,}", hint)
    return found


def tokens_of(found: Encoded) -> torch.Tensor:
    """Return each token's features followed by its features from the n DeepStack levels, `[K, (1 + n) * D]`."""
    return _beside(found.features, found.deepstack)


def _beside(features: torch.Tensor, deepstack: torch.Tensor | None) -> torch.Tensor:
    """Concatenate features `[K, D]` and DeepStack features `[n, K, D]` to `[K, (1 + n) * D]`."""
    if deepstack is None:
        return features
    return torch.cat([features, *deepstack], 1)


def with_columns(
    found: Encoded,
    seconds: float,
    tokens_per_second: float | None,
    words: Sequence[int] = (),
    text: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the rows of `tokens_of` with `COLUMNS` additional columns.

    These columns encode each token's position relative to the video's own position, and the logarithm of its cluster size.

    Args:
        words: If frame pairs have timestamps, the number of `text` embeddings before the tokens of each frame pair. One more
            embedding follows the tokens of each frame pair.
        text: The embeddings of timestamps and markers, `[n, D]`, or None. Each embedding becomes an additional row in the result.
    """
    grid = found.grids[0]
    place = Place((range(prod(grid)),))
    if words:
        # A frame pair keeps its timestamp even if it has no tokens left.
        place = replace(Place.of_pairs(words, grid[1] * grid[2]), around=())
    embeds = found.features[:0] if text is None else text.to(found.features)
    ids = torch.zeros(len(place) + len(embeds), dtype=torch.int64, device="cpu")
    positions = prompt_positions(len(ids), place.positions(grid, seconds, tokens_per_second))
    prompt = prune_prompt(ids, [place], [found], positions, embed=lambda _: embeds)
    rows = _beside(prompt.embeds, prompt.deepstack)
    bias = rows.new_zeros(len(rows), dtype=torch.float32) if prompt.sizes is None else prompt.sizes.log()
    return torch.cat([rows, as_columns(prompt.positions.to(rows.device), bias, rows.dtype)], 1)


def try_out(visual, method: MethodChain) -> None:
    """Encode a small random-noise clip so that a broken method fails at startup instead of on the first request.

    Raises:
        UsageError: If the method assigns token weights without declaring it.

    For the other exceptions, see `encoded`.
    """
    grid = (4, 4, 4)
    keep = 16
    sizes = VisionConfig.of(visual.config)
    weight = visual.patch_embed.proj.weight
    noise = torch.Generator().manual_seed(0)
    shape = prod(grid) * sizes.spatial_merge_size**2, weight[0].numel()
    patches = torch.randn(shape, generator=noise, dtype=torch.float32, device="cpu").to(weight.device)
    found = encoded(visual, patches, grid, keep, method)
    if found.size is not None and not method.weighs:
        hint = "its class must override `weighs` (evoprune/methods/base.py)"
        raise UsageError(f"method {method.name} gives tokens sizes but does not declare it", hint)

"""What a run costs: floating-point operations of tower and prefill, and an estimate of seconds on this machine.

A multiply-add counts as two operations. Counts use the actual rows of every layer and the actual length of the prompt.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch

from evoprune.model.clock import now
from evoprune.model.config import PATCHES
from evoprune.model.numerics import without_autocast

# The rate of a whole forward pass, as a share of a plain matrix product's. Only for estimates.
EFFICIENCY = 0.5

T = TypeVar("T")


def tower_flop(config, rows: Sequence[int], grids: int, windows: int) -> float:
    """Operations of the vision tower.

    Args:
        config: a `VisionConfig`.
        rows: rows that each layer computes, over the whole video, and as a last entry the rows that reach the merger.
        grids: frame pairs T.
        windows: attention windows of one frame pair.
    """
    h, inner = config.hidden_size, config.intermediate_size
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    total = 2.0 * rows[0] * PATCHES * pixels * h
    for layer, units in enumerate(rows[:-1]):
        patches = units * PATCHES
        groups = grids * (1 if layer in config.fullatt_block_indexes else windows)
        total += 2 * patches * (4 * h * h + config.mlp_matrices * h * inner) + 4 * patches * (patches / groups) * h
    wide = h * config.spatial_merge_size**2
    return total + 2 * rows[-1] * (wide * wide + wide * config.out_hidden_size)


def stretched(rows: Sequence[T], depth: int) -> list[T]:
    """Rows of each of `depth` layers, taken by relative depth from the rows of a model with another number of layers."""
    return [rows[layer * len(rows) // depth] for layer in range(depth)]


def prefill_flop(config, length: int | Sequence[int | Sequence[int]]) -> float:
    """Operations of reading a prompt, with logits of the last token only.

    Args:
        config: a `TextConfig`.
        length: tokens of the prompt after pruning, in each layer or in all. Of a layer also three numbers: the tokens of which it
            computes keys and values, queries and output, and the MLP.
    """
    h, lengths = config.hidden_size, [length] * config.num_hidden_layers if isinstance(length, int) else length
    key_value = h // config.num_attention_heads * config.num_key_value_heads
    total = 2.0 * h * config.vocab_size
    for each in lengths:
        keys, queries, mlp = (each,) * 3 if isinstance(each, int) else each
        total += (
            4 * h * (key_value * keys + h * queries) + 6 * h * config.intermediate_size * mlp + 2 * keys * queries * h
        )
    return total


@without_autocast()
def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 0.1,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024),),
) -> float:
    """Operations per second of a plain matrix product on this machine, the best of several.

    Args:
        dtype, device: of the matrices.
        seconds: how long each of `shapes` is tried.
        shapes: rows, inner size and columns.
    """
    best, place = 0.0, torch.device(device)
    for rows, inner, columns in shapes:
        a, b = (torch.randn(x, dtype=dtype, device=device) for x in ((rows, inner), (inner, columns)))
        a @ b
        end = now(place) + seconds
        while (start := now(place)) < end:
            a @ b
            best = max(best, 2 * rows * inner * columns / (now(place) - start))
    return best


def estimate_first_token(
    model, rows: Sequence[int], grids: int, windows: int, prompt: int | Sequence[int | Sequence[int]]
) -> float:
    """Seconds until the first token on a CPU: a rough estimate.

    Args:
        model: a `QwenVL` on a CPU.
        rows, grids, windows: see `tower_flop`.
        prompt: length of the prompt after pruning, as in `prefill_flop`.
    """
    work = tower_flop(model.config.vision_config, rows, grids, windows) + prefill_flop(model.config.text_config, prompt)
    return work / (EFFICIENCY * matmul_rate(model.dtype, "cpu", 0.04))  # briefly: the first word waits for it

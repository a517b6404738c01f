"""What a run costs, counted and foretold: floating-point operations of tower and prefill, and seconds on this machine.

Counts are multiply-adds times two, from the true rows of every layer and the true length of the prompt.
"""

from collections.abc import Sequence

import torch

from evoprune.model.clock import now
from evoprune.model.sizes import PATCHES

# Of a plain matrix product's rate, what a whole forward pass reaches; only for telling a user how long to wait.
REACHED = 0.5


def tower_flop(config, rows: Sequence[int], grids: int, windows: int) -> float:
    """Operations of the vision tower.

    Args:
        config: a `VisionConfig`.
        rows: units that each layer computes, over the whole video, and after them the units that reach the merger.
        grids: T; `windows`: windows of one grid.
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


def stretched(rows: Sequence[int], depth: int) -> list[int]:
    """Rows of each of `depth` layers, by relative depth, from those of a tower of another depth."""
    return [rows[layer * len(rows) // depth] for layer in range(depth)]


def prefill_flop(config, length: int) -> float:
    """Operations of reading a prompt of `length` tokens, logits of the last one alone; `config`: `TextConfig`."""
    h = config.hidden_size
    key_value = h // config.num_attention_heads * config.num_key_value_heads
    layer = 2 * length * (2 * h * h + 2 * h * key_value + 3 * h * config.intermediate_size) + 2 * length * length * h
    return config.num_hidden_layers * layer + 2 * h * config.vocab_size


def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 0.1,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024),),
) -> float:
    """Operations a second of a plain matrix product on this machine, the best of several.

    Args:
        seconds: how long to try each of `shapes`: rows, inner size and columns.
    """
    best, place = 0.0, torch.device(device)
    for rows, inner, columns in shapes:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
        a @ b
        end = now(place) + seconds
        while (start := now(place)) < end:
            a @ b
            best = max(best, 2 * rows * inner * columns / (now(place) - start))
    return best


def estimate_first_token(model, rows: Sequence[int], grids: int, windows: int, prompt: int) -> float:
    """Seconds until the first token on a CPU, roughly.

    Args:
        model: a `QwenVL` on a CPU.
        rows, grids, windows: see `tower_flop`.
        prompt: length of the prompt after pruning.
    """
    work = tower_flop(model.config.vision_config, rows, grids, windows) + prefill_flop(model.config.text_config, prompt)
    return work / (REACHED * matmul_rate(model.dtype))

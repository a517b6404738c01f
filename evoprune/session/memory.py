"""Estimate the memory needed to encode an input and read a prompt, in addition to the model's weights.

This memory is checked before any frames are read.
"""

from collections.abc import Sequence

import torch

from evoprune.backend import Device
from evoprune.methods import EncoderPlan, SetAside
from evoprune.model import PATCHES, Config, Cost

TEXT = 64  # the number of text tokens that a prompt is assumed to have


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Estimate the memory in bytes needed to encode a video and read its prompt, in addition to the weights.

    Args:
        piece_units: Number of rows that go through a matrix product at a time.
        bytes_each: Number of bytes per weight.
        prompt: Number of tokens that the language model reads. This is either one number for all layers or one number per layer.
    """
    row_bytes = PATCHES * config.vision_config.hidden_size
    rows = max(encoder.layers)
    left = encoder.rows
    more = 0
    if any(stage.whole_pairs for stage in encoder.row_stages):
        more = encoder.units * row_bytes * 4  # the means over frame pairs are computed in float32
    if any(isinstance(stage.reduce, SetAside) for stage in encoder.stages):
        # Count two more tensors: the rows' earlier states, and the changes since then in float32.
        more = 2 * encoder.units * row_bytes * (bytes_each + 4)
    return Cost(config).working_memory(encoder.units, piece_units, prompt, bytes_each, rows, left) + more


def piece_needs(
    config: Config, device: torch.device, encoder: EncoderPlan, bytes_each: int, prompt: int | Sequence[int]
) -> list[tuple[int, int]]:
    """Return the possible piece sizes, largest first, each with the memory in bytes that encoding needs (`encoding_bytes`).

    A piece size is the number of rows that go through a matrix product at a time. The first size is the device's default. The
    second is half of the default, or half of the number of units if that is smaller. Each further size is half of the previous one,
    down to the size of a frame pair.
    """
    pair = encoder.grid[1] * encoder.grid[2]
    sizes = [Device(device).piece_units]
    size = min(sizes[0], encoder.units)
    while size > pair:
        size = max(pair, size // 2)
        sizes.append(size)
    return [(size, encoding_bytes(config, encoder, max(pair, size), bytes_each, prompt)) for size in sizes]

"""Estimate how much memory is needed to encode an input and read a prompt, excluding the model weights.

Each run checks that enough memory is available before reading any frames.
"""

from collections.abc import Sequence

import torch

from evoprune.backend import Device
from evoprune.methods import EncoderPlan, SetAside
from evoprune.model import PATCHES, Config, Cost

TEXT = 64  # assumed number of text tokens in a prompt


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Estimate how many bytes of memory are needed to encode a video and read its prompt, excluding the weights.

    Args:
        piece_units: Number of rows processed in a single matrix product.
        bytes_each: Number of bytes per weight.
        prompt: Number of tokens read by the language model, either a single number for all layers or one number per layer.
    """
    row_bytes = PATCHES * config.vision_config.hidden_size
    rows = max(encoder.layers)
    left = encoder.rows
    more = 0
    if any(stage.whole_pairs for stage in encoder.row_stages):
        more = encoder.units * row_bytes * 4  # frame pair means are computed in float32
    if any(isinstance(stage.reduce, SetAside) for stage in encoder.stages):
        # Include two more tensors per row: its earlier state, and its subsequent change in float32.
        more = 2 * encoder.units * row_bytes * (bytes_each + 4)
    return Cost(config).working_memory(encoder.units, piece_units, prompt, bytes_each, rows, left) + more


def piece_needs(
    config: Config, device: torch.device, encoder: EncoderPlan, bytes_each: int, prompt: int | Sequence[int]
) -> list[tuple[int, int]]:
    """Return the piece sizes to try, largest first, each with the number of bytes needed for encoding (`encoding_bytes`).

    The piece size is the number of rows processed in a single matrix product. The first size is the device's default. The second
    size is half the default, or half the number of units if that is smaller. Each subsequent size is half the previous size, down
    to the size of a frame pair.
    """
    pair = encoder.grid[1] * encoder.grid[2]
    sizes = [Device(device).piece_units]
    size = min(sizes[0], encoder.units)
    while size > pair:
        size = max(pair, size // 2)
        sizes.append(size)
    return [(size, encoding_bytes(config, encoder, max(pair, size), bytes_each, prompt)) for size in sizes]

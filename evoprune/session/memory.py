"""Check that encoding an input and reading its prompt fit into memory. `Cost` (model/cost.py) predicts how much they need.

Each run checks that enough memory is available before reading any frames.
"""

from collections.abc import Callable, Sequence

import torch

from evoprune.backend import Device
from evoprune.errors import USE_LESS, OutOfMemory
from evoprune.methods import EncoderPlan, SetAside
from evoprune.model import Config, Cost

TEXT = 64  # assumed number of text tokens in a prompt


def check_fits(device: torch.device | str, needed: int, what: str, stage: str, hint: str = USE_LESS) -> None:
    """Raise OutOfMemory if fewer than `needed` bytes are available on a device.

    Args:
        what: What needs the memory, as the subject of the message.
        stage: The stage of the run, for the error record.
        hint: How to need less memory.
    """
    if short := Device(device).shortage(needed):
        raise OutOfMemory(f"{what} {short}", hint, stage=stage)


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Estimate how many bytes of memory are needed to encode a video and read its prompt, excluding the weights.

    Args:
        piece_units: Number of rows processed in a single matrix product.
        bytes_each: Number of bytes per weight.
        prompt: Number of tokens read by the language model, either a single number for all layers or one number per layer.
    """
    return Cost(config).working_memory(
        encoder.units,
        piece_units,
        prompt,
        bytes_each,
        rows=max(encoder.layers),
        left=encoder.rows,
        pair_means=any(stage.whole_pairs for stage in encoder.row_stages),
        sets_aside=any(isinstance(stage.reduce, SetAside) for stage in encoder.stages),
    )


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


def fitting_pieces(
    needs: Sequence[tuple[int, int]], device: torch.device, name: str, facts: str, evict: Callable[[], bool]
) -> list[int]:
    """Return the piece sizes that fit into memory, largest first.

    Args:
        needs: The result of `piece_needs`.
        name: The input's name, for the error message.
        facts: The input's size, for the error message.
        evict: Called if memory is low. Frees memory, and returns False if there is nothing to free.

    Raises:
        OutOfMemory: If there isn't enough memory for the smallest piece size.
    """
    for number, (_, needed) in enumerate(needs):
        short = Device(device).shortage(needed)
        if short and evict():
            short = Device(device).shortage(needed)
        if not short:
            return [size for size, _ in needs[number:]]
    raise OutOfMemory(f"{name} {short}: {facts}", USE_LESS, stage="encode")

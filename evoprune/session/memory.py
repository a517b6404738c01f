"""Memory, besides the weights, for encoding an input and reading a prompt. Checked before any frame is read."""

from collections.abc import Sequence

import torch

from evoprune.backend import Device
from evoprune.errors import USE_LESS, OutOfMemory
from evoprune.methods import EncoderPlan, SetAside
from evoprune.model import PATCHES, Config, Cost, shortage
from evoprune.session.session import Session
from evoprune.util import counted
from evoprune.video import Plan

TEXT = 64  # assumed number of text tokens in a prompt


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Estimate the bytes, besides the weights, that encoding a video and reading its prompt take.

    Args:
        piece_units: Number of rows that go through a matrix product at a time.
        bytes_each: Bytes per weight.
        prompt: Number of tokens that the language model reads: one number for all layers, or one per layer.
    """
    row_bytes = PATCHES * config.vision_config.hidden_size
    rows = max(encoder.layers)
    left = encoder.rows
    more = 0
    if any(stage.whole_pairs for stage in encoder.row_stages):
        more = encoder.units * row_bytes * 4  # the means over frame pairs are computed in float32
    if any(isinstance(stage.reduce, SetAside) for stage in encoder.stages):
        # The earlier states of the rows, and their changes in float32.
        more = 2 * encoder.units * row_bytes * (bytes_each + 4)
    return Cost(config).working_memory(encoder.units, piece_units, prompt, bytes_each, rows, left) + more


def piece_needs(
    config: Config, device: torch.device, encoder: EncoderPlan, bytes_each: int, prompt: int | Sequence[int]
) -> list[tuple[int, int]]:
    """Return the possible piece sizes, largest first, each with the bytes that encoding then takes (`encoding_bytes`).

    A piece size is the number of rows that go through a matrix product at a time. The first size is the usual one. Each following
    size is half as large, down to the size of a frame pair.
    """
    pair = encoder.grid[1] * encoder.grid[2]
    sizes = [Device(device).piece_units]
    size = min(sizes[0], encoder.units)
    while size > pair:
        size = max(pair, size // 2)
        sizes.append(size)
    return [(size, encoding_bytes(config, encoder, max(pair, size), bytes_each, prompt)) for size in sizes]


def fitting_pieces(session: Session, plan: Plan, other_tokens: int = TEXT) -> list[int]:
    """Return the piece sizes from `piece_needs` that fit into memory, largest first.

    If memory is short, this first evicts the stored patches of earlier inputs.

    Args:
        other_tokens: Number of prompt tokens in addition to this video's.

    Raises:
        OutOfMemory: If not even a frame pair, or the prompt, fits.
    """
    model = session.loaded.model
    encoder = plan.encoder
    prompt = session.prompt_columns(encoder.keep, other_tokens)
    needs = piece_needs(model.config, model.device, encoder, model.dtype.itemsize, prompt)
    for number, (_, needed) in enumerate(needs):
        short = shortage(needed, str(model.device))
        if short and session.loaded.patches.clear():  # evicts the patches of earlier inputs
            short = shortage(needed, str(model.device))
        if not short:
            return [size for size, _ in needs[number:]]
    frames = f"{counted(plan.sampling.frames, 'frame')} of {plan.width}x{plan.height} pixels"
    kept = f"{frames}, {encoder.keep:,} visual tokens kept"
    if other_tokens > TEXT:
        kept += f", {other_tokens:,} other tokens"
    raise OutOfMemory(f"{plan.name} {short}: {kept}", USE_LESS, stage="encode")


def check_memory(session: Session, text: int, visual: int) -> None:
    """Check that a prompt fits whose text is longer than the encoder's check assumed (`TEXT` tokens).

    Raises:
        OutOfMemory: If it does not fit.
    """
    if text <= TEXT:
        return
    model = session.loaded.model
    needed = Cost(model.config).language_bytes(session.prompt_columns(visual, text), model.dtype.itemsize)
    if short := shortage(needed, session.loaded.device):
        raise OutOfMemory(f"a prompt of {text + visual:,} tokens {short}", USE_LESS, stage="prefill")

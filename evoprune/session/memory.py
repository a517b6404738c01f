"""The memory that encoding an input and reading a prompt take beside the weights; checked before any frame is read."""

from collections.abc import Sequence

import torch

from evoprune.backend import largest_piece
from evoprune.errors import USE_LESS, OutOfMemory
from evoprune.methods import EncoderPlan, SetAside
from evoprune.model import PATCHES, Config, carried_bytes, language_bytes, shortage, working_memory
from evoprune.session.session import Session
from evoprune.util import counted
from evoprune.video import Plan

TEXT = 64  # tokens of a prompt around the video, roughly


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Bytes that encoding a video and reading the prompt take beside the weights, roughly.

    `bytes_each`: of a weight. `prompt`: tokens that the language model reads, in each layer or in all.
    """
    row_bytes = PATCHES * config.vision_config.hidden_size
    rows = max(encoder.layers)
    left = encoder.rows
    more = 0
    if any(stage.whole_pairs for stage in encoder.row_stages):
        more = encoder.units * row_bytes * 4  # the means of all frame pairs are made in float32
    if any(isinstance(stage.reduce, SetAside) for stage in encoder.stages):
        more = 2 * encoder.units * row_bytes * (bytes_each + 4)  # their earlier states, and in float32 how they move
    return working_memory(config, encoder.units, piece_units, prompt, bytes_each, rows, left) + more


def piece_needs(
    config: Config, device: torch.device, encoder: EncoderPlan, bytes_each: int, prompt: int | Sequence[int]
) -> list[tuple[int, int]]:
    """Return how many rows may go through a product at a time, each with the bytes that this takes (`encoding_bytes`).

    First the usual number, then half as many each time, down to a frame pair.
    """
    pair = encoder.grid[1] * encoder.grid[2]
    sizes = [largest_piece(device)]
    size = min(sizes[0], encoder.units)
    while size > pair:
        size = max(pair, size // 2)
        sizes.append(size)
    return [(size, encoding_bytes(config, encoder, max(pair, size), bytes_each, prompt)) for size in sizes]


def fitting_pieces(session: Session, plan: Plan, other_tokens: int = TEXT) -> list[int]:
    """Return the numbers of rows of `piece_needs` for which there is enough memory.

    Raises OutOfMemory: there is not enough even for a frame pair, or for the prompt, with `other_tokens` beside the video's.
    """
    model = session.loaded.model
    encoder = plan.encoder
    prompt = session.prompt_columns(encoder.keep, other_tokens)
    needs = piece_needs(model.config, model.device, encoder, model.dtype.itemsize, prompt)
    for number, (_, needed) in enumerate(needs):
        short = shortage(needed, str(model.device))
        if short and session.loaded.patches.clear():  # of earlier inputs
            short = shortage(needed, str(model.device))
        if not short:
            return [size for size, _ in needs[number:]]
    frames = f"{counted(plan.sampling.frames, 'frame')} of {plan.width}x{plan.height} pixels"
    kept = f"{frames}, {encoder.keep:,} visual tokens kept"
    if other_tokens > TEXT:
        kept += f", {other_tokens:,} other tokens"
    raise OutOfMemory(f"{plan.name} {short}: {kept}", USE_LESS, stage="encode")


def check_carried(session: Session, plan: Plan) -> None:
    """Raises OutOfMemory where there is too little for what a window of a stream leaves to the next one (live/segments.py)."""
    model = session.loaded.model
    _, height, width = plan.encoder.grid
    needed = 2 * carried_bytes(model.config, height * width, model.dtype.itemsize)  # two windows' are held at once
    if plan.encoder.reuse and (short := shortage(needed, str(model.device))):
        raise OutOfMemory(f"a stream of {plan.width}x{plan.height} pixels {short}", USE_LESS, stage="encode")


def check_memory(session: Session, text: int, visual: int) -> None:
    """Raises OutOfMemory where there is too little to read a prompt whose text is longer than the encoder's check assumed."""
    if text <= TEXT:
        return
    model = session.loaded.model
    needed = language_bytes(model.config, session.prompt_columns(visual, text), model.dtype.itemsize)
    if short := shortage(needed, session.loaded.device):
        raise OutOfMemory(f"a prompt of {text + visual:,} tokens {short}", USE_LESS, stage="prefill")

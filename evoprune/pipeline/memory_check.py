"""How much of a video is held at a time, so that encoding it fits into memory."""

from collections.abc import Sequence

from evoprune.errors import LESS, OutOfMemory
from evoprune.model.config import Config
from evoprune.model.memory import shortage, working_memory
from evoprune.model.sizes import PATCHES
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.view import View
from evoprune.pruning.encoder_plan import EncoderPlan, WholePairs
from evoprune.text import counted
from evoprune.vision.devices import units_at_a_time

CHUNK_BYTES = 64 * 2**20  # of frames as decoded, held at a time
TEXT = 64  # tokens of a prompt around the video, roughly


def chunk_bytes(engine: Engine, view: View) -> int:
    """Bytes of decoded frames to hold at a time: no more frames than the encoder takes, and no more than a few large ones."""
    limits, (_, height, width) = engine.loaded.video, view.plan.grid
    pairs = -(-units_at_a_time(engine.loaded.model.device) // (height * width))
    return min(CHUNK_BYTES, pairs * limits.temporal_patch_size * view.source.width * view.source.height * 3)


def encoding_bytes(
    config: Config, encoder: EncoderPlan, at_once: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Bytes that encoding a video and reading the prompt take beside the weights, roughly.

    Args:
        at_once: units that go through the tower together, at most.
        bytes_each: of a weight.
        prompt: tokens that the language model reads, in each layer or in all.
    """
    selections = encoder.selections
    selected, means = selections[0].rows if selections else 0, 0
    if any(
        isinstance(stage.reduce, WholePairs) for stage in selections
    ):  # their rows go on in chunks; the means of all of them are made in float32
        selected, means = min(at_once, encoder.units), encoder.units * PATCHES * config.vision_config.hidden_size * 4
    return working_memory(config, encoder.units, at_once, prompt, bytes_each, selected) + means


def units_at_once(engine: Engine, view: View, text: int = TEXT) -> int:
    """How many units to encode at a time: fewer than is usual where memory is short, but at least a frame pair.

    Args:
        text: tokens of the prompt around the video.

    Raises:
        OutOfMemory: there is not enough even for a frame pair, or for the prompt.
    """
    model, plan, encoder = engine.loaded.model, view.plan, view.encoder
    at_once, least = units_at_a_time(model.device), view.units_of_pair
    prompt = engine.prompt_columns(encoder.keep, text)
    while short := shortage(
        encoding_bytes(model.config, encoder, max(least, at_once), model.dtype.itemsize, prompt), str(model.device)
    ):
        if at_once <= least:
            frames = f"{counted(plan.sampling.frames, 'frame')} of {plan.width}x{plan.height} pixels"
            size = f"{frames}, {encoder.keep:,} visual tokens kept"
            size += f", {text:,} tokens of text" if text > TEXT else ""
            raise OutOfMemory(f"{view.name} {short}: {size}", LESS, stage="encode")
        at_once = max(least, at_once // 2)
    return at_once

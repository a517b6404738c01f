"""What a run takes of memory, counted before it begins, and what is said where there is not enough."""

from collections.abc import Iterator
from contextlib import contextmanager

from evoprune.errors import LESS, OutOfMemory, is_out_of_memory
from evoprune.language.generate import ANSWER_COLUMNS
from evoprune.model.config import PATCHES, Config
from evoprune.model.machine import available_memory
from evoprune.pipeline.inspection import kv_bytes

SMALL_CHANGE = 128 * 2**20  # bytes that any run takes, however small


@contextmanager
def memory_guard(stage: str) -> Iterator[None]:
    """Turns running out of memory, on host or device, into an error that names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"out of memory in {stage}", LESS, stage=stage) from problem


def shortage(needed: int, device: str) -> str | None:
    """What is missing, in words, where so many bytes cannot be had."""
    available = available_memory(device)
    if available is None or needed <= available:
        return None
    return f"needs about {_gib(needed)} of memory, and {_gib(available)} are available"


def _gib(size: int) -> str:
    return f"{max(0, size) / 2**30:.1f} GiB"


def working_memory(config: Config, units: int, at_once: int, prompt: int, bytes_each: int, late: int = 0) -> int:
    """Bytes that are in use at once beside the weights, roughly.

    Args:
        units: N, of the video. `at_once`: that go through the tower together, at most.
        prompt: tokens that the language model reads.
        bytes_each: of a weight.
        late: rows that go through a part of the tower together, chosen among those that all units have before it; 0 for none.
    """
    at_once = min(units, at_once)
    vision = config.vision_config
    wide = PATCHES * vision.hidden_size
    rows = units * vision.out_hidden_size * bytes_each
    tower = pixel_bytes(config, at_once, bytes_each) + tower_bytes(config, at_once, bytes_each)
    if late:
        # What all units have, once more as it is compared; then the few, without the MLP, which takes them in turn.
        rows = 2 * units * wide * bytes_each
        tower = max(tower, late * wide * (12 * 4 + bytes_each))
    return SMALL_CHANGE + rows + max(tower, language_bytes(config, prompt, bytes_each))


def pixel_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Of the patches of so many units, as they come and in the dtype of the weights."""
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return units * PATCHES * values * (4 + bytes_each)


def tower_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Of a pass through the tower, which is widest at rotary embedding, in float32, and in the MLP."""
    vision = config.vision_config
    return units * PATCHES * (12 * vision.hidden_size * 4 + 3 * vision.intermediate_size * bytes_each)


def language_bytes(config: Config, prompt: int, bytes_each: int) -> int:
    """Of reading a prompt, keys and values with it."""
    text = config.text_config
    widest = prompt * (8 * text.hidden_size * 4 + 3 * text.intermediate_size * bytes_each)
    return widest + kv_bytes(config, prompt + ANSWER_COLUMNS, bytes_each)

"""The memory that a run takes, counted before it begins, and the errors where there is not enough."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from evoprune.errors import LESS, OutOfMemory, is_out_of_memory
from evoprune.model.config import ANSWER_COLUMNS, PATCHES, Config, kv_bytes
from evoprune.model.machine import available_memory

SMALL_CHANGE = 128 * 2**20  # bytes that any run takes, however small


@contextmanager
def memory_guard(stage: str) -> Iterator[None]:
    """Turns running out of memory, on the CPU or on a device, into an `OutOfMemory` that names the stage."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as problem:
        if not is_out_of_memory(problem):
            raise
        raise OutOfMemory(f"out of memory in {stage}", LESS, stage=stage) from problem


def shortage(needed: int, device: str) -> str | None:
    """How much is missing, in words, where `needed` bytes cannot be had; else None."""
    available = available_memory(device)
    if available is None or needed <= available:
        return None
    return f"needs about {_size(needed)} of memory, and {_size(available)} are available"


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(0, size) >> 20} MiB"


def working_memory(
    config: Config, units: int, at_once: int, prompt: int | Sequence[int], bytes_each: int, late: int = 0
) -> int:
    """Bytes that are in use at once beside the weights, roughly.

    Args:
        units: N, of the video.
        at_once: units that go through the tower together, at most.
        prompt: tokens that the language model reads, in each layer or in all.
        bytes_each: of a weight.
        late: rows, selected among all units after some layers, that go through the other layers together; 0 for none.
    """
    at_once = min(units, at_once)
    vision = config.vision_config
    wide = PATCHES * vision.hidden_size
    rows = units * vision.out_hidden_size * bytes_each
    tower = pixel_bytes(config, at_once, bytes_each) + tower_bytes(config, at_once, bytes_each)
    if late:
        # The features of all units, and a second copy for comparing them; then the selected rows. The MLP takes these in turn.
        rows = 2 * units * wide * bytes_each
        tower = max(tower, late * wide * (12 * 4 + bytes_each))
    return SMALL_CHANGE + rows + max(tower, language_bytes(config, prompt, bytes_each))


def pixel_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Bytes of the patches of `units` units, in float32 and in the dtype of the weights."""
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return units * PATCHES * values * (4 + bytes_each)


def tower_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Bytes of a pass of `units` units through the tower, which is widest at rotary embedding, in float32, and in the MLP."""
    vision = config.vision_config
    return units * PATCHES * (12 * vision.hidden_size * 4 + 3 * vision.intermediate_size * bytes_each)


def language_bytes(config: Config, prompt: int | Sequence[int], bytes_each: int) -> int:
    """Bytes of reading a prompt of `prompt` tokens, in each layer or in all, keys and values included."""
    text, most = config.text_config, prompt if isinstance(prompt, int) else max(prompt)
    widest = most * (8 * text.hidden_size * 4 + 3 * text.intermediate_size * bytes_each)
    held = most + ANSWER_COLUMNS if isinstance(prompt, int) else [tokens + ANSWER_COLUMNS for tokens in prompt]
    return widest + kv_bytes(config, held, bytes_each)

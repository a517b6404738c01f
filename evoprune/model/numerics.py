"""In which dtype products are computed; norm, heads and rotation of the language model, rounded where Hugging Face rounds them;
and checks for NaN and infinity: a stage that finds one raises an error.

Torch's autocast would compute float32 products in 16 bits. The layers of a transformers model that a user holds obey it, as
without pruning. Methods, scores and this package's own models do not: methods compare in float32, and users choose the dtype.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.backend.devices import accelerator, to_device
from evoprune.errors import ModelError
from evoprune.model.config import head_size

HINT = "fp16 can overflow: take dtype bf16 or fp32; if it stays, the weights are damaged: get them again"


def all_numbers(x: torch.Tensor) -> torch.Tensor:
    """bool without dimension, on the device of `x`: whether that, which is not empty, holds neither NaN nor infinity.

    One pass over `x`, no copy, no synchronisation.
    """
    low, high = x.aminmax()  # both NaN if any number is
    return low * 0 == high * 0


def not_a_number_error(stage: str) -> ModelError:
    """The error to raise where the output of `stage` holds NaN or infinity."""
    return ModelError(f"NaN or infinity among the numbers of {stage}", HINT, stage=stage)


@contextmanager
def without_autocast() -> Iterator[None]:
    """A context, and a decorator, in which products are computed in the dtype of their factors."""
    with ExitStack() as stack:
        for kind in {"cpu", accelerator() or "cpu"}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in float32, rounded before it is scaled, as in Hugging Face. torch would scale before it rounds."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


@lru_cache
def _frequencies(theta: float, sections: tuple[int, ...], interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of features: radians per position, float32 `[head_dim / 2]`, and which of the three positions, int64."""
    dim = 2 * sum(sections)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    if interleaved:  # height and width take every third pair as long as they have any, and time has all others
        axes = [0] * len(axes)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return frequencies, torch.tensor(axes, dtype=torch.int64, device="cpu")


def rotation(config, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[L, 1, head_dim]` in dtype and on the device of `like`; the sines' first half is negated."""
    frequencies, axis = frequencies_of(config)
    return turns_by(to_device(positions[axis].T * frequencies, like.device), like.dtype)


def turns_by(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotation`, of angles, float32 `[L, head_dim / 2]`."""
    cos, sin = angles[:, None].cos(), angles[:, None].sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def frequencies_of(config) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, see `_frequencies`. `config`: of the language model."""
    rope = config.rope_parameters
    return _frequencies(rope["rope_theta"], tuple(rope["mrope_section"]), bool(rope.get("mrope_interleaved")))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each feature of `[..., heads, head_dim]` with the one half a head away (arXiv 2104.09864)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def heads_of(attention, name: str, x: torch.Tensor, config) -> torch.Tensor:
    """`[L, heads, head_dim]`, before rotary: queries, keys or values ("q", "k", "v") of normed `x` (`[L, hidden]`), by head.

    `attention`: of a layer of the language model. Its queries and keys are normed head by head where it has such norms.
    """
    made = getattr(attention, f"{name}_proj")(x).view(len(x), -1, head_size(config))
    of_heads = getattr(attention, f"{name}_norm", None)
    return made if of_heads is None else norm(made, of_heads.weight, config.rms_norm_eps)

"""The differences between the layers of the two towers: the norm and the MLP. The rest of the code is shared.

Qwen2.5-VL (arXiv 2502.13923) has RMS norms and gated MLPs. Qwen2-VL (arXiv 2409.12191) has layer norms with a bias, and MLPs of two
matrices with the quick GELU between them. All layers of Qwen2-VL attend to whole frame pairs, which its sizes state
(`model.config.vision_sizes`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.model.config import QWEN2, QWEN2_5, vision_sizes
from evoprune.model.linear import linear
from evoprune.vision.norm_rotary import norm as rms_norm


@dataclass(frozen=True)
class Family:
    """The functions of one family of towers. Their first argument is a module with Hugging Face's names.

    Attributes:
        norm: norm(module, x) of rows `[..., hidden]`.
        mlp: mlp(module, x, plus) is `plus` plus the MLP of normed rows `x`; all are `[..., hidden]`.
    """

    norm: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def family(visual) -> Family:
    """The family of a tower, this project's or transformers'."""
    return FAMILIES[vision_sizes(visual.config).family]


def _rms(module, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight)


def _gated(mlp, x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    hidden = linear(mlp.up_proj, x, times=linear(mlp.gate_proj, x, silu=True))
    return linear(mlp.down_proj, hidden, plus=plus)


def _layer(module, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.weight.shape, module.weight, module.bias, 1e-6)


def _plain(mlp, x: torch.Tensor, plus: torch.Tensor) -> torch.Tensor:
    hidden = linear(mlp.fc1, x)
    hidden = hidden.mul_(torch.sigmoid(1.702 * hidden))  # the quick GELU
    return linear(mlp.fc2, hidden, plus=plus)


FAMILIES = {QWEN2_5: Family(_rms, _gated), QWEN2: Family(_layer, _plain)}

"""What the layers of the two towers do differently: the norm and the MLP. All else about them is the same code.

Qwen2.5-VL (arXiv 2502.13923) has RMS norms and gated MLPs; Qwen2-VL (arXiv 2409.12191) layer norms, with a bias, and MLPs of two
matrices with the quick GELU between them. That its layers all look at whole grids is said by its sizes (`config.VisionConfig`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.model.config import QWEN2, QWEN2_5, vision_sizes
from evoprune.model.linear import linear
from evoprune.vision.rowwise import norm as rms_norm


@dataclass(frozen=True)
class Family:
    """Both are given modules under Hugging Face's names.

    Attributes:
        norm: of rows `[..., hidden]`.
        mlp: what it makes of rows that were normed, added to `plus`; all `[..., hidden]`.
    """

    norm: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
    mlp: Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], torch.Tensor]


def family(visual) -> Family:
    """That of a tower's weights, ours or transformers'."""
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

"""Muon in float32, batched by matrix shape. PyTorch uses bfloat16, which is ten times slower on CPUs without bfloat16 support."""

from collections import defaultdict
from collections.abc import Callable

import torch

# Same as in PyTorch. The polynomial is steep at zero, so singular values end up between 0.5 and 1.5.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")` for matrices only (Jordan, 2024; Liu et al., 2502.16982)."""

    def __init__(self, groups: list[dict], momentum: float, weight_decay: float):
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Update all matrices with a gradient. `closure` is not called."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for (rows, columns), found in alike.items():
                updates = orthogonal(torch.stack([self._smoothed(p, group["momentum"]) for p in found]))
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, update in zip(found, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)

    def _smoothed(self, p: torch.Tensor, momentum: float) -> torch.Tensor:
        """Return the Nesterov momentum of the gradient of `p`."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return p.grad.lerp(state["momentum_buffer"].lerp_(p.grad, 1 - momentum), momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Push the singular values of the matrices, `[N, rows, columns]`, close to 1 with five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT.contiguous() if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

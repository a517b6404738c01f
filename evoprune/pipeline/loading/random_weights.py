"""Random weights at true size, for benchmarks: speed does not depend on the values of the weights."""

import torch

from evoprune.model.config import Config
from evoprune.model.weights import QwenVL, empty


def random_model(config: Config, dtype: torch.dtype, device: torch.device) -> QwenVL:
    """A model with seeded random weights. Takes seconds at 3B, where ordinary initialisation takes half a minute."""
    model = empty(config).to(dtype).to_empty(device=device)
    model.tie()
    # One block of noise, repeated. Its length is a prime, so that no two rows of a matrix are equal.
    random = torch.Generator().manual_seed(0)
    block = torch.randn(1_048_573, generator=random, dtype=torch.float32, device="cpu").mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0 if name.endswith("bias") else 1)
                continue
            noise = block.roll(int(torch.randint(len(block), (), generator=random, dtype=torch.int64, device="cpu")))
            for piece in weight.view(-1).split(len(noise)):
                piece.copy_(noise[: len(piece)])
    return model

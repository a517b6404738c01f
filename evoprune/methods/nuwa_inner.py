"""Nuwa's stage inside the language model (arXiv 2602.02951): after 15 of 28 layers, what some head attends to most stays."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.fastv import FastV
from evoprune.methods.settings import Part
from evoprune.pruning.types import LayerTokens

LAST = 3  # tokens of the prompt whose attention counts, as the mean of each head


@dataclass(frozen=True)
class NuwaInner(FastV):
    name: ClassVar[str] = "nuwa-inner"
    source: ClassVar[str] = "arXiv 2602.02951"
    default_share: ClassVar[float] = 0.42

    depth: Part = 15 / 28

    def score(self, tokens: LayerTokens) -> torch.Tensor:
        return tokens.last_weights(LAST)[:, tokens.visual].amax(0)

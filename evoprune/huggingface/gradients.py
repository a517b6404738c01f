"""A tower that prunes has no gradients. Where they are asked for, an error says so."""

import torch

from evoprune.errors import UsageError


def no_gradients() -> UsageError:
    """The error where gradients of a tower that prunes are asked for."""
    return UsageError(
        "a vision tower that prunes has no gradients",
        "to train the language model alone: model.model.visual.requires_grad_(False)",
    )


def trained_weights(visual) -> list[torch.Tensor]:
    """The tower's weights that are to get gradients."""
    return [weight for weight in visual.parameters() if weight.requires_grad]


def refusing_gradients(features: torch.Tensor, visual) -> torch.Tensor:
    """The features of a tower, from which `backward` raises UsageError if the tower's weights are to get gradients.

    A forward pass in eval mode is usually no training, though by default gradients are enabled and weights ask for them.
    """
    trained = trained_weights(visual)
    return _NoGradients.apply(features, trained[0]) if trained and torch.is_grad_enabled() else features


class _NoGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return features.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        raise no_gradients()

"""Random weights at true size, for benchmarks: speed does not depend on what the weights are."""

import torch


def random_model(config, dtype: torch.dtype, device: torch.device):
    """Seeded random weights at true size, in seconds where ordinary initialisation takes half a minute."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return _fill_randomly(model, dtype, device)


def random_tower(config, dtype: torch.dtype, device: str = "cpu"):
    """The vision tower alone, at the dimensions of `config` (a `Qwen2_5_VLVisionConfig`), with seeded random weights."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return _fill_randomly(tower, dtype, torch.device(device)).eval().requires_grad_(False)


def _fill_randomly(model, dtype: torch.dtype, device: torch.device):
    model.to_empty(device=device)
    model.tie_weights()
    # Rotary frequencies follow from the config, and are noise after `to_empty`.
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq"):
                setattr(parent, name, type(child)(child.config).to(device))

    # One block of noise, repeated. Its length is a prime, so that no two rows of a matrix are alike.
    random = torch.Generator().manual_seed(0)
    block = torch.randn(1_048_573, generator=random).mul_(0.02).to(device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0 if name.endswith("bias") else 1)
                continue
            noise = block.roll(int(torch.randint(len(block), (), generator=random)))
            for part in weight.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])
    return model

"""Random scorers in the file format of YF-T/IDPruner."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def scorer_tensors(width: int, hidden: int = 8, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {"weight": (hidden, width), "bias": (hidden,)}
    return {
        f"{part}_proj.{kind}": scale * torch.randn(shape, generator=random)
        for part in "kq"
        for kind, shape in shapes.items()
    }


def write_scorer(folder: Path, tensors: dict[str, torch.Tensor], prefix: str = "", **config) -> str:
    """Write a scorer folder. Returns the setting that uses it."""
    hidden, width = tensors["k_proj.weight"].shape
    folder.mkdir(parents=True, exist_ok=True)
    known = {"in_features": width, "hidden_dim": hidden, "init_scale": 0.0001, "architecture": "TransformerScorer"}
    (folder / "config.json").write_text(json.dumps(known | config))
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return f"scorer={folder}"

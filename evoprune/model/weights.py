"""The weights of a Qwen2.5-VL or Qwen2-VL, under Hugging Face's names, and nothing else.

`vision/tower.py` and `language/decoder.py` run on the weights alone. They run as well on a model that somebody loaded with
transformers, because the names are the same; but that library takes longer to import than a short answer takes, so a model
loaded here does without it.
"""

import torch
from torch import nn

from evoprune.model.config import QWEN2, Config, TextConfig, VisionConfig


class Part(nn.Module):
    """Named modules side by side."""

    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Norm(nn.Module):
    """The scale of an RMS norm, `[size]`; or with a bias, that of a layer norm."""

    def __init__(self, size: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None


def _mlp(hidden: int, inner: int, bias: bool) -> Part:
    return Part(
        gate_proj=nn.Linear(hidden, inner, bias=bias),
        up_proj=nn.Linear(hidden, inner, bias=bias),
        down_proj=nn.Linear(inner, hidden, bias=bias),
    )


class Tower(Part):
    """The vision tower's weights. `config`: `VisionConfig`."""

    def __init__(self, config: VisionConfig):
        wide, patch = config.hidden_size, (config.temporal_patch_size, config.patch_size, config.patch_size)
        qwen2, inner = config.family == QWEN2, config.intermediate_size
        joined = wide * config.spatial_merge_size**2
        super().__init__(
            patch_embed=Part(proj=nn.Conv3d(config.in_channels, wide, patch, patch, bias=False)),
            blocks=nn.ModuleList(
                Part(
                    norm1=Norm(wide, bias=qwen2),
                    norm2=Norm(wide, bias=qwen2),
                    attn=Part(qkv=nn.Linear(wide, 3 * wide), proj=nn.Linear(wide, wide)),
                    mlp=Part(fc1=nn.Linear(wide, inner), fc2=nn.Linear(inner, wide))
                    if qwen2
                    else _mlp(wide, inner, True),
                )
                for _ in range(config.depth)
            ),
            merger=Part(
                ln_q=Norm(wide, bias=qwen2),
                mlp=nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.out_hidden_size)),
            ),
        )
        self.config = config


class LanguageModel(Part):
    """The decoder's weights. `config`: `TextConfig`."""

    def __init__(self, config: TextConfig):
        wide, heads = config.hidden_size, config.num_attention_heads
        narrow = wide // heads * config.num_key_value_heads
        super().__init__(
            embed_tokens=nn.Embedding.from_pretrained(torch.empty(config.vocab_size, wide)),
            layers=nn.ModuleList(
                Part(
                    input_layernorm=Norm(wide),
                    post_attention_layernorm=Norm(wide),
                    self_attn=Part(
                        q_proj=nn.Linear(wide, wide),
                        k_proj=nn.Linear(wide, narrow),
                        v_proj=nn.Linear(wide, narrow),
                        o_proj=nn.Linear(wide, wide, bias=False),
                    ),
                    mlp=_mlp(wide, config.intermediate_size, bias=False),
                )
                for _ in range(config.num_hidden_layers)
            ),
            norm=Norm(wide),
        )
        self.config = config


class QwenVL(Part):
    """All weights: `model.visual`, `model.language_model`, `lm_head`. `config`: `Config`."""

    def __init__(self, config: Config):
        super().__init__(
            model=Part(visual=Tower(config.vision_config), language_model=LanguageModel(config.text_config)),
            lm_head=nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False),
        )
        self.config = config
        self.tie()

    def tie(self) -> None:
        """Makes input and output embeddings one, where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device


def empty(config: Config) -> QwenVL:
    """A model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return QwenVL(config).eval().requires_grad_(False)


def shared(model: QwenVL) -> QwenVL:
    """Another model on the same tensors, whose layers can be exchanged without touching those of the first."""
    other = empty(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie()
    return other.requires_grad_(False)


def name_in_memory(name: str) -> str:
    """Where a tensor of a checkpoint belongs: published ones keep tower and language model under older names."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name

"""The bare tree of weights of a Qwen2.5-VL or Qwen2-VL, under Hugging Face's names. It has no forward pass.

`vision/tower.py` and `language/decoder.py` compute on such a tree. They also run on a model that was loaded with transformers,
because the names are the same. Models loaded by this package do without transformers, whose import takes longer than a short
answer.
"""

import torch
from torch import nn

from evoprune.model.config import QWEN2, Config, TextConfig, VisionConfig


class Tree(nn.Module):
    """A node of the tree: a module whose children have these names."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def _mlp(hidden: int, inner: int, bias: bool) -> Tree:
    return Tree(
        gate_proj=nn.Linear(hidden, inner, bias=bias),
        up_proj=nn.Linear(hidden, inner, bias=bias),
        down_proj=nn.Linear(inner, hidden, bias=bias),
    )


class Tower(Tree):
    """The vision tower's weights."""

    def __init__(self, config: VisionConfig):
        wide, patch = config.hidden_size, (config.temporal_patch_size, config.patch_size, config.patch_size)
        qwen2, inner = config.family == QWEN2, config.intermediate_size
        joined, norm = wide * config.spatial_merge_size**2, nn.LayerNorm if qwen2 else nn.RMSNorm
        super().__init__(
            patch_embed=Tree(proj=nn.Conv3d(config.in_channels, wide, patch, patch, bias=False)),
            blocks=nn.ModuleList(
                Tree(
                    norm1=norm(wide),
                    norm2=norm(wide),
                    attn=Tree(qkv=nn.Linear(wide, 3 * wide), proj=nn.Linear(wide, wide)),
                    mlp=Tree(fc1=nn.Linear(wide, inner), fc2=nn.Linear(inner, wide))
                    if qwen2
                    else _mlp(wide, inner, True),
                )
                for _ in range(config.depth)
            ),
            merger=Tree(
                ln_q=norm(wide),
                mlp=nn.Sequential(nn.Linear(joined, joined), nn.GELU(), nn.Linear(joined, config.out_hidden_size)),
            ),
        )
        self.config = config


class LanguageModel(Tree):
    """The language model's weights, without its output layer."""

    def __init__(self, config: TextConfig):
        wide, heads = config.hidden_size, config.num_attention_heads
        key_value = wide // heads * config.num_key_value_heads
        super().__init__(
            # From a tensor: drawing one imports the whole of torch.compile, even without memory.
            embed_tokens=nn.Embedding.from_pretrained(
                torch.empty(config.vocab_size, wide, dtype=torch.float32, device=torch.get_default_device())
            ),
            layers=nn.ModuleList(
                Tree(
                    input_layernorm=nn.RMSNorm(wide),
                    post_attention_layernorm=nn.RMSNorm(wide),
                    self_attn=Tree(
                        q_proj=nn.Linear(wide, wide),
                        k_proj=nn.Linear(wide, key_value),
                        v_proj=nn.Linear(wide, key_value),
                        o_proj=nn.Linear(wide, wide, bias=False),
                    ),
                    mlp=_mlp(wide, config.intermediate_size, bias=False),
                )
                for _ in range(config.num_hidden_layers)
            ),
            norm=nn.RMSNorm(wide),
        )
        self.config = config


class QwenVL(Tree):
    """All weights: `model.visual`, `model.language_model` and `lm_head`, the output layer."""

    def __init__(self, config: Config):
        super().__init__(
            model=Tree(visual=Tower(config.vision_config), language_model=LanguageModel(config.text_config)),
            lm_head=nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False),
        )
        self.config = config
        self.tie()

    def tie(self) -> None:
        """Makes input and output embeddings share one tensor, if the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device


def empty(config: Config) -> QwenVL:
    """A model on the meta device: names and shapes without memory."""
    with torch.device("meta"):
        return QwenVL(config).eval().requires_grad_(False)


def shared(model: QwenVL) -> QwenVL:
    """Another tree on the same tensors. Its layers can be replaced without changing the first one."""
    other = empty(model.config)
    other.load_state_dict(model.state_dict(), assign=True)
    other.tie()
    return other.requires_grad_(False)


def name_in_memory(name: str) -> str:
    """The name in the tree of a tensor in a checkpoint. Published checkpoints use older names for tower and language model."""
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name

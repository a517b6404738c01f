"""Module trees for the weights of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and Qwen3.5 models, using the same names as in Hugging Face.

The modules have no forward pass. Instead, their weights are used by `vision/tower.py` and `language/decoder.py`. Because the names
are the same, these files can also run a model loaded using transformers. Models loaded by evoprune itself don't require
transformers, which takes longer to import than generating a short answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import nn

from evoprune.backend import shared_copy
from evoprune.model.config import Config, DeltaNet, TextConfig, VisionConfig, head_size

MLP = "gate_proj", "up_proj", "down_proj"  # the matrices of the language model's MLPs


class Tree(nn.Module):
    """A module built from named children. A name such as `mlp.0` refers to the child `0` of the child `mlp`."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            first, _, rest = name.partition(".")
            if not rest:
                self.add_module(name, child)
            elif hasattr(self, first):
                getattr(self, first).add_module(rest, child)
            else:
                self.add_module(first, Tree(**{rest: child}))


def _mlp(names: Sequence[str], wide: int, inner: int, bias: bool) -> Tree:
    """Create an MLP whose last matrix maps `inner` to `wide` features, and all other matrices map `wide` to `inner` features."""
    *into, back = names
    return Tree(**{name: nn.Linear(wide, inner, bias) for name in into}, **{back: nn.Linear(inner, wide, bias)})


class Tower(Tree):
    """The vision tower weights."""

    def __init__(self, config: VisionConfig):
        wide = config.hidden_size
        patch = (config.temporal_patch_size, config.patch_size, config.patch_size)
        norm = nn.LayerNorm if config.traits.layer_norms else nn.RMSNorm
        table = config.num_position_embeddings
        joined = wide * config.spatial_merge_size**2
        inner = config.deepstack_visual_indexes
        super().__init__(
            patch_embed=Tree(proj=nn.Conv3d(config.in_channels, wide, patch, patch, bias=table is not None)),
            blocks=nn.ModuleList(
                Tree(
                    norm1=norm(wide),
                    norm2=norm(wide),
                    attn=Tree(qkv=nn.Linear(wide, 3 * wide), proj=nn.Linear(wide, wide)),
                    mlp=_mlp(config.traits.mlp, wide, config.intermediate_size, bias=True),
                )
                for _ in range(config.depth)
            ),
            merger=_merger(config, norm(wide)),
        )
        if table is not None:
            self.pos_embed = _embedding(table, wide)
        if inner:
            self.deepstack_merger_list = nn.ModuleList(_merger(config, norm(joined)) for _ in inner)
        self.config = config


def _merger(config: VisionConfig, norm: nn.Module) -> Tree:
    joined = config.hidden_size * config.spatial_merge_size**2
    first, second, third = config.traits.merger
    layers = {first: norm, second: nn.Linear(joined, joined), third: nn.Linear(joined, config.out_hidden_size)}
    return Tree(**layers)


def _embedding(count: int, wide: int) -> nn.Embedding:
    """Create an embedding with uninitialized weights.

    Random initialization would import all of torch.compile, even on the meta device.
    """
    weight = torch.empty(count, wide, dtype=torch.float32, device=torch.get_default_device())
    return nn.Embedding.from_pretrained(weight)


def _attention(config: TextConfig) -> Tree:
    wide = config.hidden_size
    head = head_size(config)
    biased = not config.head_norms
    queries = config.num_attention_heads * head
    keys = config.num_key_value_heads * head
    return Tree(
        q_proj=nn.Linear(wide, (1 + config.output_gate) * queries, bias=biased),
        k_proj=nn.Linear(wide, keys, bias=biased),
        v_proj=nn.Linear(wide, keys, bias=biased),
        o_proj=nn.Linear(queries, wide, bias=False),
        **{name: nn.RMSNorm(head) for name in ("q_norm", "k_norm") if config.head_norms},
    )


class DeltaWeights(Tree):
    """The weights of a Gated DeltaNet."""

    def __init__(self, net: DeltaNet, wide: int):
        heads = net.linear_num_value_heads
        super().__init__(
            in_proj_qkv=nn.Linear(wide, net.channels, bias=False),
            in_proj_z=nn.Linear(wide, net.value_size, bias=False),
            in_proj_b=nn.Linear(wide, heads, bias=False),
            in_proj_a=nn.Linear(wide, heads, bias=False),
            conv1d=nn.Conv1d(net.channels, net.channels, net.linear_conv_kernel_dim, groups=net.channels, bias=False),
            norm=nn.RMSNorm(net.linear_value_head_dim),
            out_proj=nn.Linear(net.value_size, wide, bias=False),
        )
        for name in ("A_log", "dt_bias"):
            self.register_parameter(name, _empty(heads))


class Weight(nn.Module):
    """A single matrix that is neither packed nor quantized."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = _empty(*shape)


class Experts(nn.Module):
    """The weights of a layer's experts."""

    def __init__(self, count: int, wide: int, inner: int):
        super().__init__()
        self.gate_up_proj = _empty(count, 2 * inner, wide)
        self.down_proj = _empty(count, wide, inner)


def _empty(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=torch.get_default_device()))


def _mixture(config: TextConfig) -> Tree:
    """Create the weights of a mixture of experts, which replaces the MLP of a layer."""
    wide = config.hidden_size
    experts = config.experts
    shared = {}
    if inner := experts.shared_expert_intermediate_size:
        shared = {"shared_expert": _mlp(MLP, wide, inner, bias=False), "shared_expert_gate": Weight(1, wide)}
    return Tree(
        gate=Weight(experts.num_experts, wide),
        experts=Experts(experts.num_experts, wide, experts.moe_intermediate_size),
        **shared,
    )


class LanguageModel(Tree):
    """The language model weights, excluding the output layer."""

    def __init__(self, config: TextConfig):
        wide = config.hidden_size
        super().__init__(
            embed_tokens=_embedding(config.vocab_size, wide), layers=_layers(config), norm=nn.RMSNorm(wide)
        )
        self.config = config


def _layers(config: TextConfig) -> nn.ModuleList:
    """Create the layers of a language model."""
    wide = config.hidden_size

    def layer(number: int) -> Tree:
        linear = config.is_linear(number)
        reads = {"linear_attn": DeltaWeights(config.delta_net, wide)} if linear else {"self_attn": _attention(config)}
        return Tree(
            input_layernorm=nn.RMSNorm(wide),
            post_attention_layernorm=nn.RMSNorm(wide),
            **reads,
            mlp=_mixture(config)
            if config.has_experts(number)
            else _mlp(MLP, wide, config.intermediate_size, bias=False),
        )

    return nn.ModuleList(map(layer, range(config.num_hidden_layers)))


class MtpWeights(Tree):
    """The weights of the layer for multi-token prediction. It shares the embeddings and the output layer of the model."""

    def __init__(self, config: TextConfig):
        wide = config.hidden_size
        super().__init__(
            pre_fc_norm_embedding=nn.RMSNorm(wide),
            pre_fc_norm_hidden=nn.RMSNorm(wide),
            fc=nn.Linear(2 * wide, wide, bias=False),
            layers=_layers(config.mtp),
            norm=nn.RMSNorm(wide),
        )
        self.config = config.mtp


class Model(Tree):
    """All model weights: the tower (`model.visual`), the language model (`model.language_model`), and `lm_head`."""

    config: Config
    native: bool  # whether language/decoder.py runs the language model, instead of transformers

    def __init__(self, **children: nn.Module):
        super().__init__(**children)
        # Functions that read the weights on the meta device, by name. See `read` of `Quantization.apply` for their results.
        self.deferred: dict[str, Callable[[], Any]] = {}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.language_model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device

    def fill_random(self, device: torch.device) -> None:
        """Set biases to zero, other vectors to one, and all other weights to seeded random noise. Tied weights stay tied."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():  # `to_empty` would import torch's compiler, which takes two seconds
            for name, weight in [*module.named_parameters(recurse=False)]:
                if weight not in made:
                    values = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                    made[weight] = nn.Parameter(values, requires_grad=False)
                setattr(module, name, made[weight])
        like = next(self.parameters())
        # Repeat a single block of noise. The block length is prime, so no two matrix rows are identical.
        random = torch.Generator().manual_seed(0)
        block = torch.randn(1_048_573, generator=random, dtype=torch.float32, device="cpu").mul_(0.02).to(like)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if weight.ndim == 1:
                    value = 0 if name.endswith("bias") else 1
                    weight.fill_(value)
                    continue
                noise = block.roll(
                    int(torch.randint(len(block), (), generator=random, dtype=torch.int64, device="cpu"))
                )
                for piece in weight.view(-1).split(len(noise)):
                    piece.copy_(noise[: len(piece)])

    def shared(self) -> Self:
        """Return a copy that shares this model's tensors. Layers can be replaced in the copy without changing the original."""
        raise NotImplementedError


class QwenVL(Model):
    """A model whose language model is run by evoprune's own code.

    The module `mtp` exists only if the config has a layer for multi-token prediction.
    """

    native = True

    def __init__(self, config: Config):
        super().__init__(
            model=Tree(visual=Tower(config.vision_config), language_model=LanguageModel(config.text_config)),
            lm_head=nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False),
        )
        if config.text_config.mtp_num_hidden_layers:
            self.mtp = MtpWeights(config.text_config)
        self.config = config
        self.tie()

    @classmethod
    def empty(cls, config: Config) -> Self:
        """Return a model on the meta device, with weights that have names and shapes but take no memory."""
        with torch.device("meta"):
            return cls(config).eval().requires_grad_(False)

    @classmethod
    def random(cls, config: Config, dtype: torch.dtype, device: torch.device) -> Self:
        """Return a model with seeded random weights, for benchmarks in which the weight values don't affect the speed.

        Creating a 3B model takes a few seconds.
        """
        model = cls.empty(config).to(dtype)
        model.fill_random(device)
        return model

    def shared(self) -> Self:
        copy = self.empty(self.config)
        copy.load_state_dict(self.state_dict(), assign=True)
        copy.tie()
        return copy.requires_grad_(False)

    @property
    def mtp_model(self) -> Tree:
        """The layer for multi-token prediction, `mtp`, as a language model with a single layer."""
        made = Tree(model=Tree(language_model=self.mtp), lm_head=self.lm_head)
        made.config = replace(self.config, text_config=self.mtp.config)
        return made

    def tie(self) -> None:
        """If the config specifies tied embeddings, make the input embeddings and the output layer share a single tensor."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight


class HostedVL(Model):
    """A model whose `visual`, `language_model`, and `lm_head` are transformers modules."""

    native = False
    package = ""  # package that quantized the layers, for error messages

    def __init__(self, config: Config, visual: nn.Module, language_model: nn.Module, lm_head: nn.Module):
        if hasattr(language_model, "hyper_connection_mixer"):  # in Qwen4-Exp, this is the only final norm
            language_model.norm = language_model.hyper_connection_mixer.hc_norm
        super().__init__(model=Tree(visual=visual, language_model=language_model), lm_head=lm_head)
        self.config = config

    def shared(self) -> Self:
        parts = self.model.visual, self.model.language_model, self.lm_head
        hosted = type(self)(self.config, *map(shared_copy, parts))
        hosted.package = self.package
        return hosted

"""Adds the cluster-size bias to vLLM's attention.

vLLM's attention doesn't support additive masks, so the bias is encoded in extra query and key dimensions. In these dimensions, each
query is 1 and each key contains bias / scale, so their scaled product includes the bias. Because the keys in vLLM's cache already
include the bias, it also applies to cached prefixes, chunked prefill, and generated tokens. Each token's bias arrives together with
its positions (see positions.py).

vLLM's kernels support only certain head sizes, so heads are zero-padded to the next supported size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from evoprune.errors import UsageError
from evoprune_vllm.positions import split_bias

PIECES = 3  # number of extra dimensions: the bias rounded to bfloat16, then the remaining rounding error, twice


class BiasedRotary(nn.Module):
    """A rotary embedding that also appends the bias dimensions to each head.

    Args:
        rotary: The layer's original rotary embedding.
        attention: The layer's attention, with enough room for the bias in its heads.
        head_size: The head size without the bias.
        scale: The attention scale factor for query-key products.
    """

    def __init__(self, rotary: nn.Module, attention: Attention, head_size: int, scale: float):
        super().__init__()
        self.rotary = rotary
        self.head_size = head_size
        self.scale = scale
        self.heads = attention.num_heads
        self.kv_heads = attention.num_kv_heads
        self.wide = attention.head_size

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor):
        """Apply rotary embeddings to queries and keys, and append the bias dimensions.

        Args:
            positions: `[3, n]`, with each token's bias in the upper bits.

        Returns:
            Queries `[n, heads * wide]` and keys `[n, kv_heads * wide]`.
        """
        plain, bias = split_bias(positions)
        query, key = self.rotary(plain, query, key)
        # Split bias / scale into pieces that add up to it, in the dtype of the keys.
        left = bias / self.scale
        pieces = []
        for _ in range(PIECES):
            pieces.append(left.to(key.dtype))
            left = left - pieces[-1].float()
        query = self._extended(query, query.new_ones(len(query), PIECES), self.heads)
        return query, self._extended(key, torch.stack(pieces, 1), self.kv_heads)

    def _extended(self, x: torch.Tensor, pieces: torch.Tensor, heads: int) -> torch.Tensor:
        pieces = F.pad(pieces, (0, self.wide - self.head_size - PIECES))
        by_head = [x.view(-1, heads, self.head_size), pieces[:, None].expand(-1, heads, -1)]
        return torch.cat(by_head, 2).flatten(1)


class BiasedAttention(Attention):
    """vLLM's attention with larger heads: queries and keys have `wide` features per head instead of `head_size`.

    Values and results still have `head_size` features per head. `options` are passed to `Attention`.
    """

    def __init__(self, head_size: int, wide: int, **options):
        super().__init__(head_size=wide, **options)
        self.value_size = head_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Compute attention for wide queries and keys, and values `[n, kv_heads * head_size]`. Returns `[n, heads * head_size]`."""
        value = value.view(-1, self.num_kv_heads, self.value_size)
        value = F.pad(value, (0, self.head_size - self.value_size)).flatten(1)
        out = super().forward(query, key, value)
        return out.view(-1, self.num_heads, self.head_size)[:, :, : self.value_size].flatten(1)


def add_bias(layers: nn.ModuleList, config: VllmConfig) -> None:
    """Make language model layers apply the bias stored in positions. Must be called before the weights are loaded.

    Raises:
        UsageError: If the attention backend has no kernel for wider heads, or hasn't been tested with them.
    """
    for each in layers:
        if not hasattr(each, "self_attn"):  # the layer uses linear attention
            continue
        layer = each.self_attn
        stock = layer.attn
        backend = layer.attn.attn_backend
        wide = next((n for n in range(stock.head_size + PIECES, 257) if backend.supports_head_size(n)), None)
        if (
            backend.get_name() not in ("CPU_ATTN", "FLASH_ATTN") or wide is None
        ):  # only tested kernels, which read the head size from the layer
            raise _unfit(backend)
        del config.compilation_config.static_forward_context[stock.layer_name]  # the new layer replaces it
        layer.attn = BiasedAttention(
            stock.head_size,
            wide,
            num_heads=stock.num_heads,
            scale=layer.scaling,
            num_kv_heads=stock.num_kv_heads,
            cache_config=config.cache_config,
            quant_config=config.quant_config,
            prefix=stock.layer_name,
        )
        if layer.attn.attn_backend is not backend:
            raise _unfit(layer.attn.attn_backend)
        layer.rotary_emb = BiasedRotary(layer.rotary_emb, layer.attn, stock.head_size, layer.scaling)


def _unfit(backend) -> UsageError:
    hint = (
        'method "evoprune:count=0" prunes without the bias: '
        '--additional-config \'{"evoprune": {"method": "evoprune:count=0"}}\'; other methods than evoprune have none'
    )
    return UsageError(f"cluster sizes cannot weigh tokens in attention backend {backend.get_name()}", hint)

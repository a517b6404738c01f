"""The forward pass of the language model (Qwen2 and Qwen2.5) over new columns of a prompt, or over one generated token.

It computes on a tree of weights under Hugging Face's names: a `model.weights.QwenVL`, or a model of transformers. A *column*
is one token of the prompt or answer. Queries and keys are rotated by three positions at once (M-RoPE, arXiv 2409.12191, section
2.1); groups of heads share keys and values (arXiv 2305.13245). Results are rounded where Hugging Face rounds them, and torch's
autocast changes nothing here.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.model.autocast import without_autocast
from evoprune.model.linear import linear

STRIP = 1024  # query columns that share one mask


class KVCache:
    """Keys and values of every layer for the columns read so far.

    Args:
        model: its config, and the dtype and device of its embeddings, decide the shape.
        capacity: columns to allocate, at least 1. The cache grows by half when it is full.

    Attributes:
        length: columns that are valid. A forward pass writes after them and raises `length` at its end, so a pass that fails
            leaves the cache as it was.
        sizes: float32 `[length]`, the cluster size of each column: attention treats it as that many columns; None for 1 each.
    """

    def __init__(self, model, capacity: int):
        config = model.config.text_config
        weight = model.model.language_model.embed_tokens.weight
        shape = (1, config.num_key_value_heads, capacity, config.hidden_size // config.num_attention_heads)
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for _ in range(config.num_hidden_layers)]
        self.length = 0
        self.sizes: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Columns that are allocated in every layer."""
        return min(keys.shape[2] for keys, _ in self._layers)

    def crop(self, length: int) -> None:
        """Drops all but the first `length` columns.

        Raises:
            ValueError: the cache holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} columns, not {length}")
        self.length = length
        self.sizes = None if self.sizes is None else self.sizes[:length]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new columns after the valid ones. They become valid when `length` is raised.

        Args:
            layer: index of the layer.
            keys, values: `[1, kv_heads, L, head_dim]`.

        Returns:
            All keys and values of the layer `[1, kv_heads, length + L, head_dim]`, views.
        """
        columns = keys.shape[2]
        end = self.length + columns
        stored = self._layers[layer]
        if end > stored[0].shape[2]:
            # Layer by layer, so that only one layer is in memory twice.
            stored = self._layers[layer] = self._grown(stored[0], end), self._grown(stored[1], end)
        stored[0].narrow(2, self.length, columns).copy_(keys)
        stored[1].narrow(2, self.length, columns).copy_(values)
        return stored[0].narrow(2, 0, end), stored[1].narrow(2, 0, end)

    def _grown(self, tensor: torch.Tensor, needed: int) -> torch.Tensor:
        one, heads, capacity, dim = tensor.shape
        grown = tensor.new_empty(one, heads, max(needed, capacity * 3 // 2), dim)
        grown[:, :, : self.length] = tensor[:, :, : self.length]
        return grown


@torch.inference_mode()
@without_autocast()
def forward(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    sizes: torch.Tensor | None = None,
    last: int = 1,
) -> torch.Tensor:
    """Reads new columns after those in the cache, and adds them to it.

    Args:
        model: tree of weights under Hugging Face's names; only its linear layers are called.
        inputs_embeds: `[L, hidden]`, on the device of the weights, L at least 1.
        positions: int64 `[3, L]`, M-RoPE positions (time, height, width), on the CPU.
        cache: of the columns before; L longer afterwards, or unchanged if this raises.
        sizes: float32 `[L]`, the cluster size of each new column; None for 1 each.
        last: how many columns to return, from 1 to L.

    Returns:
        The last columns after the final norm, `[last, hidden]`.

    Raises:
        ValueError: no columns, not one position for each column, or fewer columns than are to be returned.
    """
    columns = len(inputs_embeds)
    if not columns or positions.shape != (3, columns):
        raise ValueError(f"positions {list(positions.shape)} for {columns} columns")
    if not 1 <= last <= columns:
        raise ValueError(f"the last {last} of {columns} columns")
    config, text = model.config.text_config, model.model.language_model
    eps, dim, top = config.rms_norm_eps, config.hidden_size // config.num_attention_heads, len(text.layers) - 1
    x = inputs_embeds
    cos, sin = _rotation(config, positions, x)
    sizes = _sizes(cache, sizes, columns, x.device)
    bias = None if sizes is None else sizes.log().to(x.dtype)
    for i, layer in enumerate(text.layers):
        attention, mlp = layer.self_attn, layer.mlp
        h = _norm(x, layer.input_layernorm.weight, eps)
        keys = _rotate(attention.k_proj(h).view(1, columns, -1, dim), cos, sin).transpose(1, 2)
        values = attention.v_proj(h).view(1, columns, -1, dim).transpose(1, 2)
        keys, values = cache.put(i, keys, values)
        if i == top:  # only the output of these columns is used
            x, h, cos, sin = x[-last:], h[-last:], cos[-last:], sin[-last:]
        queries = _rotate(attention.q_proj(h).view(1, len(h), -1, dim), cos, sin)
        x = linear(attention.o_proj, _attend(queries, keys, values, bias), plus=x)
        h = _norm(x, layer.post_attention_layernorm.weight, eps)
        x = linear(mlp.down_proj, linear(mlp.up_proj, h, times=linear(mlp.gate_proj, h, silu=True)), plus=x)
    hidden = _norm(x, text.norm.weight, eps)
    cache.length += columns
    cache.sizes = sizes
    return hidden


@torch.inference_mode()
@without_autocast()
def logits(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    sizes: torch.Tensor | None = None,
    last: int = 1,
) -> torch.Tensor:
    """As `forward`, but returns the logits of the token after each of the last columns: float32 `[last, vocabulary]`."""
    # The output layer is the largest of all, and only these columns need it.
    return model.lm_head(forward(model, inputs_embeds, positions, cache, sizes, last)).float()


def _sizes(cache: KVCache, sizes: torch.Tensor | None, columns: int, device) -> torch.Tensor | None:
    """Cluster sizes of the columns in the cache and the new ones, float32; None if all are 1."""
    if sizes is None and cache.sizes is None:
        return None
    before = torch.ones(cache.length, dtype=torch.float32, device=device) if cache.sizes is None else cache.sizes
    new = torch.ones(columns, dtype=torch.float32, device=device) if sizes is None else sizes.to(device).float()
    return torch.cat([before, new])


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in float32, rounded before it is scaled, as in Hugging Face. torch would scale before it rounds."""
    return F.rms_norm(x, x.shape[-1:], eps=eps) * weight


@lru_cache
def _frequencies(theta: float, sections: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each pair of features: radians per position, float32 `[head_dim / 2]`, and which of the three positions, int64."""
    dim = 2 * sum(sections)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    return frequencies, torch.tensor(axes, dtype=torch.int64, device="cpu")


def _rotation(config, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[L, 1, head_dim]` in dtype and on the device of `like`; the sines' first half is negated."""
    rope = config.rope_parameters
    frequencies, axis = _frequencies(rope["rope_theta"], tuple(rope["mrope_section"]))
    angles = (positions[axis].T * frequencies).to(like.device)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([-sin, sin], -1).to(like.dtype)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates each feature of `[1, L, heads, head_dim]` with the one half a head away (arXiv 2104.09864)."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Causal attention of the last L columns.

    Args:
        queries: `[1, L, heads, head_dim]`; neighbouring heads share keys and values.
        keys, values: `[1, kv_heads, n, head_dim]`.
        bias: `[n]`, added to the logits of each key: the logarithm of its cluster size makes a key weigh as much as that many
            equal keys (arXiv 2210.09461, section 3). None for no bias.

    Returns:
        `[L, heads * head_dim]`.
    """
    _, columns, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    if columns == 1:
        # Heads that share keys become columns of one head: keys are read once for all of them, two to four times as fast.
        queries, mask = queries.view(1, kv_heads, -1, dim), None if bias is None else bias[None]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).reshape(1, -1)
    # Key/value heads become the batch, so keys are not repeated and the kernel needs no support for groups.
    group = heads // kv_heads
    queries = queries.view(columns, kv_heads, group, dim).permute(1, 2, 0, 3)
    keys, values = (t.transpose(0, 1).expand(-1, group, -1, -1) for t in (keys, values))
    if keys.shape[2] > columns or bias is not None:
        out = _attend_in_strips(queries, keys, values, bias)
    else:
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return out.permute(2, 0, 1, 3).reshape(columns, -1)


def _attend_in_strips(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention with an explicit mask, a strip of queries at a time: a whole mask grows with the square of the prompt.

    Args:
        queries: `[kv_heads, group, L, head_dim]`, of the last L of n columns.
        keys, values: `[kv_heads, group, n, head_dim]`.
        bias: as in `_attend`.

    Returns:
        As `queries`.
    """
    columns, strips = queries.shape[2], []
    before = keys.shape[2] - columns
    for start in range(0, columns, STRIP):
        strip = queries[:, :, start : start + STRIP]
        end = before + start + strip.shape[2]
        mask = torch.ones(strip.shape[2], end, dtype=torch.bool, device=queries.device).tril(end - strip.shape[2])
        if bias is not None:
            mask = bias[:end].expand(len(mask), -1).masked_fill(~mask, -torch.inf)
        strips.append(F.scaled_dot_product_attention(strip, keys[:, :, :end], values[:, :, :end], attn_mask=mask))
    return torch.cat(strips, 2)

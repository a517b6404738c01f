"""The language model's forward pass for CPU training, with many questions per prompt. The logits are the same as in Hugging Face.

A prompt is processed once, and each row of questions attends to the prompt and to itself. This requires far less computation than
one long sequence with questions masked from each other.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experiments.demo.forward import attend, rotate

CHUNK = 256  # number of prompt queries processed at a time, so that most causally masked scores are never computed
BARRED = -1e4


@dataclass(frozen=True)
class Shape:
    """The sizes of a batch (prompts, tokens per prompt, rows per prompt, tokens per row) and the number of attention heads."""

    prompts: int
    length: int
    rows: int
    tokens: int
    heads: int  # number of key-value heads
    groups: int  # number of query heads per key-value head
    dim: int

    @property
    def before(self) -> int:
        """Total number of prompt tokens, which precede the row tokens in a flat list."""
        return self.prompts * self.length

    def of_prompts(self, x: torch.Tensor) -> torch.Tensor:
        """Return the prompts' keys or values from a flat list, as `[prompts, heads, length, dim]`."""
        return x[: self.before].view(self.prompts, self.length, self.heads, self.dim).transpose(1, 2)

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows' keys or values from a flat list, as `[prompts, rows, heads, tokens, dim]`."""
        return x[self.before :].view(self.prompts, self.rows, self.tokens, self.heads, self.dim).transpose(2, 3)


def hidden_of_rows(
    text,
    prefix: torch.Tensor,
    where: torch.Tensor,
    rows: torch.Tensor,
    place: torch.Tensor,
    own: torch.Tensor,
    section: list[int],
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the language model on prompts followed by rows. A row attends to its prompt and to itself, but not to other rows.

    Args:
        text: The language model, `model.model.language_model`.
        prefix: The prompt embeddings, `[B, P, D]`.
        where: The prompts' M-RoPE positions, int64 `[3, P]`.
        rows: The row embeddings, `[B, S, Q, D]`.
        place: The row positions, int64 `[B, S, Q]`, the same on all axes.
        own: The attention mask within a row, bool `[B, S, Q, Q]`.
        section: `mrope_section` from the configuration.
        weight: A number to add to the attention scores of each prompt token as a key, `[B, P]`, or None for zeros.

    Returns:
        The rows' normalized hidden states, `[B, S, Q, D]`, and the prompts' states after half of the layers, `[B, P, D]`.
    """
    att = text.layers[0].self_attn
    groups = att.num_key_value_groups
    dim = att.head_dim
    shape = Shape(*prefix.shape[:2], *rows.shape[1:3], att.k_proj.out_features // dim, groups, dim)
    cos, sin = _angles(text.rotary_emb.inv_freq, shape.prompts, where, place, section)
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else prefix.dtype
    seen = torch.cat([own.new_ones(*own.shape[:3], shape.length), own], -1)
    bias = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, BARRED)[:, :, None].repeat(1, 1, 1, groups, 1)
    if weight is not None:
        bias = bias + F.pad(weight, (0, shape.tokens))[:, None, None, None]
    x = torch.cat([prefix.flatten(0, 1), rows.flatten(0, 2)])
    for number, layer in enumerate(text.layers):
        if number == len(text.layers) // 2:
            middle = x[: shape.before].view(prefix.shape)
        h = layer.input_layernorm(x)
        att = layer.self_attn
        k = rotate(att.k_proj(h).unflatten(-1, (-1, dim)), cos, sin)
        v = att.v_proj(h).unflatten(-1, (-1, dim))
        if layer is text.layers[-1]:  # the prompts' outputs are not needed
            x, h, cos, sin = (t[shape.before :] for t in (x, h, cos, sin))
        q = rotate(att.q_proj(h).unflatten(-1, (-1, dim)), cos, sin)
        read = _of_rows(q[-shape.prompts * shape.rows * shape.tokens :], k, v, bias, shape)
        if layer is not text.layers[-1]:
            read = torch.cat([_of_prompts(q[: shape.before], k, v, shape, weight), read])
        x = x + att.o_proj(read.to(x.dtype))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return text.norm(x).view(rows.shape), middle


def _angles(
    inv_freq: torch.Tensor, prompts: int, where: torch.Tensor, place: torch.Tensor, section: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and sine of the tokens' rotary angles in flat order, both `[tokens, 1, dim]`."""
    freqs = where[..., None] * inv_freq
    freqs = torch.cat([part[i % 3] for i, part in enumerate(freqs.split(section, dim=-1))], dim=-1)
    freqs = torch.cat([freqs.repeat(prompts, 1), (place[..., None] * inv_freq).flatten(0, 2)])
    return tuple(f(freqs).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))


def _of_prompts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, shape: Shape, weight: torch.Tensor | None
) -> torch.Tensor:
    """Return the causal attention output for the prompts' queries `[prompts * length, heads * groups, dim]`, with heads joined."""
    k = shape.of_prompts(k)
    v = shape.of_prompts(v)
    length = shape.length
    q = q.view(shape.prompts, length, shape.heads, shape.groups, shape.dim).permute(0, 2, 3, 1, 4)
    made = []
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        bias = torch.full((end - start, end), BARRED, dtype=q.dtype).triu_(start + 1).repeat(shape.groups, 1)
        if weight is not None:
            bias = bias + weight[:, None, None, :end]
        read = attend(q[:, :, :, start:end].flatten(2, 3), k[:, :, :end], v[:, :, :end], bias)
        made.append(read.unflatten(2, (shape.groups, -1)))
    return torch.cat(made, 3).permute(0, 3, 1, 2, 4).reshape(shape.before, -1)


def _of_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return the attention output for the rows' queries, which attend to their prompt and their row, with heads joined.

    The queries are `[prompts * rows * tokens, heads * groups, dim]`.
    """
    keys, values = (
        torch.cat([shape.of_prompts(t)[:, None].expand(-1, shape.rows, -1, -1, -1), shape.of_rows(t)], 3)
        for t in (k, v)
    )
    q = q.view(shape.prompts, shape.rows, shape.tokens, shape.heads, shape.groups, shape.dim)
    q = q.permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    read = attend(q, keys, values, bias).unflatten(3, (shape.groups, -1))
    return read.permute(0, 1, 4, 2, 3, 5).reshape(shape.prompts * shape.rows * shape.tokens, -1)

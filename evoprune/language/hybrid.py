"""Run language models with mostly linear attention (Qwen3.5), using fewer operations than transformers.

Reading a pruned prompt on a GPU is launch-bound, so this module implements norms, attention, and Gated DeltaNets with fewer kernel
launches. Linear layers and experts are still called as modules, because their weights come in many formats. On a CPU, where
arithmetic dominates the run time, the transformers modules are used instead. They are also used for Gated DeltaNets that read a
single column.

A Gated DeltaNet (arXiv 2412.06464) reads columns in chunks, and processes each chunk in closed form (arXiv 2406.06484, section 3).
If `S` is the state before a chunk, the state after the chunk is `A S + B`. `A` and `B` are computed for all chunks at once, so this
product is the only operation that has to wait for the previous chunk, compared with nine operations in transformers.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from evoprune.backend import kernels_for
from evoprune.model import rotate

CHUNK = 64  # columns per chunk, same as in transformers
STRIP = 32 * CHUNK  # number of columns that a DeltaNet reads at a time, using 0.5 GiB in Qwen3.5-4B
TINY = 1e-6  # epsilon added to the squared length of queries and keys in normalization


def run(text, x: torch.Tensor, places: torch.Tensor, states, mask: torch.Tensor | None) -> torch.Tensor:
    """Run the language model on new columns and return their hidden states after the final norm, `[L, hidden]`.

    Args:
        text: The language model's transformers module.
        x: `[L, hidden]`, the embeddings of the new columns.
        places: int64 `[4, 1, L]`, the index and the three M-RoPE positions of each column.
        states: The transformers cache of the preceding columns, updated in place by each layer.
        mask: The attention mask, `[1, 1, L, n]`, where n is the total number of columns, including new columns. None means plain
            causal attention, which is allowed only if `states` is empty or L is 1.
    """
    layers = text.layers
    eps = text.config.rms_norm_eps
    # Convert the vectors of all layers together, which takes no more operations than converting a single layer's vectors.
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [text.norm]
    gains = iter(_stacked(norm.weight for norm in norms) + 1)
    head_gains = iter(
        _stacked(norm.weight for at in _parts(layers, "self_attn") for norm in (at.q_norm, at.k_norm)) + 1
    )
    deltas = _parts(layers, "linear_attn")
    rates = iter(-_stacked(delta.A_log for delta in deltas).exp())  # negated decay rates of the heads
    offsets = iter(_stacked(delta.dt_bias for delta in deltas))
    scales = iter(_stacked(delta.norm.weight for delta in deltas))
    dim = deltas[0].head_k_dim
    unit = x.new_full((dim,), dim**-0.5, dtype=torch.float32)
    cos, sin = (turn[0, :, None] for turn in text.rotary_emb(x[None], places[1:]))
    first, second = sin.chunk(2, -1)
    cos_sin = cos, torch.cat([-first, second], -1)
    x, normed = add_norm(x, None, next(gains), eps)
    for layer in layers:
        if hasattr(layer, "self_attn"):
            new = attention(layer.self_attn, normed, cos_sin, states, mask, (next(head_gains), next(head_gains)), eps)
        elif len(x) == 1:
            new = layer.linear_attn(normed[None], states)[0]
        else:
            new = delta_net(layer.linear_attn, normed, states, next(rates), next(offsets), next(scales), unit)
        x, normed = add_norm(x, new, next(gains), eps)
        x, normed = add_norm(x, layer.mlp(normed[None])[0], next(gains), eps)
    return normed


def _parts(layers, name: str) -> list:
    return [getattr(layer, name) for layer in layers if hasattr(layer, name)]


def _stacked(vectors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*vectors]).float()


def add_norm(
    x: torch.Tensor, plus: torch.Tensor | None, gain: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `plus` to `x`, unless it is None, and return both the sum and its RMS norm.

    The norm is multiplied by `gain` (float32) before being rounded.
    """
    if fast := kernels_for(x.device):
        try:
            # Quantized layers may return non-contiguous tensors.
            if plus is not None:
                plus = plus.contiguous()
            return fast.add_norm(x.contiguous(), plus, gain, eps, rounds=False)
        except Exception as problem:
            fast.give_up(problem)
    total = x
    if plus is not None:
        total = x + plus
    return total, F.rms_norm(total.float(), gain.shape, gain, eps).to(total.dtype)


def attention(
    module,
    x: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    states,
    mask: torch.Tensor | None,
    gains: tuple[torch.Tensor, torch.Tensor],
    eps: float,
) -> torch.Tensor:
    """Run a gated attention layer. Return its output, `[L, hidden]`, and add the new keys and values to `states`.

    Args:
        module: The layer's transformers module.
        x: `[L, hidden]`, the normalized layer input.
        cos_sin: The cosines and sines from `decoder.rotation`, which rotate only the leading features of each head.
        states, mask: See `run`.
        gains: The weights of the query norm and the key norm.
    """
    length = len(x)
    dim = module.head_dim
    queries, gate = module.q_proj(x).view(length, -1, 2 * dim).chunk(2, -1)
    keys, values = (project(x).view(length, -1, dim) for project in (module.k_proj, module.v_proj))
    heads = keys.shape[1]
    wide = cos_sin[0].shape[-1]
    normed = [
        add_norm(part.reshape(-1, dim), None, gain, eps)[1].view(part.shape)
        for part, gain in zip((queries, keys), gains, strict=True)
    ]
    both = torch.cat(normed, 1)
    both = torch.cat([rotate(both[..., :wide], *cos_sin), both[..., wide:]], -1)
    queries, keys = both.tensor_split([-heads], 1)
    known = states.update(keys.transpose(0, 1)[None], values.transpose(0, 1)[None], module.layer_idx)
    # Use a separate dimension for query heads with shared keys, so that the keys aren't repeated in memory.
    queries = queries.view(length, heads, -1, dim).permute(1, 2, 0, 3)
    keys, values = (each.transpose(0, 1).expand(-1, queries.shape[1], -1, -1) for each in known)
    causal = mask is None and length > 1
    seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
    return module.o_proj((seen.permute(2, 0, 1, 3).reshape(gate.shape) * gate.sigmoid()).flatten(1))


def delta_net(
    delta,
    x: torch.Tensor,
    states,
    rate: torch.Tensor,
    offset: torch.Tensor,
    scale: torch.Tensor,
    unit: torch.Tensor,
) -> torch.Tensor:
    """Run a Gated DeltaNet. Return its output, `[L, hidden]`, and update its states in `states`.

    As in transformers, everything between the weight products is computed in float32. Tensors have the shape [key heads, group,
    chunks, columns, features], where a group consists of value heads with shared queries and keys. Queries and keys are broadcast
    over the group dimension. The last chunk is padded with columns that have a `beta` of 0 and no decay, so the padding has no
    effect.

    Args:
        delta: The layer's transformers module.
        x: `[L, hidden]`, the normalized layer input.
        states: See `run`.
        rate: float32, the negated exponential of the layer's `A_log`.
        offset: float32, the layer's `dt_bias`.
        scale: float32, the weight of the layer's norm.
        unit: float32, the RMS norm gain that scales each head's features to a length of 1.
    """
    if len(x) > STRIP:
        return torch.cat([delta_net(delta, part, states, rate, offset, scale, unit) for part in x.split(STRIP)])
    length = len(x)
    dim = delta.head_k_dim
    value_dim = delta.head_v_dim
    heads = delta.num_k_heads
    group = delta.num_v_heads // delta.num_k_heads
    padding = -length % CHUNK
    chunks = (length + padding) // CHUNK
    by_head = (heads, group, chunks, CHUNK, 1)
    by_chunk = (heads * group, chunks)

    layer_state = states.layers[delta.layer_idx]
    kernel = delta.conv_kernel_size
    state = layer_state.recurrent_states[0]
    projected = delta.in_proj_qkv(x).T[None]
    # The convolution also needs the last few columns from earlier passes
    seen = layer_state.update_conv_state(projected, conv_kernel_size=kernel)
    seen = F.pad(seen, (kernel - 1 - (seen.shape[-1] - length), padding))
    mixed = F.silu(F.conv1d(seen, delta.conv1d.weight, delta.conv1d.bias, groups=seen.shape[1]))[0]
    qk, v = mixed.split([2 * delta.key_dim, delta.value_dim])
    v = v.view(heads, group, value_dim, chunks, CHUNK).permute(0, 1, 3, 4, 2)
    qk = qk.view(2, heads, dim, chunks, CHUNK).permute(1, 3, 0, 4, 2)
    qk = qk.to(torch.float32, memory_format=torch.contiguous_format)
    # The queries should also be divided by the square root of `dim`, but the final norm cancels this factor, apart from its
    # epsilon.
    qk = F.rms_norm(qk, (dim,), unit, TINY / dim)
    q, k = (part[:, None] for part in qk.unbind(2))

    beta = F.pad(delta.in_proj_b(x).sigmoid().T, (0, padding)).view(by_head)
    log_decay = rate * F.softplus(delta.in_proj_a(x) + offset)
    # Logarithm of the cumulative decay since the start of the chunk
    log_decay_in_chunk = F.pad(log_decay.T, (0, padding)).view(by_head).cumsum(3)
    # Decay from when column j writes to when column i reads, [..., i, j]
    decay = (log_decay_in_chunk - log_decay_in_chunk.mT).exp().tril()
    decay_in_chunk = log_decay_in_chunk.exp()

    rows = qk.flatten(2, 3).flatten(0, 1)
    scores = torch.bmm(rows, rows[:, CHUNK:].mT).view(heads, 1, chunks, 2, CHUNK, CHUNK) * decay[:, :, :, None]
    own = scores[:, :, :, 0].flatten(0, 2)  # products of queries and keys within each chunk
    # The values that each column writes to the state, [..., values], and the earlier state's directions that it overwrites,
    # [..., keys].
    solved = torch.linalg.solve_triangular(
        scores[:, :, :, 1] * beta, torch.cat([v, k * decay_in_chunk], -1) * beta, upper=False, unitriangular=True
    ).flatten(0, 2)
    kept = (k * decay[:, :, :, -1, :, None]).view(-1, CHUNK, dim).mT
    written, overwritten = torch.bmm(kept, solved).view(*by_chunk, dim, -1).split([value_dim, dim], -1)
    overwritten.diagonal(0, -2, -1).sub_(decay_in_chunk[:, :, :, -1].reshape(*by_chunk, 1))

    first = qk.new_zeros(heads * group, dim, value_dim) if state is None else state[0]
    before = torch.cat([first[:, None], written], 1)  # the state before each chunk, and the state after the last chunk
    for i in range(chunks):
        before[:, i + 1].baddbmm_(overwritten[:, i], before[:, i], alpha=-1)
    layer_state.update_recurrent_state(before[None, :, -1])
    del kept, written, overwritten  # frees a third of the memory

    before = before[:, :-1].reshape(-1, dim, value_dim)
    values, backward = solved.split([value_dim, dim], -1)
    values = torch.baddbmm(values, backward, before, alpha=-1)
    out = torch.bmm((q * decay_in_chunk).view(-1, CHUNK, dim), before).baddbmm_(own, values)
    out = F.rms_norm(out, (value_dim,), scale, delta.norm.variance_epsilon * dim)
    out = out.view(heads * group, -1, value_dim)[:, :length].transpose(0, 1)
    gate = F.silu(delta.in_proj_z(x).view(out.shape))
    return delta.out_proj(gate.mul_(out).flatten(1))

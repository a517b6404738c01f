"""Language models with mostly linear attention (Qwen3.5): their Gated DeltaNets, and all layers in as few operations as possible.

Reading a pruned prompt on a GPU is launch-bound, so `run` implements norms, attention, and Gated DeltaNets with few kernel
launches. It runs both evoprune's own module tree and transformers modules, whose linear layers and experts may have many formats.
On a CPU, where arithmetic dominates the run time, language/decoder.py runs the layers, and uses the Gated DeltaNets of this module.

A Gated DeltaNet (arXiv 2412.06464) reads columns in chunks, and processes each chunk in closed form (arXiv 2406.06484, section 3).
If `S` is the state before a chunk, the state after the chunk is `A S + B`. `A` and `B` are computed for all chunks at once, so this
product is the only operation that has to wait for the previous chunk, compared with nine operations in transformers. On a CPU, the
compiled library reads the columns one by one instead, which takes fewer operations on numbers.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, Self

import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend import Quantization, kernels_for, linear
from evoprune.model import head_size, rotate

CHUNK = 64  # columns per chunk, same as in transformers
STRIP = 32 * CHUNK  # number of columns that a DeltaNet reads at a time, using 0.5 GiB in Qwen3.5-4B
TINY = 1e-6  # epsilon added to the squared length of queries and keys in normalization


class Memory(Protocol):
    """The state of a Gated DeltaNet, which a pass over new columns replaces."""

    # float32 `[value_heads, key_dim, value_dim]`; transformers has None instead of zeros before the first column
    recurrent: torch.Tensor | None

    def extend(self, inputs: torch.Tensor, kernel: int) -> torch.Tensor:
        """Append new inputs of the convolution, `[L, channels]`.

        Args:
            kernel: The kernel size of the convolution.

        Returns:
            The inputs of the last columns and the new ones, `[channels, n]`, where n is at most L + kernel - 1.
        """

    def put(self, recurrent: torch.Tensor) -> None:
        """Replace the recurrent state."""


class DeltaState(NamedTuple):
    """The state of a Gated DeltaNet after some columns. Its tensors are never changed in place, so they can be shared."""

    inputs: torch.Tensor  # `[kernel - 1, channels]`, the last inputs of the convolution
    recurrent: torch.Tensor  # float32 `[value_heads, key_dim, value_dim]`

    @classmethod
    def initial(cls, config, like: torch.Tensor) -> Self:
        """Return the state before the first column.

        Args:
            config: The language model config.
            like: A tensor with the dtype and device of the hidden states.
        """
        net = sizes_of(config)
        shape = net.linear_num_value_heads, net.linear_key_head_dim, net.linear_value_head_dim
        inputs = like.new_zeros(net.linear_conv_kernel_dim - 1, net.channels)
        return cls(inputs, like.new_zeros(shape, dtype=torch.float32))


def states_of(inputs: torch.Tensor, recurrent: Sequence[torch.Tensor]) -> list[DeltaState]:
    """Return the state after each column of a pass.

    Args:
        inputs: `[kernel - 1 + L, channels]`, the inputs of the convolution, starting with those before the pass.
        recurrent: The recurrent state after each column.
    """
    kept = len(inputs) - len(recurrent)
    return [DeltaState(inputs[i : i + kept], each) for i, each in enumerate(recurrent, 1)]


class Pass:
    """A pass over new columns that starts from a `DeltaState`. Implements `Memory`."""

    def __init__(self, before: DeltaState):
        self._last, self.recurrent = before
        self.inputs = self._last  # as in `states_of`, but only of the latest call of `extend`

    def extend(self, inputs: torch.Tensor, kernel: int) -> torch.Tensor:
        self.inputs = torch.cat([self._last.to(inputs.dtype), inputs])
        self._last = self.inputs[len(inputs) :].clone()  # a view would keep all inputs in memory
        return self.inputs.T

    def put(self, recurrent: torch.Tensor) -> None:
        self.recurrent = recurrent.clone()

    @property
    def after(self) -> DeltaState:
        """The state after all columns."""
        return DeltaState(self._last, self.recurrent)


class States(Protocol):
    """The states of all layers, which `run` updates."""

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the keys and values of new columns to an attention layer, and return all of them. See `KVCache.put`."""

    def memory(self, layer: int) -> Memory:
        """Return the state of a Gated DeltaNet."""

    def read_one(self, delta: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Run a transformers module of a Gated DeltaNet on a single column, `[1, hidden]`."""


class Vectors(NamedTuple):
    """Vectors of a Gated DeltaNet, in float32."""

    rate: torch.Tensor  # the negated decay rates of the heads, computed from `A_log`
    offset: torch.Tensor  # `dt_bias`
    scale: torch.Tensor  # the weight of the norm
    unit: torch.Tensor  # the RMS norm gain that scales each head's features to a length of 1


def run(
    text,
    config,
    x: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    states: States,
    mask: torch.Tensor | None,
    pause: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Run the language model on new columns and return their hidden states after the final norm, `[L, hidden]`.

    Args:
        text: The language model's module, from either evoprune or transformers.
        config: The language model config.
        x: `[L, hidden]`, the embeddings of the new columns.
        cos_sin: The cosines and sines from `decoder.rotation`.
        states: The states of the preceding columns, updated by each layer.
        mask: The attention mask, `[1, 1, L, n]`, where n is the total number of columns, including new columns. None means plain
            causal attention, which is allowed only if `states` is empty or L is 1.
        pause: Called before each layer. It may wait or raise an exception.
    """
    layers = text.layers
    eps = config.rms_norm_eps
    # Convert the vectors of all layers together, which takes no more operations than converting a single layer's vectors.
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)] + [text.norm]
    gains = iter(_stacked(norm.weight for norm in norms) + 1)
    head_gains = iter(
        _stacked(norm.weight for at in _parts(layers, "self_attn") for norm in (at.q_norm, at.k_norm)) + 1
    )
    vectors = iter(vectors_of(_parts(layers, "linear_attn"), config))
    x, normed = add_norm(x, None, next(gains), eps)
    for number, layer in enumerate(layers):
        pause()
        if hasattr(layer, "self_attn"):
            both = next(head_gains), next(head_gains)
            new = attention(layer.self_attn, number, config, normed, cos_sin, states, mask, both)
        else:
            new = _read(layer.linear_attn, number, config, normed, states, next(vectors))
        x, normed = add_norm(x, new, next(gains), eps)
        x, normed = add_norm(x, _mlp(layer.mlp, normed), next(gains), eps)
    return normed


def vectors_of(deltas: Sequence[nn.Module], config) -> list[Vectors]:
    """Return the vectors of Gated DeltaNets. Those of several layers take no more operations than those of a single layer."""
    if not deltas:
        return []
    dim = sizes_of(config).linear_key_head_dim
    rates = -_stacked(delta.A_log for delta in deltas).exp()
    offsets = _stacked(delta.dt_bias for delta in deltas)
    scales = _stacked(delta.norm.weight for delta in deltas)
    unit = rates.new_full((dim,), dim**-0.5)
    return [Vectors(*each, unit) for each in zip(rates, offsets, scales, strict=True)]


def sizes_of(config):
    """Return the object with the sizes of a model's Gated DeltaNets: its `DeltaNet` config, or the transformers config itself."""
    return getattr(config, "delta_net", config)


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


def _mlp(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if _has_forward(mlp):
        return mlp(x[None])[0]
    return linear(mlp.down_proj, linear(mlp.up_proj, x, times=linear(mlp.gate_proj, x, silu=True)))


def _read(delta: nn.Module, number: int, config, x: torch.Tensor, states: States, vectors: Vectors) -> torch.Tensor:
    if len(x) > 1:
        return delta_net(delta, config, x, states.memory(number), vectors)
    if _has_forward(delta):
        return states.read_one(delta, x)
    return read_one_by_one(delta, config, x, states.memory(number), vectors)[0]


def _has_forward(module: nn.Module) -> bool:
    """Return True for a transformers module. The modules of evoprune's own tree only have weights."""
    return type(module).forward is not nn.Module.forward


def attention(
    module,
    number: int,
    config,
    x: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    states: States,
    mask: torch.Tensor | None,
    gains: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Run a gated attention layer. Return its output, `[L, hidden]`, and add the new keys and values to `states`.

    Args:
        module: The layer's module.
        number: The layer index.
        config, states, mask: See `run`.
        x: `[L, hidden]`, the normalized layer input.
        cos_sin: The cosines and sines from `decoder.rotation`, which rotate only the leading features of each head.
        gains: The weights of the query norm and the key norm.
    """
    length = len(x)
    dim = head_size(config)
    queries, gate = module.q_proj(x).view(length, -1, 2 * dim).chunk(2, -1)
    keys, values = (project(x).view(length, -1, dim) for project in (module.k_proj, module.v_proj))
    heads = keys.shape[1]
    normed = [
        add_norm(part.reshape(-1, dim), None, gain, config.rms_norm_eps)[1].view(part.shape)
        for part, gain in zip((queries, keys), gains, strict=True)
    ]
    queries, keys = rotate(torch.cat(normed, 1), *cos_sin).tensor_split([-heads], 1)
    known = states.put(number, keys.transpose(0, 1)[None], values.transpose(0, 1)[None])
    # Use a separate dimension for query heads with shared keys, so that the keys aren't repeated in memory.
    queries = queries.view(length, heads, -1, dim).permute(1, 2, 0, 3)
    keys, values = (each.transpose(0, 1).expand(-1, queries.shape[1], -1, -1) for each in known)
    causal = mask is None and length > 1
    seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=causal)
    return module.o_proj((seen.permute(2, 0, 1, 3).reshape(gate.shape) * gate.sigmoid()).flatten(1))


def delta_net(delta: nn.Module, config, x: torch.Tensor, memory: Memory, vectors: Vectors) -> torch.Tensor:
    """Run a Gated DeltaNet. Return its output, `[L, hidden]`, and update its state.

    As in transformers, everything between the weight products is computed in float32. Tensors have the shape [key heads, group,
    chunks, columns, features], where a group consists of value heads with shared queries and keys. Queries and keys are broadcast
    over the group dimension. The last chunk is padded with columns that have a `beta` of 0 and no decay, so the padding has no
    effect.

    Args:
        delta: The layer's module, from either evoprune or transformers.
        config: The language model config.
        x: `[L, hidden]`, the normalized layer input.
        memory: The layer's state.
        vectors: The layer's vectors.
    """
    if len(x) > STRIP:
        return torch.cat([delta_net(delta, config, part, memory, vectors) for part in x.split(STRIP)])
    net = sizes_of(config)
    length = len(x)
    dim = net.linear_key_head_dim
    value_dim = net.linear_value_head_dim
    heads = net.linear_num_key_heads
    group = net.linear_num_value_heads // heads
    padding = -length % CHUNK
    chunks = (length + padding) // CHUNK
    by_head = (heads, group, chunks, CHUNK, 1)
    by_chunk = (heads * group, chunks)

    kernel = net.linear_conv_kernel_dim
    seen = memory.extend(
        delta.in_proj_qkv(x), kernel
    )  # the convolution also needs the last few columns from earlier passes
    before = kernel - 1 - (seen.shape[1] - length)
    if before or padding:
        seen = F.pad(seen, (before, padding))
    mixed = _convolved(delta, seen)
    log_decay = vectors.rate * F.softplus(delta.in_proj_a(x) + vectors.offset)
    beta = delta.in_proj_b(x).sigmoid()
    if read := _in_order(net, mixed[:, :length], log_decay, beta, memory.recurrent, vectors):
        out, recurrent = read
        memory.put(recurrent)
        return _gated(delta, config, x, out, vectors)

    qk, v = mixed.split([2 * heads * dim, heads * group * value_dim])
    v = v.view(heads, group, value_dim, chunks, CHUNK).permute(0, 1, 3, 4, 2)
    qk = qk.view(2, heads, dim, chunks, CHUNK).permute(1, 3, 0, 4, 2)
    qk = qk.to(torch.float32, memory_format=torch.contiguous_format)
    # The queries should also be divided by the square root of `dim`, but the final norm cancels this factor, apart from its
    # epsilon.
    qk = F.rms_norm(qk, (dim,), vectors.unit, TINY / dim)
    q, k = (part[:, None] for part in qk.unbind(2))

    beta = F.pad(beta.T, (0, padding)).view(by_head)
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

    first = qk.new_zeros(heads * group, dim, value_dim) if memory.recurrent is None else memory.recurrent
    before = torch.cat([first[:, None], written], 1)  # the state before each chunk, and the state after the last chunk
    for i in range(chunks):
        before[:, i + 1].baddbmm_(overwritten[:, i], before[:, i], alpha=-1)
    memory.put(before[:, -1])
    del kept, written, overwritten  # frees a third of the memory

    before = before[:, :-1].reshape(-1, dim, value_dim)
    values, backward = solved.split([value_dim, dim], -1)
    values = torch.baddbmm(values, backward, before, alpha=-1)
    out = torch.bmm((q * decay_in_chunk).view(-1, CHUNK, dim), before).baddbmm_(own, values)
    return _gated(delta, config, x, out.view(heads * group, -1, value_dim)[:, :length].transpose(0, 1), vectors)


def read_one_by_one(
    delta: nn.Module, config, x: torch.Tensor, memory: Memory, vectors: Vectors
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a Gated DeltaNet on a few columns, whose results don't depend on one another. See `delta_net` for the arguments.

    Returns:
        The output, `[L, hidden]`, and the recurrent state after each column.
    """
    net = sizes_of(config)
    dim = net.linear_key_head_dim
    heads = net.linear_num_key_heads
    count = net.linear_num_value_heads
    kernel = net.linear_conv_kernel_dim
    seen = memory.extend(delta.in_proj_qkv(x), kernel)
    state = memory.recurrent
    out, states = [], []
    for i, row in enumerate(x.split(1)):
        mixed = _convolved(delta, seen[:, i : i + kernel])
        log_decay = vectors.rate * F.softplus(delta.in_proj_a(row) + vectors.offset)
        beta = delta.in_proj_b(row).sigmoid()
        if not (read := _in_order(net, mixed, log_decay, beta, state, vectors)):
            qk, v = mixed.split([2 * heads * dim, count * net.linear_value_head_dim])
            # As in `delta_net`, the queries are not divided by the square root of `dim`.
            qk = F.rms_norm(qk.view(2, heads, 1, dim).float(), (dim,), vectors.unit, TINY / dim)
            q, k = qk.expand(-1, -1, count // heads, -1).reshape(2, count, dim, 1).unbind(0)
            new = state * log_decay.exp().view(count, 1, 1)
            error = v.view(count, 1, -1) - torch.bmm(k.mT, new)
            new = torch.baddbmm(new, k, error * beta.view(count, 1, 1))
            read = torch.bmm(q.mT, new).transpose(0, 1), new
        part, state = read
        out.append(part)
        states.append(state)
    memory.put(state)
    return _gated(delta, config, x, torch.cat(out), vectors), states


def _in_order(
    net, mixed: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, state: torch.Tensor | None, vectors: Vectors
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Read columns one by one with the compiled library, if possible. See `delta_rule` in backend/cpu/deltas.py for the results.

    Args:
        net: The sizes (see `sizes_of`).
        mixed: The result of `_convolved`, `[channels, L]`.
        log_decay, beta: `[L, value_heads]`, the logarithm of the decay, and the share of each column to write.
        state: The state before the columns.
        vectors: The layer's vectors.
    """
    rule = Quantization.delta_rule(mixed.device, net.linear_value_head_dim)
    if rule is None or state is None:
        return None
    dim = net.linear_key_head_dim
    qk, v = mixed.T.tensor_split([2 * net.linear_num_key_heads * dim], 1)
    length = len(v)
    qk = qk.reshape(length, 2, -1, dim).transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    qk = F.rms_norm(qk, (dim,), vectors.unit, TINY / dim)
    return rule(qk, v.reshape(length, -1, net.linear_value_head_dim), log_decay.exp(), beta, state)


def _convolved(delta: nn.Module, seen: torch.Tensor) -> torch.Tensor:
    """Apply the convolution to its inputs, `[channels, kernel - 1 + L]`. Returns the queries, keys, and values, `[channels, L]`."""
    return F.silu(F.conv1d(seen[None], delta.conv1d.weight, delta.conv1d.bias, groups=len(seen)))[0]


def _gated(delta: nn.Module, config, x: torch.Tensor, out: torch.Tensor, vectors: Vectors) -> torch.Tensor:
    """Return the output of a Gated DeltaNet, `[L, hidden]`.

    Args:
        out: float32 `[L, value_heads, value_dim]`, what the heads read from the state, using queries that are not divided by the
            square root of the key dimension.
    """
    net = sizes_of(config)
    eps = config.rms_norm_eps * net.linear_key_head_dim
    out = F.rms_norm(out, out.shape[-1:], vectors.scale, eps)
    gate = linear(delta.in_proj_z, x, silu=True).view(out.shape)
    return delta.out_proj(gate.mul_(out).flatten(1))

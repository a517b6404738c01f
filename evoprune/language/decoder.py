"""The forward pass of the language model (Qwen2, Qwen2.5 and Qwen3) over new columns of a prompt, or over one generated token.

It computes on a tree of weights under Hugging Face's names: a `model.weights.QwenVL`, or a model of transformers. A *column*
is one token of the prompt or answer. Queries and keys are rotated by three positions at once (M-RoPE, arXiv 2409.12191, section
2.1); groups of heads share keys and values (arXiv 2305.13245). Results are rounded where Hugging Face rounds them, and torch's
autocast changes nothing here.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.backend import causal_attention, layers, linear, room_for_bias, to_device, without_cudnn
from evoprune.methods import Dropping, LayerState, arange_on
from evoprune.model import head_size, heads_of, norm, rotate, without_autocast

STRIP = 1024  # query columns that share one mask


@lru_cache
def _frequencies(theta: float, sections: tuple[int, ...], interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each pair of features: radians per position, float32 `[head_dim / 2]`, and which of the three positions, int64."""
    dim = 2 * sum(sections)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    if interleaved:  # height and width take every third pair as long as they have any, and time has all others
        axes = [0] * len(axes)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return frequencies, torch.tensor(axes, dtype=torch.int64, device="cpu")


def rotation(config, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines `[L, 1, head_dim]` in dtype and on the device of `like`; the sines' first half is negated."""
    frequencies, axis = frequencies_of(config)
    return turns_by(to_device(positions[axis].T * frequencies, like.device), like.dtype)


def turns_by(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rotation`, of angles, float32 `[L, head_dim / 2]`."""
    cos = angles[:, None].cos()
    sin = angles[:, None].sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def frequencies_of(config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `_frequencies` of a language model, on the CPU. `config`: its own."""
    rope = config.rope_parameters
    return _frequencies(rope["rope_theta"], tuple(rope["mrope_section"]), bool(rope.get("mrope_interleaved")))


def rows_at(x: torch.Tensor | None, rows: torch.Tensor | slice | None) -> torch.Tensor | None:
    """Return some rows of `x`; all where `rows` is None."""
    return x if x is None or rows is None else x[rows]


def put_rows(x: torch.Tensor, rows: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Return `x` with new values in some rows, or in all."""
    return new if rows is None else x.index_copy(0, rows, new)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    sees: torch.Tensor | None = None,
    wide: torch.Tensor | None = None,
    dim: int | None = None,
) -> torch.Tensor:
    """Return causal attention of the last L columns, or of other columns: `[L, heads * head_dim]`.

    Args:
        queries: `[1, L, heads, head_dim]`; neighbouring heads share `keys` and `values`, `[1, kv_heads, n, head_dim]`. Queries,
            and for one column also keys and values, may have the features of a bias behind those of a head
            (`backend.attention.bias_features`).
        bias: `[n]`, added to the logits of each key: the logarithm of its cluster size makes a key weigh as much as that many
            equal keys (arXiv 2210.09461, section 3).
        sees: int64 `[L]`, ascending, how many keys each query sees, n the last; None for the last L columns.
        wide: `[2, kv_heads, n, head_dim + e]`, room for keys and values (`room_for_bias`), where a kernel takes no mask.
        dim: head_dim, where the queries may have further features.
    """
    _, columns, heads, given = queries.shape
    kv_heads, n, whole = keys.shape[1:]
    dim = dim or given
    if columns == 1:
        # Heads that share keys become columns of one head: keys are read once for all of them, two to four times as fast.
        queries = queries.view(1, kv_heads, -1, given)
        if whole > given:
            queries = F.pad(queries, (0, whole - given), value=1.0)
        if whole > dim:
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5)
            return seen[..., :dim].reshape(1, -1)
        if bias is not None:
            bias = bias[None]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias).reshape(1, -1)
    # Key/value heads become the batch, so keys are not repeated and the kernel needs no support for groups.
    group = heads // kv_heads
    queries = queries.view(columns, kv_heads, group, given).permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1)
    values = values.transpose(0, 1)
    if sees is None and (bias is None or wide is not None):
        asks = queries
        shared = (keys, values)
        scale = None
        if bias is not None:
            for room, tensor in zip(wide[..., :dim], shared, strict=True):
                room.copy_(tensor[:, 0])
            if wide.shape[3] > given:
                asks = F.pad(queries, (0, wide.shape[3] - given), value=1.0)
            shared = wide[:, :, None]
            scale = dim**-0.5
        out = causal_attention(asks, *(t.expand(-1, group, -1, -1) for t in shared), scale=scale)
        if out is not None:
            return out[..., :dim].permute(2, 0, 1, 3).reshape(columns, -1)
    queries = queries[..., :dim]
    keys, values = (t.expand(-1, group, -1, -1) for t in (keys, values))
    strips = []  # of queries, each with a mask: that of all would grow with the square of the prompt
    for start in range(0, columns, STRIP):
        strip = queries[:, :, start : start + STRIP]
        rows = strip.shape[2]
        if sees is None:
            end = n - columns + start + rows
            mask = torch.ones(rows, end, dtype=torch.bool, device=queries.device).tril(end - rows)
        else:
            end = n
            if start + rows < columns:
                end = int(sees[start + rows - 1])
            mask = arange_on(end, queries.device) < sees[start : start + rows, None]
        if bias is not None:
            mask = bias[:end].expand(len(mask), -1).masked_fill(~mask, -torch.inf)
        strips.append(F.scaled_dot_product_attention(strip, keys[:, :, :end], values[:, :, :end], attn_mask=mask))
    return torch.cat(strips, 2).permute(2, 0, 1, 3).reshape(columns, -1)


def columns_of(wide: torch.Tensor | None, columns: torch.Tensor | slice | None) -> torch.Tensor | None:
    """Return some columns of such a room; all where `columns` is None."""
    return wide if wide is None or columns is None else wide[:, :, columns]


def attend_blind(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    wide: torch.Tensor | None,
    others: torch.Tensor,
    end: int,
) -> torch.Tensor:
    """As `attend`, but columns from `end` on attend to `others` (int64) only. The cache holds nothing but these columns."""
    before = max(0, queries.shape[1] - (keys.shape[2] - end))  # there may be queries of the last columns only
    extra = {"wide": columns_of(wide, others)}
    sighted = attend(queries[:, before:], keys[:, :, others], values[:, :, others], rows_at(bias, others), **extra)
    if not before:
        return sighted
    extra = {"wide": columns_of(wide, slice(end))}
    first = attend(queries[:, :before], keys[:, :, :end], values[:, :, :end], rows_at(bias, slice(end)), **extra)
    return torch.cat([first, sighted])


def all_sizes(sizes: torch.Tensor | None, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return the cluster sizes of columns, float32 `[columns]` on the device of `like`: 1 each where `sizes` is None."""
    if sizes is None:
        return like.new_ones(columns, dtype=torch.float32)
    return sizes.to(like.device).float()


class KVCache:
    """Keys and values of every layer for the columns read so far. A layer lacks the columns that left before it.

    `capacity`: columns to allocate, at least 1, in each layer or in all. A layer's cache grows by half when it is full.
    """

    column = None  # where its `room` begins, on the device; None for its first column

    def __init__(self, model, capacity: int | Sequence[int]):
        config = model.config.text_config
        weight = model.model.language_model.norm.weight
        depth = config.num_hidden_layers
        capacities = [capacity] * depth if isinstance(capacity, int) else capacity
        shapes = [(1, config.num_key_value_heads, columns, head_size(config)) for columns in capacities]
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]
        self._uneven_until = 0  # columns up to the last one that has left a layer: among them, layers do not end alike
        # Columns that were read. A forward pass raises it at its end, so a pass that fails leaves the cache as it was.
        self.length = 0
        self.lengths = [0] * depth  # columns that are valid in each layer
        # Of each layer float32 `[lengths[i]]`, the weight of each column: attention treats it as that many columns; None for 1
        # each. Layers with the same columns share a tensor.
        self.sizes: list[torch.Tensor | None] = [None] * depth

    @property
    def capacity(self) -> int:
        """Columns that are allocated in every layer."""
        return min(keys.shape[2] for keys, _ in self._layers)

    def crop(self, length: int) -> None:
        """Drops all but the first `length` columns.

        Raises ValueError: the cache holds fewer, or some columns left only some layers and `length` is less than where that was.
        """
        if not (0 <= length <= self.length and (length >= self._uneven_until or not length)):
            raise ValueError(f"the cache holds {self.length} columns, not {length}")
        lengths = [max(0, end - (self.length - length)) for end in self.lengths]
        cropped = {id(sizes): sizes[:end] for sizes, end in zip(self.sizes, lengths, strict=True) if sizes is not None}
        sizes = [cropped.get(id(sizes)) for sizes in self.sizes]
        whole = self._uneven_until if length else 0
        # In one statement: after a signal between two (Ctrl-C), some of these would be old and some new.
        self.length, self.lengths, self.sizes, self._uneven_until = length, lengths, sizes, whole

    def keep(self, columns: torch.Tensor) -> None:
        """Drops all columns but some, int64 `[n]` on the CPU, ascending, which move up to the front; their positions stay.

        Raises ValueError: some columns left only some layers.
        """
        if self._uneven_until:
            raise ValueError("columns that left only some layers cannot be counted alike in all")
        columns = to_device(columns, self._layers[0][0].device)
        count = len(columns)
        sized = {id(sizes): sizes[columns] for sizes in self.sizes if sizes is not None}
        for stored in self._layers:
            for tensor in stored:
                tensor[:, :, :count] = tensor[:, :, columns]
        self.sizes = [sized.get(id(sizes)) for sizes in self.sizes]
        self.length, self.lengths = count, [count] * len(self.lengths)

    def move(self, config, columns: slice, by: torch.Tensor) -> None:
        """Moves some columns by so many positions, int64 `[3, 1]`: their keys are rotated further, values have no position."""
        like = self._layers[0][0].new_empty(0).float()
        cos, sin = rotation(config, by, like)  # the same for all of them
        first, end, _ = columns.indices(self.length)
        for keys, _ in self._layers:
            for start in range(first, end, STRIP):  # a copy of all would be the most that a stream takes at once
                strip = keys[0, :, start : min(end, start + STRIP)]
                strip.copy_(rotate(strip.transpose(0, 1).float(), cos, sin).transpose(0, 1))

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a layer's new columns, `[1, kv_heads, L, head_dim]`, after the valid ones. They become valid with `add`.

        Returns all keys and values of the layer `[1, kv_heads, lengths[layer] + L, head_dim]`, views.
        """
        *room, known_keys, known_values = self.room(layer, keys.shape[2])
        for target, new in zip(room, (keys, values), strict=True):
            target[:] = new[0]
        return known_keys, known_values

    def room(self, layer: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return where a layer's new keys and values go, `[kv_heads, columns, head_dim]`; and all of them, as of `put`."""
        before = self.lengths[layer]
        stored = self._layers[layer]
        end = before + columns
        if end > (full := stored[0].shape[2]):
            # Layer by layer, so that only one layer is in memory twice.
            more = (0, 0, 0, max(end, full * 3 // 2) - before)
            stored = self._layers[layer] = tuple(F.pad(tensor[:, :, :before], more) for tensor in stored)
        known = tuple(tensor[:, :, :end] for tensor in stored)
        return *(tensor[0, :, before:] for tensor in known), *known

    def add(self, read: int, columns: Sequence[int], sizes: Sequence[torch.Tensor | None]) -> None:
        """Makes what was put valid: `read` columns, of which each layer has `columns`, with the `sizes` of all its columns."""
        length = self.length + read
        lengths = [before + more for before, more in zip(self.lengths, columns, strict=True)]
        sizes = list(sizes)
        whole = length if len(set(columns)) > 1 else self._uneven_until
        self.length, self.lengths, self.sizes, self._uneven_until = (
            length,
            lengths,
            sizes,
            whole,
        )  # in one statement, as above

    def sizes_with(self, sizes: torch.Tensor | None, columns: int) -> list[torch.Tensor | None]:
        """Return for each layer the sizes of its columns and of new ones, whose `sizes` (None: 1 each) are the same in all."""
        if sizes is None and self.sizes[0] is None:
            return [None] * len(self.sizes)
        like = self._layers[0][0]
        joined = {}
        new = all_sizes(sizes, columns, like)
        for before, length in zip(self.sizes, self.lengths, strict=True):
            if (id(before), length) not in joined:
                joined[id(before), length] = torch.cat([all_sizes(before, length, like), new])
        return [joined[id(before), length] for before, length in zip(self.sizes, self.lengths, strict=True)]


@torch.inference_mode()
@without_autocast()
@without_cudnn()
def forward(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    sizes: torch.Tensor | None = None,
    last: int = 1,
    dropping: Dropping | None = None,
    deepstack: torch.Tensor | None = None,
    pause: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Return the last columns after the final norm, `[last, hidden]`, of new columns that are read after those in the cache.

    Args:
        model: tree of weights under Hugging Face's names; only its linear layers are called.
        inputs_embeds: `[L, hidden]`, the new columns, on the device of the weights, L at least 1.
        positions: int64 `[3, L]`, M-RoPE positions (time, height, width), on the CPU.
        cache: of the columns before; L longer afterwards, or unchanged if this raises.
        sizes: float32 `[L]`, the cluster size of each new column; None for 1 each.
        last: how many columns to return, from 1 to L.
        dropping: which visual tokens leave, in a cache that is empty.
        deepstack: `[n, L, hidden]`, what is added to the columns after each of the first n layers.
        pause: called before every layer; it may wait, or raise.

    Raises ValueError: no columns, not one position for each, fewer than are to be returned, or `dropping` after others.
    """
    columns = len(inputs_embeds)
    if not columns or positions.shape != (3, columns):
        raise ValueError(f"positions {list(positions.shape)} for {columns} columns")
    if not 1 <= last <= columns:
        raise ValueError(f"the last {last} of {columns} columns")
    if dropping and cache.length:
        raise ValueError(f"visual tokens leave a prompt, and {cache.length} columns come before it")
    config = model.config.text_config
    text = model.model.language_model
    x = inputs_embeds
    places = rotation(config, positions, inputs_embeds)
    entered = []
    if deepstack is None:
        deepstack = x.new_empty(0, *x.shape)
    blind = None
    rows = []
    every = cache.sizes_with(sizes, columns)
    for i, layer in enumerate(text.layers):
        pause()
        if not i or every[i] is not every[i - 1]:
            bias, wide = _bias(every[i], x, config)
        if dropping:
            blind, rows = dropping.before(i, len(x))
        count = len(x)
        if rows:
            count = len(rows[0])
        entered.append(count)
        entering = x
        x, *heads = run_layer(layer, x, places, cache, i, config, bias, last, blind, rows, wide)
        if len(deepstack):
            # the top layer returns the last columns alone
            x = x + deepstack[0, -len(x) :]
            deepstack = deepstack[1:]
        if dropping:
            x, deepstack, stay = dropping.after(LayerState(i + 1, entering, x, places, bias, *heads), deepstack)
            if stay is not None:
                places = places[0][stay], places[1][stay]
                every[i + 1 :] = [rows_at(every[i], stay)] * (len(every) - i - 1)
        if rows:
            every[i] = rows_at(every[i], rows[0])
    hidden = norm(x, text.norm.weight, config.rms_norm_eps)
    cache.add(columns, entered, every)
    return hidden


@torch.inference_mode()
@without_autocast()
def logits(model, *args, **kwargs) -> torch.Tensor:
    """As `forward`, but returns the logits of the token after each of the last columns: float32 `[last, vocabulary]`."""
    # The output layer is the largest of all, and only these columns need it.
    return model.lm_head(forward(model, *args, **kwargs)).float()


def _bias(sizes: torch.Tensor | None, like: torch.Tensor, config) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the bias of columns, and room beside its features for attention that takes no mask, as of `attend`."""
    if sizes is None:
        return None, None
    bias = sizes.log()
    return bias.to(like.dtype), room_for_bias(bias, like, config.num_key_value_heads, head_size(config))


def run_layer(
    layer,
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    cache,
    number: int,
    config,
    bias: torch.Tensor | None = None,
    last: int = 1,
    blind: tuple[torch.Tensor, int] | None = None,
    rows: Sequence[torch.Tensor] = (),
    wide: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the output for columns `x` (`[L, hidden]`; of the top layer, for the `last` ones), their queries, all keys and values.

    `cache`: a `KVCache`, or a `StaticCache` for a column alone. `bias`, `wide`: of `attend`.
    `blind`, `rows`: of `Dropping.before`. Columns without queries or MLP keep their state.
    """
    attention = layer.self_attn
    mlp = layer.mlp
    eps = config.rms_norm_eps
    whole = blind is None and not rows and (len(x) <= last or number < config.num_hidden_layers - 1)
    if whole and (fused := _fused(layer, x, places, cache, number, config, bias, wide)):
        return fused
    kv_rows, q_rows, mlp_rows = rows or (None,) * 3
    cos, sin = places
    h = norm(x, layer.input_layernorm.weight, eps)
    keys, values = (heads_of(attention, name, rows_at(h, kv_rows), config) for name in "kv")
    keys = rotate(keys, rows_at(cos, kv_rows), rows_at(sin, kv_rows))
    keys, values = cache.put(number, *(tensor[None].transpose(1, 2) for tensor in (keys, values)))
    if number == config.num_hidden_layers - 1:  # only the output of these columns is used
        x = x[-last:]
        h = h[-last:]
        cos = cos[-last:]
        sin = sin[-last:]
        q_rows = mlp_rows = None
    queries = heads_of(attention, "q", rows_at(h, q_rows), config)
    queries = rotate(queries, rows_at(cos, q_rows), rows_at(sin, q_rows))[None]
    given = queries, keys, values, rows_at(bias, kv_rows)
    if blind is not None:
        seen = attend_blind(*given, wide, *blind)
    elif q_rows is not None:
        seen = attend(*given, torch.searchsorted(kv_rows, q_rows, right=True))
    elif rows:  # the last columns, of the top layer
        seen = attend(*given)
    else:
        seen = attend(*given, wide=wide)
    x = put_rows(x, q_rows, linear(attention.o_proj, seen, plus=rows_at(x, q_rows)))
    old = rows_at(x, mlp_rows)
    h = norm(old, layer.post_attention_layernorm.weight, eps)
    new = linear(mlp.down_proj, linear(mlp.up_proj, h, times=linear(mlp.gate_proj, h, silu=True)), plus=old)
    return put_rows(x, mlp_rows, new), queries, keys, values


def _fused(
    layer,
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    cache,
    number: int,
    config,
    bias: torch.Tensor | None,
    wide: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """As `run_layer` of all columns, by fused kernels on joined weights; None where there are none."""
    attention = layer.self_attn
    mlp = layer.mlp
    eps = config.rms_norm_eps
    heads = config.num_attention_heads
    fast = layers.kernels_for(x.device)
    into = layers.joined(attention)
    gates = layers.joined(mlp)
    if None in (fast, into, gates):
        return None
    try:
        _, h = fast.add_norm(x.contiguous(), None, layer.input_layernorm.weight, eps)
        norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
        *room, keys, values = cache.room(number, len(x))
        dim = head_size(config)
        projected = F.linear(h, *into)
        more = keys.shape[3] - dim
        if wide is not None:
            more = wide.shape[3] - dim
        queries = fast.rotate_put(projected, places, norms, eps, heads, *room, cache.column, more)
        seen = attend(queries, keys, values, bias, wide=wide, dim=dim)
        x, h = fast.add_norm(x.contiguous(), attention.o_proj(seen), layer.post_attention_layernorm.weight, eps)
        return x + mlp.down_proj(fast.silu_times(F.linear(h, gates[0]))), queries[..., :dim], keys, values
    except Exception as problem:
        layers.give_up(problem)
        return None

"""Run the language model (Qwen2, Qwen2.5, or Qwen3) on prompt tokens or a generated token.

This works with any module tree that uses Hugging Face weight names, including `model.weights.QwenVL` and transformers models. Each
prompt or answer token is called a *column*. Queries and keys are rotated by three positions at once (M-RoPE, arXiv 2409.12191,
section 2.1), and groups of query heads share keys and values (arXiv 2305.13245). Results are rounded at the same points as in
transformers. Torch autocast has no effect in this module.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from evoprune.backend import (
    Attention,
    Device,
    Quantization,
    joined,
    kernels_for,
    linear,
    to_device,
    without_cudnn,
)
from evoprune.methods import Dropping, LayerState, arange_on
from evoprune.model import head_size, heads_of, norm, rotate, without_autocast

STRIP = 1024  # number of query columns that share an attention mask


@lru_cache
def _frequencies(theta: float, sections: tuple[int, ...], interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary frequency of each feature pair, and the position axis (time, height, or width) that rotates it.

    Returns:
        The frequencies in radians per position, float32 `[head_dim / 2]`, and the axes (0 for time, 1 for height, and 2 for width),
        int64 `[head_dim / 2]`.
    """
    dim = 2 * sum(sections)
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
    axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
    # If interleaved, height and width are each assigned every third pair until their sections are full, and time is assigned the
    # remaining pairs.
    if interleaved:
        axes = [0] * len(axes)
        for axis in (1, 2):
            axes[axis : 3 * sections[axis] : 3] = [axis] * len(axes[axis : 3 * sections[axis] : 3])
    return frequencies, torch.tensor(axes, dtype=torch.int64, device="cpu")


def rotation(config, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines for rotating queries and keys at the given M-RoPE positions.

    Args:
        config: The language model config.
        positions: The M-RoPE positions, int64 `[3, L]` on the CPU.
        like: A tensor with the desired dtype and device.

    Returns:
        The cosines and the sines, `[L, 1, head_dim]` each. The first half of the sines is negated.
    """
    frequencies, axis = frequencies_of(config)
    return cos_sin_of(to_device(positions[axis].T * frequencies, like.device), like.dtype)


def cos_sin_of(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and sines of `angles`, float32 `[L, head_dim / 2]`, in the same layout as `rotation`."""
    cos = angles[:, None].cos()
    sin = angles[:, None].sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def frequencies_of(config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotary frequencies and axes (see `_frequencies`) for a language model config, on the CPU."""
    rope = config.rope_parameters
    return _frequencies(rope["rope_theta"], tuple(rope["mrope_section"]), bool(rope.get("mrope_interleaved")))


def rows_at(x: torch.Tensor | None, rows: torch.Tensor | slice | None) -> torch.Tensor | None:
    """Select rows of a tensor. If `x` or `rows` is None, return `x` unchanged."""
    return x if x is None or rows is None else x[rows]


def put_rows(x: torch.Tensor, rows: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Return a copy of `x` with some rows replaced by `new`. If `rows` is None, all rows are replaced."""
    return new if rows is None else x.index_copy(0, rows, new)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    visible_keys: torch.Tensor | None = None,
    wide: torch.Tensor | None = None,
    dim: int | None = None,
) -> torch.Tensor:
    """Compute causal attention from L query columns to n keys and return the output, `[L, heads * head_dim]`.

    Args:
        queries: `[1, L, heads, head_dim]`, optionally with bias features appended to each head (`Attention.bias_features`).
        keys, values: `[1, kv_heads, n, head_dim]`. Consecutive query heads share a key head and a value head. If L is 1, bias
            features may be appended to each head.
        bias: `[n]`, the bias to add to each key's attention scores. With a bias of log(cluster size), a key has the same effect as
            that many identical keys (arXiv 2210.09461, section 3).
        visible_keys: int64 `[L]`, the number of keys that each query can attend to, in ascending order. The last number must be n.
            None means that the queries correspond to the last L columns.
        wide: A buffer from `Attention.room_for_bias`, `[2, kv_heads, n, head_dim + e]`, for keys and values with bias features. It
            is used by kernels that don't support masks.
        dim: The head size without bias features. Required if the queries have bias features.
    """
    _, columns, heads, given = queries.shape
    kv_heads, n, whole = keys.shape[1:]
    dim = dim or given
    few = 1 < columns <= Quantization.few_rows and Device(queries.device).reads_drafts
    if few and visible_keys is None and given == whole == dim:
        # One by one, so that a column's result doesn't depend on the others
        ends = range(n - columns + 1, n + 1)
        single = zip(queries.split(1, 1), ends, strict=True)
        seen = [attend(each, keys[:, :, :end], values[:, :, :end], rows_at(bias, slice(end))) for each, end in single]
        return torch.cat(seen)
    if columns == 1:
        # Treat query heads with shared keys as columns of a single head, so the keys are read only once. This is two to four times
        # as fast.
        queries = queries.view(1, kv_heads, -1, given)
        if whole > given:
            queries = F.pad(queries, (0, whole - given), value=1.0)
        if whole > dim:
            seen = F.scaled_dot_product_attention(queries, keys, values, scale=dim**-0.5)
            return seen[..., :dim].reshape(1, -1)
        if bias is not None:
            bias = bias[None]
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias).reshape(1, -1)
    # Use the key/value heads as the batch dimension, so that keys aren't repeated and the kernel doesn't have to support grouped
    # heads.
    group = heads // kv_heads
    queries = queries.view(columns, kv_heads, group, given).permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1)
    values = values.transpose(0, 1)
    if visible_keys is None and (bias is None or wide is not None):
        padded_queries = queries
        shared = (keys, values)
        scale = None
        if bias is not None:
            for room, tensor in zip(wide[..., :dim], shared, strict=True):
                room.copy_(tensor[:, 0])
            if wide.shape[3] > given:
                padded_queries = F.pad(queries, (0, wide.shape[3] - given), value=1.0)
            shared = wide[:, :, None]
            scale = dim**-0.5
        out = Attention.of(padded_queries).causal(
            padded_queries, *(t.expand(-1, group, -1, -1) for t in shared), scale=scale
        )
        if out is not None:
            return out[..., :dim].permute(2, 0, 1, 3).reshape(columns, -1)
    queries = queries[..., :dim]
    keys, values = (t.expand(-1, group, -1, -1) for t in (keys, values))
    strips = []  # one mask per query strip, because a single mask would grow quadratically with the prompt length
    for start in range(0, columns, STRIP):
        strip = queries[:, :, start : start + STRIP]
        rows = strip.shape[2]
        if visible_keys is None:
            end = n - columns + start + rows
            mask = torch.ones(rows, end, dtype=torch.bool, device=queries.device).tril(end - rows)
        else:
            end = n
            if start + rows < columns:
                end = int(visible_keys[start + rows - 1])
            mask = arange_on(end, queries.device) < visible_keys[start : start + rows, None]
        if bias is not None:
            mask = bias[:end].expand(len(mask), -1).masked_fill(~mask, -torch.inf)
        strips.append(F.scaled_dot_product_attention(strip, keys[:, :, :end], values[:, :, :end], attn_mask=mask))
    return torch.cat(strips, 2).permute(2, 0, 1, 3).reshape(columns, -1)


def columns_of(wide: torch.Tensor | None, columns: torch.Tensor | slice | None) -> torch.Tensor | None:
    """Select columns of a buffer from `Attention.room_for_bias`. If `columns` is None, return all columns."""
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
    """Compute attention like `attend`, except that columns starting at `end` attend only to the columns in `others` (int64).

    `keys` must include all prompt columns. If there are fewer queries than keys, the queries correspond to the last columns.
    """
    before = max(0, queries.shape[1] - (keys.shape[2] - end))  # number of queries before `end`
    extra = {"wide": columns_of(wide, others)}
    sighted = attend(queries[:, before:], keys[:, :, others], values[:, :, others], rows_at(bias, others), **extra)
    if not before:
        return sighted
    extra = {"wide": columns_of(wide, slice(end))}
    first = attend(queries[:, :before], keys[:, :, :end], values[:, :, :end], rows_at(bias, slice(end)), **extra)
    return torch.cat([first, sighted])


def all_sizes(sizes: torch.Tensor | None, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return cluster sizes as float32 `[columns]` on the same device as `like`. If `sizes` is None, all sizes are 1."""
    if sizes is None:
        return like.new_ones(columns, dtype=torch.float32)
    return sizes.to(like.device).float()


class ColumnIds:
    """The token IDs of the columns in a KV cache, as far as they are known. Base class of KV caches."""

    UNKNOWN = -1  # the token ID of a column that was read without a token ID

    def __init__(self):
        self.length = 0  # number of columns read so far
        self._ids: list[int] = []  # only the first `length` entries are valid

    def ids_from(self, column: int) -> list[int]:
        """Return the token IDs of the columns starting at index `column`, or `UNKNOWN` for columns read without token IDs."""
        return self._ids[column : self.length]

    def _record(self, before: int, columns: int, ids: torch.Tensor | None) -> None:
        """Write the token IDs of new columns after the first `before` columns. They become valid when `length` increases."""
        self._ids[before:] = [self.UNKNOWN] * columns if ids is None else ids.tolist()


class KVCache(ColumnIds):
    """KV cache containing the keys and values of all columns read so far, except for columns dropped by a layer.

    Args:
        model: The model to cache keys and values for.
        capacity: Number of columns to allocate (at least 1), either a single number for all layers or one number per layer. When a
            layer is full, it grows by half.
    """

    column = None  # write index for the tensors from `room`, as a device tensor; None means 0

    def __init__(self, model, capacity: int | Sequence[int]):
        super().__init__()  # `length` is updated only at the end of a forward pass, so a failed pass leaves the cache unchanged
        config = model.config.text_config
        weight = model.model.language_model.norm.weight
        depth = config.num_hidden_layers
        capacities = [capacity] * depth if isinstance(capacity, int) else capacity
        shapes = [(1, config.num_key_value_heads, columns, head_size(config)) for columns in capacities]
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]
        # Number of leading columns that differ between layers because some layers have dropped columns. The cache cannot be cropped
        # within this range.
        self._uneven_until = 0
        self.lengths = [0] * depth  # number of valid columns in each layer
        # Cluster sizes in each layer, float32 `[lengths[i]]`, or None if all sizes are 1. In attention, a column of size n is
        # equivalent to n columns. Layers with the same columns share a tensor.
        self.sizes: list[torch.Tensor | None] = [None] * depth

    @property
    def capacity(self) -> int:
        """Number of columns allocated in each layer."""
        return min(keys.shape[2] for keys, _ in self._layers)

    def crop(self, length: int) -> None:
        """Drop all columns after the first `length` columns.

        Raises:
            ValueError: If the cache has fewer columns, or cropping to `length` would split the range of columns that differ between
                layers. Cropping to 0 is always possible.
        """
        if not (0 <= length <= self.length and (length >= self._uneven_until or not length)):
            raise ValueError(f"a cache of {self.length} columns cannot be cropped to {length}")
        lengths = [max(0, end - (self.length - length)) for end in self.lengths]
        cropped = {id(sizes): sizes[:end] for sizes, end in zip(self.sizes, lengths, strict=True) if sizes is not None}
        sizes = [cropped.get(id(sizes)) for sizes in self.sizes]
        whole = self._uneven_until if length else 0
        # Assign all attributes in a single statement, so that a signal (Ctrl-C) cannot leave them partially updated.
        self.length, self.lengths, self.sizes, self._uneven_until = length, lengths, sizes, whole

    def keep(self, columns: torch.Tensor) -> None:
        """Drop all columns except `columns`, which move to the front of the cache but keep their M-RoPE positions.

        Args:
            columns: Indices of the columns to keep, int64 `[n]` on the CPU, in ascending order.

        Raises:
            ValueError: If the layers have dropped different columns.
        """
        if self._uneven_until:
            raise ValueError("the layers have dropped different columns, so none can be selected in all of them")
        ids = [self._ids[column] for column in columns.tolist()]
        columns = to_device(columns, self._layers[0][0].device)
        count = len(columns)
        sized = {id(sizes): sizes[columns] for sizes in self.sizes if sizes is not None}
        for stored in self._layers:
            for tensor in stored:
                tensor[:, :, :count] = tensor[:, :, columns]
        self.sizes = [sized.get(id(sizes)) for sizes in self.sizes]
        self._ids, self.length, self.lengths = ids, count, [count] * len(self.lengths)

    def move(self, config, columns: slice, by: torch.Tensor) -> None:
        """Shift the M-RoPE positions of some columns by rotating their keys.

        Args:
            config: The language model config.
            columns: The columns to shift.
            by: int64 `[3, 1]`, the time, height, and width offsets.
        """
        like = self._layers[0][0].new_empty(0).float()
        cos, sin = rotation(config, by, like)
        first, end, _ = columns.indices(self.length)
        for keys, _ in self._layers:
            for start in range(first, end, STRIP):  # copying all keys at once would increase peak memory
                strip = keys[0, :, start : min(end, start + STRIP)]
                strip.copy_(rotate(strip.transpose(0, 1).float(), cos, sin).transpose(0, 1))

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of new columns to a layer. They become valid when `add` is called.

        Args:
            layer: The layer index.
            keys, values: `[1, kv_heads, L, head_dim]`.

        Returns:
            Views of the layer's keys and values, including the new columns, `[1, kv_heads, lengths[layer] + L, head_dim]` each.
        """
        *room, known_keys, known_values = self.room(layer, keys.shape[2])
        for target, new in zip(room, (keys, values), strict=True):
            target[:] = new[0]
        return known_keys, known_values

    def room(self, layer: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reserve new columns in a layer.

        Returns:
            Two views for writing the new keys and values, `[kv_heads, columns, head_dim]` each, followed by views of all keys and
            values, as returned by `put`.
        """
        before = self.lengths[layer]
        stored = self._layers[layer]
        end = before + columns
        if end > (full := stored[0].shape[2]):
            # Grow one layer at a time, so that there are never two copies of more than one layer in memory.
            more = (0, 0, 0, max(end, full * 3 // 2) - before)
            stored = self._layers[layer] = tuple(F.pad(tensor[:, :, :before], more) for tensor in stored)
        known = tuple(tensor[:, :, :end] for tensor in stored)
        return *(tensor[0, :, before:] for tensor in known), *known

    def add(
        self, read: int, columns: Sequence[int], sizes: Sequence[torch.Tensor | None], ids: torch.Tensor | None
    ) -> None:
        """Make new columns valid after all layers have written their keys and values.

        Args:
            read: Number of columns read.
            columns: Number of these columns stored in each layer.
            sizes: The cluster sizes of the old and new columns in each layer.
            ids: The token IDs of the columns that were read, int64 `[read]`, or None if they are unknown.
        """
        self._record(self.length, read, ids)
        length = self.length + read
        lengths = [before + more for before, more in zip(self.lengths, columns, strict=True)]
        sizes = list(sizes)
        whole = length if len(set(columns)) > 1 else self._uneven_until
        # As in `crop`, a signal must not leave the attributes partially updated.
        self.length, self.lengths, self.sizes, self._uneven_until = length, lengths, sizes, whole

    def sizes_with(self, sizes: torch.Tensor | None, columns: int) -> list[torch.Tensor | None]:
        """Return the cluster sizes of the cached columns followed by the new columns, for each layer.

        Args:
            sizes: float32 `[columns]`, the cluster sizes of the new columns in all layers. None means that all sizes are 1.
            columns: Number of new columns.
        """
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
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the model on new columns and return the final hidden states of the last `last` columns, `[last, hidden]`.

    Args:
        model: A module tree that uses Hugging Face weight names. Only its linear layers are called as modules.
        inputs_embeds: `[L, hidden]`, the embeddings of the new columns, on the same device as the weights. L must be at least 1.
        positions: int64 `[3, L]` on the CPU, the M-RoPE positions (time, height, width).
        cache: The KV cache of the preceding columns. The L new columns are added in place, unless an exception is raised.
        sizes: float32 `[L]`, the cluster sizes of the new columns. None means that all sizes are 1.
        last: Number of columns to return, from 1 to L.
        dropping: Decides which visual tokens to drop inside the language model. Requires an empty cache.
        deepstack: `[n, L, hidden]`, the features to add to the columns after each of the first n layers.
        pause: Called before each layer. It may wait or raise an exception.
        ids: int64 `[L]`, the token IDs of the new columns, which the cache records. None means that they are unknown.

    Raises:
        ValueError: If there are no columns, `positions` doesn't match the columns, `last` is out of range, or `dropping` is used
            with a non-empty cache.
    """
    columns = len(inputs_embeds)
    if not columns or positions.shape != (3, columns):
        raise ValueError(f"positions have shape {list(positions.shape)} for {columns} columns")
    if not 1 <= last <= columns:
        raise ValueError(f"last is {last} for {columns} columns")
    if dropping and cache.length:
        raise ValueError(f"dropping visual tokens needs an empty cache, not one with {cache.length} columns")
    config = model.config.text_config
    text = model.model.language_model
    x = inputs_embeds
    compiled = None if dropping else Quantization.compiled_layers(text.layers, x, config)
    if compiled:
        x = x.float()
    places = rotation(config, positions, x)
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
        if compiled:
            *_, keys, values = cache.room(i, len(x))
            x = compiled[i](x, *places, keys, values, bias)
        else:
            x, *heads = run_layer(layer, x, places, cache, i, config, bias, last, blind, rows, wide)
        if len(deepstack):
            # the last layer may return only the last `last` columns
            x = x + deepstack[0, -len(x) :]
            deepstack = deepstack[1:]
        if dropping:
            x, deepstack, stay = dropping.after(LayerState(i + 1, entering, x, places, bias, *heads), deepstack)
            if stay is not None:
                places = places[0][stay], places[1][stay]
                every[i + 1 :] = [rows_at(every[i], stay)] * (len(every) - i - 1)
        if rows:
            every[i] = rows_at(every[i], rows[0])
    hidden = norm(x[-last:].to(inputs_embeds.dtype), text.norm.weight, config.rms_norm_eps)
    cache.add(columns, entered, every, ids)
    return hidden


@torch.inference_mode()
@without_autocast()
def logits(model, *args, **kwargs) -> torch.Tensor:
    """Return the next-token logits after each of the last columns, float32 `[last, vocabulary]`. See `forward` for arguments."""
    # The output layer is the largest layer, so run it only on the last columns.
    return model.lm_head(forward(model, *args, **kwargs)).float()


def _bias(sizes: torch.Tensor | None, like: torch.Tensor, config) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the `bias` and `wide` arguments for applying cluster sizes in `attend`, or None for both if `sizes` is None."""
    if sizes is None:
        return None, None
    bias = sizes.log()
    wide = Attention.of(like).room_for_bias(bias, len(like), config.num_key_value_heads, head_size(config))
    return bias.to(like.dtype), wide


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
    """Run a single language model layer on new columns.

    Args:
        layer: The layer module.
        x: `[L, hidden]`, the hidden states of the new columns.
        places: The cosines and sines from `rotation`.
        cache: A `KVCache`, or a `NativeStaticCache` if there is only one column.
        number: The layer index.
        config: The language model config.
        bias, wide: See `attend`.
        last: Number of columns to compute the output for if this is the last layer.
        blind, rows: The results of `Dropping.before`. If a column skips attention or the MLP, its hidden state doesn't change in
            that step.

    Returns:
        A tuple of the columns' output, their queries, all keys, and all values. In the last layer, the output includes only the
        last columns.
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
    if number == config.num_hidden_layers - 1:  # only the output of the last columns is used
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
    elif rows:  # in the last layer, the queries correspond to the last columns
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
    """Run a single layer on all columns using fused kernels and joined weights, or return None if this is not possible.

    See `run_layer` for the arguments and results.
    """
    attention = layer.self_attn
    mlp = layer.mlp
    eps = config.rms_norm_eps
    heads = config.num_attention_heads
    fast = kernels_for(x.device)
    into = joined(attention)
    gates = joined(mlp)
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
        fast.give_up(problem)
        return None

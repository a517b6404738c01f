"""Run the language model (Qwen2, Qwen2.5, Qwen3, or Qwen3.5) on prompt tokens or a generated token.

This works with any module tree that uses Hugging Face weight names, including `model.weights.QwenVL` and transformers models. Each
prompt or answer token is called a *column*. Queries and keys are rotated by three positions at once (M-RoPE, arXiv 2409.12191,
section 2.1), and groups of query heads share keys and values (arXiv 2305.13245). Results are rounded at the same points as in
transformers. Torch autocast has no effect in this module.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F

from evoprune.backend import (
    Attention,
    Quantization,
    joined,
    kernels_for,
    linear,
    to_device,
    without_cudnn,
)
from evoprune.language.attention import STRIP, Attend, Blind, Restricted, additive_mask, attention_for
from evoprune.model import head_size, heads_of, norm, rotate, without_autocast

if TYPE_CHECKING:
    from evoprune.language.hybrid import DeltaState, Pass, Vectors
    from evoprune.methods import Dropping

MASK_STRIP = 2048  # columns per additive mask; a multiple of 64, the chunk size of Gated DeltaNets


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


def all_sizes(sizes: torch.Tensor | None, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return cluster sizes as float32 `[columns]` on the same device as `like`. If `sizes` is None, all sizes are 1."""
    if sizes is None:
        return like.new_ones(columns, dtype=torch.float32)
    return sizes.to(like.device).float()


def has_deltas(model) -> bool:
    """Return True if any layer of a model is a Gated DeltaNet."""
    return any(hasattr(layer, "linear_attn") for layer in model.model.language_model.layers)


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

    Gated DeltaNets have no keys and values. Instead, the cache contains their states after all columns, and after each of the last
    few columns if these were read in a single pass. Only these columns can be cropped, all columns at once, and the columns after
    the latest call of `hold`.

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
        linear = [getattr(config, "delta_net", None) is not None and config.is_linear(layer) for layer in range(depth)]
        capacities = [0 if skips else columns for columns, skips in zip(capacities, linear, strict=True)]
        shapes = [(1, config.num_key_value_heads, columns, head_size(config)) for columns in capacities]
        self._layers = [(weight.new_empty(shape), weight.new_empty(shape)) for shape in shapes]
        # States of all layers, or None for attention layers, from before the last few columns to after all columns. The first list
        # is also that of the empty cache.
        self._empty = [None] * depth
        if any(linear):
            from evoprune.language.hybrid import DeltaState

            self._empty = [DeltaState.initial(config, weight) if skips else None for skips in linear]
        self._states = [self._empty]
        self._held = (
            0,
            self._empty,
        )  # the length at the latest call of `hold` that is still valid, and the states at this length
        self._recurrent = any(linear)
        # Number of leading columns that differ between layers because some layers have dropped columns. The cache cannot be cropped
        # within this range.
        self._uneven_until = 0
        self.lengths = [0] * depth  # number of valid columns in each layer
        # Cluster sizes in each layer, float32 `[lengths[i]]`, or None if all sizes are 1. In attention, a column of size n is
        # equivalent to n columns. Layers with the same columns share a tensor.
        self.sizes: list[torch.Tensor | None] = [None] * depth

    @property
    def capacity(self) -> int:
        """Number of columns allocated in each attention layer."""
        return min(keys.shape[2] for (keys, _), state in zip(self._layers, self._empty, strict=True) if state is None)

    @property
    def states(self) -> "Sequence[DeltaState | None]":
        """The state of each Gated DeltaNet after all columns, or None for attention layers."""
        return self._states[-1]

    @property
    def least(self) -> int:
        """The smallest length from which on the cache can be cropped to any length. It can also be cropped to 0."""
        if self._recurrent:
            return max(self._uneven_until, self.length + 1 - len(self._states))
        return self._uneven_until

    def hold(self) -> None:
        """Make it possible to crop the cache to its current length later, until it is cropped further or `keep` is called."""
        self._held = self.length, self.states

    def crop(self, length: int) -> None:
        """Drop all columns after the first `length` columns.

        Raises:
            ValueError: If the cache has fewer columns; or cropping to `length` would split the range of columns that differ between
                layers, or require a state that is no longer known. Cropping to 0 is always possible.
        """
        held, held_states = self._held
        if not (0 <= length <= self.length and (length >= self.least or length in (0, held))):
            raise ValueError(f"a cache of {self.length} columns cannot be cropped to {length}")
        lengths = [max(0, end - (self.length - length)) for end in self.lengths]
        cropped = {id(sizes): sizes[:end] for sizes, end in zip(self.sizes, lengths, strict=True) if sizes is not None}
        sizes = [cropped.get(id(sizes)) for sizes in self.sizes]
        whole = self._uneven_until if length else 0
        states = [self._empty]
        if length and self._recurrent:
            known = length >= self.least
            states = self._states[: len(self._states) - (self.length - length)] if known else [held_states]
        kept = self._held if held <= length else (0, self._empty)
        # Assign all attributes in a single statement, so that a signal (Ctrl-C) cannot leave them partially updated.
        self.length, self.lengths, self.sizes, self._uneven_until, self._states, self._held = (
            *(length, lengths, sizes, whole, states),
            kept,
        )

    def copy(self) -> Self:
        """Return a copy, which can be extended without changing the original."""
        made = copy(self)
        made._layers = [(keys.clone(), values.clone()) for keys, values in self._layers]
        made._ids, made.lengths, made.sizes = [*self._ids], [*self.lengths], [*self.sizes]
        return made

    def keep(self, columns: torch.Tensor) -> None:
        """Drop all columns except `columns`, which move to the front of the cache but keep their M-RoPE positions.

        The states of Gated DeltaNets still include the dropped columns.

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
        for stored, state in zip(self._layers, self.states, strict=True):
            for tensor in stored if state is None else ():
                tensor[:, :, :count] = tensor[:, :, columns]
        self._states, self._held = self._states[-1:], (0, self._empty)
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
        for (keys, _), state in zip(self._layers, self.states, strict=True):
            for start in (
                range(first, end, STRIP) if state is None else ()
            ):  # copying all keys at once would increase peak memory
                strip = keys[0, :, start : min(end, start + STRIP)]
                strip.copy_(rotate(strip.transpose(0, 1).float(), cos, sin).transpose(0, 1))

    def put(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, after: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of new columns to a layer. They become valid when `add` is called.

        Args:
            layer: The layer index.
            keys, values: `[1, kv_heads, L, head_dim]`.
            after: Number of columns that were written before but are not valid yet.

        Returns:
            Views of the layer's keys and values, including the new columns, `[1, kv_heads, lengths[layer] + after + L, head_dim]`
            each.
        """
        *room, known_keys, known_values = self.room(layer, after + keys.shape[2])
        for target, new in zip(room, (keys, values), strict=True):
            target[:, after:] = new[0]
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
            more = (0, 0, 0, max(end, full * 3 // 2) - full)
            stored = self._layers[layer] = tuple(F.pad(tensor, more) for tensor in stored)
        known = tuple(tensor[:, :, :end] for tensor in stored)
        return *(tensor[0, :, before:] for tensor in known), *known

    def add(
        self,
        read: int,
        columns: Sequence[int],
        sizes: Sequence[torch.Tensor | None],
        ids: torch.Tensor | None,
        states: "Sequence[Sequence[DeltaState | None]]" = (),
    ) -> None:
        """Make new columns valid after all layers have written their keys and values.

        Args:
            read: Number of columns read.
            columns: Number of these columns stored in each layer.
            sizes: The cluster sizes of the old and new columns in each layer.
            ids: The token IDs of the columns that were read, int64 `[read]`, or None if they are unknown.
            states: The states of all layers after each column that was read, or only after the last one. May be empty if there are
                no Gated DeltaNets.
        """
        self._record(self.length, read, ids)
        length = self.length + read
        lengths = [before + more for before, more in zip(self.lengths, columns, strict=True)]
        sizes = list(sizes)
        whole = length if len(set(columns)) > 1 else self._uneven_until
        if states:
            states = [*(self._states[-1:] if len(states) == read else []), *states]
        else:
            states = self._states
        # As in `crop`, a signal must not leave the attributes partially updated.
        self.length, self.lengths, self.sizes, self._uneven_until, self._states = length, lengths, sizes, whole, states

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
    dropping: "Dropping | None" = None,
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
    deltas = [layer.linear_attn for layer in text.layers if hasattr(layer, "linear_attn")]
    if deltas and not dropping:
        from evoprune.backend import form_of_layers

        if form_of_layers(x.device, True, False):
            return _in_few_operations(model, x, positions, cache, sizes, ids, pause)[-last:]
    compiled = None if dropping else Quantization.compiled_layers(text.layers, x, config)
    if compiled:
        x = x.float()
    places = rotation(config, positions, x)
    if deltas:
        from evoprune.language import hybrid

        vectors = iter(hybrid.vectors_of(deltas, config))
    each = columns <= Quantization.few_rows and not dropping  # whether the states after each column are kept
    states: list[list[DeltaState | None]] = [[None] * len(text.layers) for _ in range(columns if each else 1)]
    entered = []
    if deepstack is None:
        deepstack = x.new_empty(0, *x.shape)
    rows = []
    dim = head_size(config)
    every = cache.sizes_with(sizes, columns)
    for i, layer in enumerate(text.layers):
        pause()
        if changed := not i or every[i] is not every[i - 1]:
            bias, wide = _bias(every[i], x, config)
        count = len(x)
        final = i == len(every) - 1
        if dropping:
            before = _, rows = dropping.before(i, count)
            attend = _attention_while_dropping(x, dim, (bias, wide), before, last if final else None)
        elif changed or (final and last < count):
            attend = attention_for(min(last, count) if final else count, dim, x.device, bias, wide)
        if rows:
            count = len(rows[0])
        entered.append(count)
        entering = x
        heads = []
        if (state := cache.states[i]) is not None:
            if compiled:
                x, inputs, recurrent = compiled[i](x, *state)
                after = hybrid.states_of(inputs, recurrent)
                x = x if compiled[i].has_mlp else _mlp(layer, x, config)
            else:
                x, after = run_delta_layer(layer, x, state, config, next(vectors))
            for of_column, new in zip(states, after[-len(states) :], strict=True):
                of_column[i] = new
        elif compiled:
            *_, keys, values = cache.room(i, len(x))
            x = compiled[i](x, *places, keys, values, bias)
            x = x if compiled[i].has_mlp else _mlp(layer, x, config)
        else:
            x, *heads = run_layer(layer, x, places, cache, i, config, attend, last, rows)
        if len(deepstack):
            # the last layer may return only the last `last` columns
            x = x + deepstack[0, -len(x) :]
            deepstack = deepstack[1:]
        if dropping:
            from evoprune.methods import LayerState

            x, deepstack, stay = dropping.after(LayerState(i + 1, entering, x, places, bias, *heads), deepstack)
            if stay is not None:
                places = places[0][stay], places[1][stay]
                every[i + 1 :] = [rows_at(every[i], stay)] * (len(every) - i - 1)
        if rows:
            every[i] = rows_at(every[i], rows[0])
    hidden = norm(x[-last:].to(inputs_embeds.dtype), text.norm.weight, config)
    cache.add(columns, entered, every, ids, states if deltas else ())
    return hidden


def _in_few_operations(
    model,
    x: torch.Tensor,
    positions: torch.Tensor,
    cache: KVCache,
    sizes: torch.Tensor | None,
    ids: torch.Tensor | None,
    pause: Callable[[], None],
) -> torch.Tensor:
    """Run a model with Gated DeltaNets using `hybrid.run`, and return the hidden states of all new columns. See `forward`."""
    from evoprune.language import hybrid

    config = model.config.text_config
    every = cache.sizes_with(sizes, len(x))
    before = cache.length
    states = _PassStates(cache)
    hidden = []
    strip = len(x) if every[0] is None else MASK_STRIP
    for start in range(0, len(x), strip):
        part = x[start : start + strip]
        mask = None
        if every[0] is not None or (before and len(part) > 1):
            mask = additive_mask(len(part), before + start, part, every[0])
        places = rotation(config, positions[:, start : start + strip], part)
        states.read = start
        hidden.append(hybrid.run(model.model.language_model, config, part, places, states, mask, pause))
    cache.add(len(x), [len(x)] * len(every), every, ids, [states.after])
    return torch.cat(hidden)


class _PassStates:
    """A KV cache during a pass over new columns, for `hybrid.run`. Implements `hybrid.States`."""

    def __init__(self, cache: KVCache):
        self.read = 0  # number of columns that earlier strips of the pass have read
        self._cache = cache
        from evoprune.language.hybrid import Pass

        self._passes = [state and Pass(state) for state in cache.states]

    @property
    def after(self) -> "list[DeltaState | None]":
        """The states of all layers after all columns."""
        return [each and each.after for each in self._passes]

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._cache.put(layer, keys, values, self.read)

    def memory(self, layer: int) -> "Pass":
        return self._passes[layer]


@torch.inference_mode()
@without_autocast()
def logits(model, *args, **kwargs) -> torch.Tensor:
    """Return the next-token logits after each of the last columns, float32 `[last, vocabulary]`. See `forward` for arguments."""
    # The output layer is the largest layer, so run it only on the last columns.
    return model.lm_head(forward(model, *args, **kwargs)).float()


def _bias(sizes: torch.Tensor | None, like: torch.Tensor, config) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the `bias` and `wide` arguments of `attention_for` for applying cluster sizes, or None for both if `sizes` is None."""
    if sizes is None:
        return None, None
    bias = sizes.log()
    wide = Attention.of(like).room_for_bias(bias, len(like), config.num_key_value_heads, head_size(config))
    return bias.to(like.dtype), wide


def _attention_while_dropping(
    x: torch.Tensor,
    dim: int,
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    before: tuple[tuple[torch.Tensor, int] | None, Sequence[torch.Tensor]],
    last: int | None,
) -> Attend:
    """Return the attention for a layer of a prompt whose tokens are dropped.

    Args:
        x: The layer's input.
        dim: The head size.
        biases: The result of `_bias`.
        before: The result of `Dropping.before`.
        last: Number of columns to compute the output for in the last layer, or None in other layers.
    """
    bias, wide = biases
    blind, rows = before
    if blind is not None:
        return Blind(dim, rows_at(bias, rows[0] if rows else None), wide, *blind)
    columns = len(x) if last is None else min(last, len(x))
    if not rows:
        return attention_for(columns, dim, x.device, bias, wide)
    keys, queries, _ = rows
    if last is None:
        return Restricted(dim, rows_at(bias, keys), torch.searchsorted(keys, queries, right=True))
    return attention_for(columns, dim, x.device, rows_at(bias, keys), None)


def run_layer(
    layer,
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    cache,
    number: int,
    config,
    attend: Attend,
    last: int = 1,
    rows: Sequence[torch.Tensor] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a single language model layer on new columns.

    Args:
        layer: The layer module.
        x: `[L, hidden]`, the hidden states of the new columns.
        places: The cosines and sines from `rotation`.
        cache: A `KVCache`, or a `NativeStaticCache` if there is only one column.
        number: The layer index.
        config: The language model config.
        attend: The attention. In the last layer, its queries are the last columns.
        last: Number of columns to compute the output for if this is the last layer.
        rows: A result of `Dropping.before`. If a column skips attention or the MLP, its hidden state doesn't change in that step.

    Returns:
        A tuple of the columns' output, their queries, all keys, and all values. In the last layer, the output includes only the
        last columns.
    """
    attention = layer.self_attn
    whole = attend.is_causal and not rows and (len(x) <= last or number < config.num_hidden_layers - 1)
    if whole and (fused := _fused(layer, x, places, cache, number, config, attend)):
        return fused
    kv_rows, q_rows, mlp_rows = rows or (None,) * 3
    cos, sin = places
    h = norm(x, layer.input_layernorm.weight, config)
    keys, values = (heads_of(attention, name, rows_at(h, kv_rows), config)[0] for name in "kv")
    keys = rotate(keys, rows_at(cos, kv_rows), rows_at(sin, kv_rows))
    keys, values = cache.put(number, *(tensor[None].transpose(1, 2) for tensor in (keys, values)))
    if number == config.num_hidden_layers - 1:  # only the output of the last columns is used
        x = x[-last:]
        h = h[-last:]
        cos = cos[-last:]
        sin = sin[-last:]
        q_rows = mlp_rows = None
    queries, gate = heads_of(attention, "q", rows_at(h, q_rows), config)
    queries = rotate(queries, rows_at(cos, q_rows), rows_at(sin, q_rows))[None]
    seen = attend(queries, keys, values)
    if gate is not None:
        # With several threads, an element's last bit can depend on the number of elements.
        rows = gate.flatten(1).split(1 if len(gate) <= Quantization.few_rows else len(gate))
        seen = seen * torch.cat([row.sigmoid() for row in rows])
    x = put_rows(x, q_rows, linear(attention.o_proj, seen, plus=rows_at(x, q_rows)))
    return put_rows(x, mlp_rows, _mlp(layer, rows_at(x, mlp_rows), config)), queries, keys, values


def run_delta_layer(
    layer, x: torch.Tensor, before: "DeltaState", config, vectors: "Vectors"
) -> "tuple[torch.Tensor, list[DeltaState]]":
    """Run a single layer with a Gated DeltaNet on new columns.

    Args:
        layer: The layer module.
        x: `[L, hidden]`, the hidden states of the new columns.
        before: The state before the new columns.
        config: The language model config.
        vectors: The layer's vectors.

    Returns:
        The columns' output, and the state after each column, or only after the last one if there are more than a few columns.
    """
    from evoprune.language import hybrid

    delta = layer.linear_attn
    memory = hybrid.Pass(before)
    h = norm(x, layer.input_layernorm.weight, config)
    if len(x) <= Quantization.few_rows:
        new, recurrent = hybrid.read_one_by_one(delta, config, h, memory, vectors)
        after = hybrid.states_of(memory.inputs, recurrent)
    else:
        new = hybrid.delta_net(delta, config, h, memory, vectors)
        after = [memory.after]
    return _mlp(layer, x + new, config), after


def _mlp(layer, x: torch.Tensor, config) -> torch.Tensor:
    """Return the output of a layer, given the hidden states after its attention or Gated DeltaNet."""
    mlp = layer.mlp
    h = norm(x, layer.post_attention_layernorm.weight, config)
    if hasattr(mlp, "experts"):
        return x + _experts_output(mlp, h, config.experts)
    return linear(mlp.down_proj, linear(mlp.up_proj, h, times=linear(mlp.gate_proj, h, silu=True)), plus=x)


def _experts_output(mlp, x: torch.Tensor, experts) -> torch.Tensor:
    """Return the output of a mixture of experts.

    Args:
        mlp: The module with the router, the experts, and possibly a shared expert, which processes all columns.
        x: `[L, hidden]`, the normalized input.
        experts: The `Experts` settings of the model.
    """
    router = mlp.gate.weight.to(x.dtype)
    scores = Quantization.by_row(lambda rows: F.linear(rows, router), x).softmax(-1, dtype=torch.float32)
    weights, chosen = scores.topk(experts.num_experts_per_tok)
    weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
    out = Quantization.experts_output(mlp.experts, x, chosen, weights)
    if not hasattr(mlp, "shared_expert"):
        return out
    shared = mlp.shared_expert
    gate = mlp.shared_expert_gate.weight.to(x.dtype)
    share = Quantization.by_row(lambda rows: F.linear(rows, gate).sigmoid(), x)
    inner = linear(shared.up_proj, x, times=linear(shared.gate_proj, x, silu=True))
    return out + share * linear(shared.down_proj, inner)


def _fused(
    layer,
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    cache,
    number: int,
    config,
    attend: Attend,
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
        more = attend.features or keys.shape[3] - dim
        queries = fast.rotate_put(projected, places, norms, eps, heads, *room, cache.column, more)
        seen = attend(queries, keys, values)
        x, h = fast.add_norm(x.contiguous(), attention.o_proj(seen), layer.post_attention_layernorm.weight, eps)
        return x + mlp.down_proj(fast.silu_times(F.linear(h, gates[0]))), queries[..., :dim], keys, values
    except Exception as problem:
        fast.give_up(problem)
        return None

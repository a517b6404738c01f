"""Decode using fixed-shape tensors, so that an entire decoding step can run as a single CUDA graph.

Each step reads a token that is already on the device, writes its keys and values to a fixed-size cache, and computes the next
token. Shapes never depend on values, and nothing is copied to the host. Attention always reads the entire cache, but an attention
bias hides unfilled columns.

Each model has a single static cache, which serves one answer at a time. When a new answer starts, it takes over the static cache.
If the previous answer then continues, it has to read its latest tokens again into its own cache.
"""

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from evoprune.backend import (
    EXPERTS,
    Attention,
    Device,
    is_unhooked_linear,
    to_device,
    without_cudnn,
)
from evoprune.errors import DeviceWarning, first_line
from evoprune.language import hosted, hybrid
from evoprune.language.attention import OneColumn
from evoprune.language.decoder import KVCache, cos_sin_of, frequencies_of, has_deltas, run_layer
from evoprune.language.hosted import HostedCache
from evoprune.language.hybrid import DeltaState
from evoprune.language.sampling import best_of
from evoprune.model import Cost, HostedVL, head_size, norm, without_autocast

# Number of tokens that an answer must have, and must still be allowed to grow by, before a graph is captured. Capturing a graph
# takes as long as a few plain decoding steps, so answers of one or two words shouldn't have to wait for it.
PLAIN_TOKENS = 4
MIN_COLUMNS = 512  # number of columns in the smallest graph; each larger graph has twice as many
MAX_NEW = 1024  # maximum number of new tokens for which columns are reserved
SHARE = 0.25  # maximum fraction of the available memory for a static cache


class StaticCache(ABC):
    """A KV cache at fixed memory addresses, together with the inputs, outputs, and CUDA graphs of decoding steps.

    It serves one answer at a time, and is protected by a lock. Each graph is captured for a fixed number of columns read by
    attention, which is at most `capacity`.
    """

    def __init__(self, model, capacity: int):
        like = model.model.language_model.norm.weight
        self.capacity = self.read = capacity  # number of columns, and number of columns read by attention
        # Input of the next step: the token to read, its column, and its position, int64 `[1]` each. Each step increments the column
        # and the position.
        self.token, self.column, self.position = like.new_zeros(3, 1, dtype=torch.int64).unbind(0)
        self.logits = like.new_zeros(len(model.lm_head.weight), dtype=torch.float32)  # next-token logits
        self.best = like.new_zeros(2, dtype=torch.int64)  # see `best_of`
        self.graphs: dict[int, Callable[[], None]] = {}  # by number of columns read by attention
        self._capture = Device(like.device).capture
        self._lock = threading.Lock()
        self._holder: object | None = None  # identifies the answer currently being served, or None
        self._room = 0  # number of tokens that still fit

    def fill(self, cache: KVCache | HostedCache, position: int, read: int) -> None:
        """Copy all columns from an answer's own KV cache.

        Args:
            cache: The KV cache to copy from. All of its layers must have the same columns.
            position: M-RoPE position of the next token.
            read: Number of columns read by attention.
        """
        sizes = cache.sizes if isinstance(cache, HostedCache) else cache.sizes[0]
        bias = self.logits.new_full((read,), -torch.inf)
        bias[: cache.length] = 0
        if sizes is not None:
            bias[: cache.length] = sizes.log()
        self._copy(cache, bias)
        self.read = read
        self.column.fill_(cache.length)
        self.position.fill_(position)

    @abstractmethod
    def _copy(self, cache: KVCache | HostedCache, bias: torch.Tensor) -> None:
        """Copy the state of each layer, and apply the attention bias.

        Args:
            cache: The KV cache to copy from.
            bias: float32 `[read]`, the attention bias of each column, or -inf for unfilled columns.
        """

    @abstractmethod
    def run(self, model, x: torch.Tensor) -> torch.Tensor:
        """Run the model on the next column's embedding, `[1, hidden]`, and return its final hidden state."""

    def begin(self, holder: object, cache: KVCache | HostedCache, position: int, read: int) -> None:
        """Hand over the static cache to the answer identified by `holder`. If copying fails, it serves no answer."""
        with self._lock:
            self._holder = None
            self.fill(cache, position, read)
            self._holder, self._room = holder, read - cache.length

    def following(self, model, holder: object, token: int, pick: Callable[..., Any]) -> Any:
        """Read a token, and call `pick(logits, best)` to choose the next token.

        Returns:
            The result of `pick`, or None if the cache is full or has been handed over to another answer.
        """
        with self._lock:
            if self._holder is not holder or not self._room:
                return None
            self._holder = None  # if the step fails, the cache is invalid
            self.token.fill_(token)
            if replay := self.graphs.get(self.read):
                replay()
            else:
                self.graphs[self.read] = self._capture(lambda: step(model, self))
            following = pick(self.logits, self.best)
            self._holder, self._room = holder, self._room - 1
            return following


class NativeStaticCache(StaticCache):
    """A static cache for layers run by language/decoder.py. The attention bias is applied through additional key features."""

    def __init__(self, model, capacity: int):
        super().__init__(model, capacity)
        config = model.config.text_config
        like = model.model.language_model.norm.weight
        self._dim = head_size(config)
        more = Attention.of(like).bias_features(torch.zeros(1, dtype=torch.float32, device="cpu"), self._dim).shape[1]
        wide = self._dim + more
        self._keys_values = like.new_zeros(config.num_hidden_layers, 2, config.num_key_value_heads, capacity, wide)
        self.frequencies = to_device(frequencies_of(config)[0], like.device)

    def _copy(self, cache: KVCache, bias: torch.Tensor) -> None:
        length = cache.length
        read = len(bias)
        dim = self._dim
        for number, keys_values in enumerate(self._keys_values):
            for to, given in zip(keys_values, cache.room(number, 0)[2:], strict=True):
                to[:, :length, :dim] = given[0]
        # An earlier answer may have left NaN in these columns, and multiplying NaN by a weight of 0 wouldn't remove it.
        self._keys_values[:, :, :, length:read, :dim] = 0
        self._keys_values[:, 0, :, :read, dim:] = Attention.of(self._keys_values).bias_features(bias, dim)

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of a new column, and return the keys and values of all columns read by attention.

        Unlike in `KVCache.put`, the returned tensors include bias features.
        """
        *room, known_keys, known_values = self.room(layer, 1)
        for to, new in zip(room, (keys, values), strict=True):
            to[..., : self._dim].index_copy_(1, self.column, new[0])
        return known_keys, known_values

    def room(self, layer: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the tensors to write to (at index `column`) and the tensors to read, in the same order as `KVCache.room`."""
        keys_values = self._keys_values[layer, :, :, : self.read]
        return *keys_values.unbind(0), keys_values[:1], keys_values[1:]

    def run(self, model, x: torch.Tensor) -> torch.Tensor:
        config = model.config.text_config
        text = model.model.language_model
        # All three M-RoPE positions of a generated token are equal.
        places = cos_sin_of(self.position[:, None] * self.frequencies, x.dtype)
        # Replace the bias of -inf for the new column with 0, so that attention can see the column.
        self._keys_values[:, 0, :, : self.read, self._dim :].index_fill_(2, self.column, 0)
        attend = OneColumn(self._dim)  # the keys have the bias
        for number, layer in enumerate(text.layers):
            x = run_layer(layer, x, places, self, number, config, attend)[0]
        return norm(x, text.norm.weight, config)


class DeltaStaticCache(StaticCache):
    """A static cache for evoprune's own models with Gated DeltaNets, which `hybrid.run` runs. Implements `hybrid.States`."""

    def __init__(self, model, capacity: int):
        super().__init__(model, capacity)
        config = model.config.text_config
        like = model.model.language_model.norm.weight
        self._bias = like.new_zeros(capacity)  # attention bias per column, for all attention layers
        shape = (2, 1, config.num_key_value_heads, capacity, head_size(config))
        self._layers = [
            FixedMemory(DeltaState.initial(config, like))
            if config.is_linear(layer)
            else StaticLayer(like.new_zeros(shape), self.column)
            for layer in range(config.num_hidden_layers)
        ]
        self.frequencies = to_device(frequencies_of(config)[0], like.device)

    def _copy(self, cache: KVCache, bias: torch.Tensor) -> None:
        self._bias[: len(bias)] = bias
        for number, (own, state) in enumerate(zip(self._layers, cache.states, strict=True)):
            if isinstance(own, FixedMemory):
                own.copy(state)
            else:
                own.copy(*cache.room(number, 0)[2:], len(bias))

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._layers[layer].update(keys, values)

    def memory(self, layer: int) -> "FixedMemory":
        return self._layers[layer]

    def run(self, model, x: torch.Tensor) -> torch.Tensor:
        self._bias.index_fill_(0, self.column, 0)
        places = cos_sin_of(self.position[:, None] * self.frequencies, x.dtype)
        mask = self._bias[None, None, None, : self.read]
        return hybrid.run(model.model.language_model, model.config.text_config, x, places, self, mask)


class FixedMemory:
    """The state of a Gated DeltaNet at fixed addresses, for steps of one column. Implements `hybrid.Memory`."""

    def __init__(self, state: DeltaState):
        self._inputs, self.recurrent = state

    def copy(self, state: DeltaState) -> None:
        self._inputs.copy_(state.inputs)
        self.recurrent.copy_(state.recurrent)

    def extend(self, inputs: torch.Tensor, kernel: int) -> torch.Tensor:
        every = torch.cat([self._inputs, inputs])
        self._inputs.copy_(every[1:])
        return every.T

    def put(self, recurrent: torch.Tensor) -> None:
        self.recurrent.copy_(recurrent)


class HostedStaticCache(StaticCache):
    """A static cache for transformers modules. Linear attention layers already store their states at fixed addresses."""

    def __init__(self, model: HostedVL, capacity: int):
        super().__init__(model, capacity)
        config = model.config.text_config
        like = model.model.language_model.norm.weight
        self._bias = like.new_zeros(capacity)  # attention bias per column, for all attention layers
        self._states = HostedCache(model).states
        shape = (2, 1, config.num_key_value_heads, capacity, head_size(config))
        for number, layer in enumerate(self._states.layers):
            if not _is_linear(layer):
                self._states.layers[number] = StaticLayer(like.new_zeros(shape), self.column)

    def _copy(self, cache: HostedCache, bias: torch.Tensor) -> None:
        self._bias[: len(bias)] = bias
        for own, given in zip(self._states.layers, cache.states.layers, strict=True):
            if isinstance(own, StaticLayer):
                own.copy(given.keys, given.values, len(bias))
                continue
            for number, state in given.conv_states.items():
                own.update_conv_state(state, number)
            for number, state in given.recurrent_states.items():
                own.update_recurrent_state(state, number)

    def run(self, model: HostedVL, x: torch.Tensor) -> torch.Tensor:
        self._bias.index_fill_(0, self.column, 0)
        places = torch.cat([self.column, self.position.expand(3)])[:, None, None]
        mask = self._bias[None, None, None, : self.read]
        return hosted.run(model, x, places, self._states, mask)


class StaticLayer:
    """A transformers cache layer that stores the keys and values of an attention layer at fixed addresses.

    Args:
        keys_values: The buffer for keys and values, `[2, 1, heads, capacity, dim]`. `update` returns the number of leading columns
            specified by `copy`.
        column: The index of the column to write to in `update`, int64 `[1]`.
    """

    def __init__(self, keys_values: torch.Tensor, column: torch.Tensor):
        self._keys_values = keys_values
        self._column = column
        self._read = keys_values.shape[3]

    def copy(self, keys: torch.Tensor, values: torch.Tensor, read: int) -> None:
        length = keys.shape[2]
        self._read = read
        self._keys_values[:, :, :, :length] = torch.stack([keys, values])
        self._keys_values[:, :, :, length:read] = 0  # as in `NativeStaticCache`

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_, **__) -> tuple[torch.Tensor, torch.Tensor]:
        for keys_values, new in zip(self._keys_values, (keys, values), strict=True):
            keys_values.index_copy_(2, self._column, new)
        return self._keys_values[:, :, :, : self._read].unbind(0)


def _is_linear(layer) -> bool:
    """Return True if a transformers cache layer stores recurrent states instead of keys and values."""
    return hasattr(layer, "recurrent_states")


@torch.inference_mode()
@without_autocast()
@without_cudnn()
def step(model, cache: StaticCache) -> None:
    """Run a decoding step: read `cache.token`, store the resulting logits in the cache, and advance to the next column."""
    text = model.model.language_model
    x = text.embed_tokens(cache.token).to(text.norm.weight.dtype)
    logits = model.lm_head(cache.run(model, x)).float()[0]
    cache.logits.copy_(logits)
    cache.best.copy_(best_of(logits))
    cache.column.add_(1)
    cache.position.add_(1)


# The static cache of each model, or None if graph capture has failed for the model.
_caches: WeakKeyDictionary[nn.Module, StaticCache | None] = WeakKeyDictionary()
_caches_lock = threading.Lock()


def new_cache(model, columns: int) -> StaticCache:
    if isinstance(model, HostedVL):
        return HostedStaticCache(model, columns)
    if has_deltas(model):
        return DeltaStaticCache(model, columns)
    return NativeStaticCache(model, columns)


def logits_along(model, cache: KVCache | HostedCache, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after each token of a given answer, `[n, vocabulary]`, using decoding steps in a new static cache.

    Args:
        cache: The KV cache of the columns before the answer.
        position: M-RoPE position of the first token.
        ids: Answer token IDs, int64 `[n]`.
    """
    steps = new_cache(model, MIN_COLUMNS)
    holder = object()
    logits = []
    steps.begin(holder, cache, position, MIN_COLUMNS)
    for token in ids.tolist():
        steps.following(model, holder, token, lambda new, best: logits.append(new.clone()) or 0)
    return torch.stack(logits)


def begin(
    model, holder: object, cache: KVCache | HostedCache, position: int, decoded: int, left: int
) -> StaticCache | None:
    """Copy a KV cache into the model's static cache if the next tokens should be decoded using a CUDA graph.

    Args:
        holder: An object that identifies the answer.
        cache: The answer's own KV cache.
        position: M-RoPE position of the next token to read.
        decoded: Number of answer tokens so far.
        left: Maximum number of tokens that can still be added to the answer.

    Returns:
        The static cache, or None if graphs are unavailable or not yet worth capturing.
    """
    like = model.model.language_model.norm.weight
    if Device(like.device).capture is None or not _is_even(cache):
        return None
    need = cache.length + min(left, MAX_NEW)
    columns = max(MIN_COLUMNS, 1 << (need - 1).bit_length())
    with _caches_lock:
        steps = _caches.get(model)
        if model in _caches and steps is None:
            return None
        known = []
        if steps:
            known = [size for size in steps.graphs if need <= size <= 4 * columns]
        if not known and min(decoded, left) < PLAIN_TOKENS:
            return None
        if not can_step(model):
            return None
        if not known and (steps is None or steps.capacity < columns):
            available = Device(like.device).available_memory()
            if available is not None and Cost(model.config).kv_bytes(columns, like.itemsize) >= SHARE * available:
                return None
            steps = _caches[model] = new_cache(model, columns)
    steps.begin(holder, cache, position, min(known, default=columns))
    return steps


def _is_even(cache: KVCache | HostedCache) -> bool:
    """Return True if all layers of a KV cache contain the same columns with the same cluster sizes."""
    if isinstance(cache, HostedCache):
        return True
    return {*cache.lengths} == {cache.length} and len({*map(id, cache.sizes)}) == 1


def can_step(model) -> bool:
    """Return True if all decoding steps of a model run the same operations, so they can be captured in a graph.

    Models with hooks are rejected, because a hook may run arbitrary code. Models that also read token IDs are rejected, because
    only embeddings are available in a decoding step, and so are models whose answers attend to a sliding window.
    Mixture-of-experts (MoE) models are accepted only with one of the two expert implementations that never copy the choice of
    experts to the host.
    """
    modules = [model.lm_head, *model.model.language_model.layers.modules()]
    if not all(is_unhooked_linear(layer) for layer in modules if isinstance(layer, nn.Linear)):
        return False
    if not isinstance(model, HostedVL):
        return True
    if hosted.reads_ids(model) or model.config.text_config.sliding_window is not None:
        return False
    text = model.model.language_model
    plain = (nn.Parameter, torch.Tensor)
    kinds = {*(getattr(text.config, "layer_types", None) or ())}
    weights = [*text.parameters(), *text.buffers()]
    experts = model.config.text_config.experts
    return (
        (experts is None or text.config._experts_implementation in (EXPERTS, "batched_mm"))
        and kinds <= {"full_attention", "linear_attention"}
        # Reject weights quantized by a package. They have special classes or integer dtypes, and may be buffers.
        and all(type(weight) in plain and weight.is_floating_point() for weight in weights)
    )


def give_up(model, problem: Exception) -> None:
    """Stop using CUDA graphs for a model, and warn that decoding is slower without them."""
    _caches[model] = None
    message = f"tokens are decoded without a CUDA graph, which takes longer: {first_line(problem)}"
    warnings.warn(message, DeviceWarning, stacklevel=2)

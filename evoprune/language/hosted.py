"""Run language models with quantized weights, or with layers not supported by decoder.py, through transformers.

The functions mirror those in language/decoder.py. Cluster sizes are passed to attention layers as an additive mask. Linear
attention layers (Gated DeltaNet, arXiv 2412.06464) have no attention scores, so they ignore cluster sizes.
"""

from collections.abc import Callable
from copy import deepcopy

import torch

from evoprune.backend import (
    cache_name,
    form_of_layers,
    to_device,
    without_cudnn,
    without_packages,
)
from evoprune.errors import call
from evoprune.language import hybrid
from evoprune.language.attention import additive_mask
from evoprune.language.decoder import MASK_STRIP, ColumnIds, all_sizes
from evoprune.methods import arange_on
from evoprune.model import HostedVL, without_autocast


class HostedCache(ColumnIds):
    """A transformers `DynamicCache` containing the state of each layer, plus the cluster sizes of the columns read so far.

    If any layer has a recurrent state, the cache cannot be cropped. To reuse the cache for a later prompt with the same prefix,
    callers have to keep a copy.
    """

    def __init__(self, model: HostedVL):
        from transformers import DynamicCache

        super().__init__()
        config = model.model.language_model.config
        self.states = DynamicCache(config=config)
        self.sizes: torch.Tensor | None = None  # cluster sizes, float32 `[length]`, or None if all are 1
        self.can_crop = can_crop(model)

    def crop(self, length: int) -> None:
        """Drop all columns after the first `length` columns.

        Raises:
            ValueError: If the cache has fewer columns or contains recurrent states.
        """
        if not (0 <= length <= self.length and self.can_crop):
            raise ValueError(f"a cache of {self.length} columns cannot be cropped to {length}")
        for layer in self.states.layers:
            if layer.get_seq_length() > length:
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        if self.sizes is not None:
            self.sizes = self.sizes[:length]
        self.length = length

    def copy(self) -> "HostedCache":
        return deepcopy(self)


def can_crop(model: HostedVL) -> bool:
    """Return True if the KV cache can be cropped because all layers use full attention, without any recurrent state."""
    kinds = getattr(model.model.language_model.config, "layer_types", None) or ()
    return all(kind == "full_attention" for kind in kinds)


def reads_ids(model: HostedVL) -> bool:
    """Return True if the model requires token IDs in addition to embeddings, because it has n-gram embeddings (Qwen4-Exp)."""
    return bool(getattr(model.model.language_model.config, "ple_layer_ids", None))


def run_modules(text, x: torch.Tensor, places: torch.Tensor, states, mask: torch.Tensor | None, **kwargs):
    """Run a language model using its transformers module, `text`. See `run` for arguments and results."""
    kwargs |= {"attention_mask": mask, cache_name(): states, "use_cache": True}
    return text(inputs_embeds=x[None], position_ids=places, **kwargs).last_hidden_state[0]


def run_few(text, x: torch.Tensor, places: torch.Tensor, states, mask: torch.Tensor | None) -> torch.Tensor:
    """Run a language model with few operations. See `run` for arguments and results."""
    cos, sin = (turn[0, :, None] for turn in text.rotary_emb(x[None], places[1:]))
    first, second = sin.chunk(2, -1)
    cos_sin = cos, torch.cat([-first, second], -1)
    return hybrid.run(text, text.config, x, cos_sin, ModuleStates(states), mask)


class ModuleStates:
    """A transformers cache for `hybrid.run`. Implements `hybrid.States`."""

    def __init__(self, states):
        self._states = states

    def put(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._states.update(keys, values, layer)

    def memory(self, layer: int) -> "ModuleMemory":
        return ModuleMemory(self._states.layers[layer])

    def read_one(self, delta, x: torch.Tensor) -> torch.Tensor:
        return delta(x[None], self._states)[0]


class ModuleMemory:
    """The state of a Gated DeltaNet in a transformers cache. Implements `hybrid.Memory`."""

    def __init__(self, layer):
        self._layer = layer

    @property
    def recurrent(self) -> torch.Tensor | None:
        state = self._layer.recurrent_states[0]
        return None if state is None else state[0]

    def extend(self, inputs: torch.Tensor, kernel: int) -> torch.Tensor:
        return self._layer.update_conv_state(inputs.T[None], conv_kernel_size=kernel)[0]

    def put(self, recurrent: torch.Tensor) -> None:
        self._layer.update_recurrent_state(recurrent[None])


def run_for(model: HostedVL, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the function for running the layers on a device: `run_modules` or `run_few`, which differ in rounding."""
    only_modules = can_crop(model) or hasattr(model.model.language_model, "hyper_connection_mixer")
    return run_modules if only_modules else form_of_layers(device, run_few, run_modules)


@torch.inference_mode()
@without_autocast()
@without_cudnn()
def forward(
    model: HostedVL,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    cache: HostedCache,
    sizes: torch.Tensor | None = None,
    last: int = 1,
    deepstack: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Run the model on new columns and return the final hidden states of the last `last` columns, `[last, hidden]`.

    If the forward pass fails, a croppable cache stays usable, but a cache with recurrent states becomes invalid. See
    `decoder.forward` for the remaining arguments.

    Args:
        ids: int64 `[columns]`, the token IDs of the columns, with placeholders for visual tokens, which the cache records. Required
            if `reads_ids` is True for the model.
        window: Number of columns that each new column attends to, including itself, or None for all columns.

    Raises:
        ValueError: If there are no columns, `positions` doesn't match the columns, `last` is out of range, or an earlier forward
            pass has invalidated the cache.
    """
    columns = len(inputs_embeds)
    before = cache.length
    if not columns or positions.shape != (3, columns):
        raise ValueError(f"positions have shape {list(positions.shape)} for {columns} columns")
    if not 1 <= last <= columns:
        raise ValueError(f"last is {last} for {columns} columns")
    if reads_ids(model) and (ids is None or len(ids) != columns):
        raise ValueError(f"the model needs the token ids of its {columns} columns")
    if cache.can_crop:  # an earlier pass may have failed when only some layers had stored their columns
        cache.crop(before)
    elif before < 0:
        raise ValueError("the cache is invalid: an earlier pass failed after changing its recurrent states")
    every = None
    if sizes is not None or cache.sizes is not None:
        old = all_sizes(cache.sizes, before, inputs_embeds)
        every = torch.cat([old, all_sizes(sizes, columns, inputs_embeds)])
    if not cache.can_crop:
        cache.length = -1  # invalid until all layers have read all columns
    hidden = []
    places = torch.cat([arange_on(columns, "cpu")[None] + before, positions])[:, None]
    step = columns if every is None else MASK_STRIP
    for start in range(0, columns, step):
        strip = slice(start, min(start + step, columns))
        hidden.append(
            _read(
                model,
                inputs_embeds[strip],
                places[..., strip],
                cache,
                every,
                before + start,
                deepstack,
                strip,
                ids,
                window,
            )
        )
    cache._record(before, columns, ids)
    cache.length, cache.sizes = before + columns, every
    return torch.cat(hidden)[-last:] if len(hidden[-1]) < last else hidden[-1][-last:]


def _read(
    model: HostedVL,
    embeds: torch.Tensor,
    places: torch.Tensor,
    cache: HostedCache,
    sizes: torch.Tensor | None,
    before: int,
    deepstack: torch.Tensor | None,
    strip: slice,
    ids: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """Run the model on a strip of columns and return their final hidden states, `[columns, hidden]`.

    `before` is the number of columns already in the cache.
    """
    given = {}
    if sizes is not None or window is not None or (before and len(embeds) > 1):
        given["attention_mask"] = additive_mask(len(embeds), before, embeds, sizes, window)
    if deepstack is not None and len(deepstack):
        given["deepstack_visual_embeds"] = list(deepstack[:, strip])
        given["visual_pos_masks"] = torch.ones(1, len(embeds), dtype=torch.bool, device=embeds.device)
    if reads_ids(model):
        given["ple_input_ids"] = to_device(ids[strip], embeds.device)[None]
    return run(model, embeds, to_device(places, embeds.device), cache.states, **given)


@without_packages()
def run(model: HostedVL, x: torch.Tensor, places: torch.Tensor, states, attention_mask=None, **kwargs) -> torch.Tensor:
    """Run the layers on new columns and return the final hidden states, `[L, hidden]`.

    Args:
        model: The model to run.
        x: `[L, hidden]`, the embeddings of the new columns.
        places: int64 `[4, 1, L]`, the index and the three M-RoPE positions of each column.
        states: The transformers cache of the preceding columns. The new columns are added in place.
        attention_mask: See the `mask` argument of `hybrid.run`.
        kwargs: Additional arguments for the transformers module.
    """
    run_layers = run_for(model, x.device)
    return call(model.package, run_layers, model.model.language_model, x, places, states, attention_mask, **kwargs)

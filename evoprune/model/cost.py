"""What a run costs: operations of tower and prefill, bytes of memory, and the seconds of each stage.

A multiply-add counts as two operations. Counts use the actual rows of every layer and the actual length of the prompt.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from evoprune.backend import available_memory, now
from evoprune.errors import memory_guard
from evoprune.model.config import ANSWER_COLUMNS, PATCHES, Config, TextConfig, head_size
from evoprune.model.numerics import without_autocast
from evoprune.model.weights import Tower

SMALL_CHANGE = 128 * 2**20  # bytes that any run takes, however small
# Of all rows of a layer: they themselves, queries, keys, values, and what attention makes of them, and of some of these a copy.
ROW_COPIES = 6
DELTA_CHUNK = 64  # columns that a Gated DeltaNet computes together when it reads a prompt, as in transformers


T = TypeVar("T")


class Clock:
    """Adds up the seconds that each stage is busy."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        return now(self._device)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a block; running out of memory in it becomes an error that names the stage."""
        start = self.now()
        try:
            with memory_guard(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yields items, and times only how they are made."""
        source = iter(items)
        while True:
            with self.stage(name):
                item = next(source, None)
            if item is None:
                return
            yield item


def shortage(needed: int, device: str) -> str | None:
    """Return how much is missing, in words, where `needed` bytes cannot be had; else None."""
    available = available_memory(device)
    if available is None or needed <= available:
        return None
    return f"needs about {_size(needed)} of memory, and {_size(available)} are available"


def _size(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{max(0, size) >> 20} MiB"


def working_memory(
    config: Config,
    units: int,
    piece_units: int,
    prompt: int | Sequence[int],
    bytes_each: int,
    rows: int | None = None,
    left: int | None = None,
) -> int:
    """Return the bytes that are in use at once beside the weights, roughly.

    Args:
        units: N, of the video. `piece_units`: rows that go through a product at a time.
        prompt: tokens that the language model reads, in each layer or in all. `bytes_each`: of a weight.
        rows: the most that a layer of the tower computes; `left`: those that leave the tower. None for all units.
    """
    piece_units = min(units, piece_units)
    vision = config.vision_config
    row_bytes = PATCHES * vision.hidden_size * bytes_each
    # All units are embedded in pieces, which are then joined; a selection among them compares a copy.
    embedding = 2 * units * row_bytes + pixel_bytes(config, piece_units, bytes_each)
    if rows is None:
        rows = units
    if left is None:
        left = units
    layers = ROW_COPIES * rows * row_bytes + tower_bytes(config, piece_units, bytes_each)
    features = left * vision.out_hidden_size * vision.layers_read * bytes_each
    return SMALL_CHANGE + features + max(embedding, layers, language_bytes(config, prompt, bytes_each))


def pixel_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Return the bytes of the patches of `units` units, in float32 and in the dtype of the weights."""
    vision = config.vision_config
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return units * PATCHES * values * (4 + bytes_each)


def tower_bytes(config: Config, units: int, bytes_each: int) -> int:
    """Return the bytes of a pass of `units` units through the tower; widest are rotary embedding, in float32, and the MLP."""
    vision = config.vision_config
    return units * PATCHES * (12 * vision.hidden_size * 4 + 3 * vision.intermediate_size * bytes_each)


def carried_bytes(config: Config, places: int, bytes_each: int) -> int:
    """Return the bytes of the tower's keys and values of all layers for places of a frame pair; later pairs attend to them."""
    vision = config.vision_config
    return places * vision.depth * 2 * PATCHES * vision.hidden_size * bytes_each


def _of_each_layer(tokens: int | Sequence[T], depth: int) -> Sequence[int | T]:
    """Return the tokens in each of `depth` layers, where one number may stand for all."""
    return [tokens] * depth if isinstance(tokens, int) else tokens


def kv_bytes(config: Config, tokens: int | Sequence[int], bytes_each: int = 2) -> int:
    """Return the bytes of the language model's keys and values for a prompt of `tokens`, in each layer or in all.

    A Gated DeltaNet has a state in their place, in float32, whatever the length of the prompt.
    """
    text = config.text_config
    depth = text.num_hidden_layers
    lengths = _of_each_layer(tokens, depth)
    net = getattr(text, "delta_net", None)  # none in the config of a transformers model in hand
    linear = [net is not None and text.is_linear(layer) for layer in range(depth)]
    of_token = 2 * text.num_key_value_heads * head_size(text) * bytes_each
    total = of_token * sum(length for length, is_linear in zip(lengths, linear, strict=True) if not is_linear)
    if net:
        state = net.value_size * net.linear_key_head_dim * 4
        seen = (2 * net.key_size + net.value_size) * net.linear_conv_kernel_dim * bytes_each
        total += sum(linear) * (state + seen)
    return total


def language_bytes(config: Config, prompt: int | Sequence[int], bytes_each: int) -> int:
    """Return the bytes of reading a prompt of `prompt` tokens, in each layer or in all, keys and values included."""
    text = config.text_config
    lengths = _of_each_layer(prompt, text.num_hidden_layers)
    added = config.vision_config.layers_read - 1  # by DeepStack, to as many layers
    inner = max(mlp_size(text, layer) for layer in range(text.num_hidden_layers))
    wide = 8 * 4 * text.hidden_size
    if net := text.delta_net:  # its chunks are computed in float32, with a copy of its keys for each head of values
        heads = net.linear_num_value_heads
        key = net.linear_key_head_dim
        value = net.linear_value_head_dim
        wide = max(wide, heads * (6 * key + 6 * value + 3 * DELTA_CHUNK) * 4)
    widest = max(lengths) * (wide + added * bytes_each * text.hidden_size + 3 * inner * bytes_each)
    held = [tokens + ANSWER_COLUMNS for tokens in lengths]
    # A recurrent state cannot be cropped: it is kept for the next question, and copied.
    copies = 2 if text.delta_net else 1
    return widest + copies * kv_bytes(config, held, bytes_each)


def tower_flop(config, rows: Sequence[int], grids: int, windows: int) -> float:
    """Return the operations of the vision tower (`config`: a `VisionConfig`) on `grids` frame pairs of so many attention windows.

    `rows`: that each layer computes, over the whole video, and as a last entry the rows that reach the merger.
    """
    h = config.hidden_size
    mlp = len(config.traits.mlp) * config.intermediate_size
    pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    total = 2.0 * rows[0] * PATCHES * pixels * h
    for layer, units in enumerate(rows[:-1]):
        patches = units * PATCHES
        groups = grids
        if layer not in config.fullatt_block_indexes:
            groups *= windows
        total += 2 * patches * (4 * h * h + mlp * h) + 4 * patches * (patches / groups) * h
    wide = h * config.spatial_merge_size**2
    merged = sum(rows[layer + 1] for layer in config.deepstack_visual_indexes) + rows[-1]
    return total + 2 * merged * (wide * wide + wide * config.out_hidden_size)


def stretched(rows: Sequence[T], depth: int) -> list[T]:
    """Return the rows of each of `depth` layers, taken by relative depth from the rows of a model with another number of layers."""
    return [rows[layer * len(rows) // depth] for layer in range(depth)]


def mlp_size(config: TextConfig, layer: int) -> int:
    """Return the inner features that a layer computes of a token: of its MLP, or of the experts that the token goes through."""
    if not config.has_experts(layer):
        return config.intermediate_size
    experts = config.experts
    shared = experts.shared_expert_intermediate_size or 0
    return experts.num_experts_per_tok * experts.moe_intermediate_size + shared


def parameter_count(config: Config) -> int:
    """Count the numbers in the weights of a model of any family, of all experts; shared ones count once."""
    text = config.text_config
    net = config.text_config.delta_net
    experts = config.text_config.experts
    h = text.hidden_size
    head = head_size(text)
    wide, keys = (head * heads for heads in (text.num_attention_heads, text.num_key_value_heads))
    attention = h * (2 * wide + 2 * keys)
    if text.output_gate:
        attention += h * wide
    if text.head_norms:
        attention += 2 * head
    else:
        attention += wide + 2 * keys  # biases
    with torch.device("meta"):
        total = sum(weight.numel() for weight in Tower(config.vision_config).parameters())
    total += text.vocab_size * h + h
    if not config.tie_word_embeddings:
        total += text.vocab_size * h
    for layer in range(text.num_hidden_layers):
        total += 2 * h
        if text.is_linear(layer):
            mixed = 2 * net.key_size + net.value_size
            heads = net.linear_num_value_heads
            total += h * (mixed + 2 * net.value_size + 2 * heads) + mixed * net.linear_conv_kernel_dim
            total += 2 * heads + net.linear_value_head_dim
        else:
            total += attention
        if text.has_experts(layer):
            total += experts.num_experts * h * (1 + 3 * experts.moe_intermediate_size)
            if shared := experts.shared_expert_intermediate_size:
                total += h * (1 + 3 * shared)
        else:
            total += 3 * h * text.intermediate_size
    return total


def prefill_flop(config: TextConfig, length: int | Sequence[int | Sequence[int]]) -> float:
    """Return the operations of reading a prompt, with logits of the last token only.

    `length`: tokens of the prompt after pruning, in each layer or in all. Of a layer also three numbers: the tokens of which it
    computes keys and values, queries and output, and the MLP.
    """
    h = config.hidden_size
    lengths = _of_each_layer(length, config.num_hidden_layers)
    key_value, wide = (head_size(config) * heads for heads in (config.num_key_value_heads, config.num_attention_heads))
    total = 2.0 * h * config.vocab_size
    gate = 2 * h * wide if config.output_gate else 0
    for layer, layer_length in enumerate(lengths):
        keys, queries, mlp = (layer_length,) * 3 if isinstance(layer_length, int) else layer_length
        if config.is_linear(layer):
            total += keys * _delta_flop(config)
        else:
            total += 4 * h * (key_value * keys + wide * queries) + 2 * keys * queries * wide + gate * queries
        total += 6 * h * mlp_size(config, layer) * mlp
        if config.has_experts(layer):
            gates = config.experts.num_experts + (config.experts.shared_expert_intermediate_size is not None)
            total += 2 * h * gates * mlp
    return total


def _delta_flop(config: TextConfig) -> float:
    """Return the operations of a Gated DeltaNet for a token of a prompt: projections, convolution, delta rule by chunks."""
    net = config.delta_net
    key = config.delta_net.linear_key_head_dim
    value = config.delta_net.linear_value_head_dim
    heads = net.linear_num_value_heads
    mixed = 2 * net.key_size + net.value_size
    projections = 2 * config.hidden_size * (mixed + 2 * net.value_size + 2 * heads)
    # Inside a chunk keys meet keys and queries, a triangular system is solved for keys and values, and queries read the values;
    # the state is read by keys and by queries, and written.
    inside = DELTA_CHUNK * (4 * key + (key + value) + 2 * value)
    return projections + 2 * net.linear_conv_kernel_dim * mixed + heads * (inside + 6 * key * value)


@without_autocast()
def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 0.1,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024),),
) -> float:
    """Return operations per second of a plain matrix product here: the best of `shapes` (rows, inner, columns), `seconds` each."""
    best = 0.0
    place = torch.device(device)
    for rows, inner, columns in shapes:
        a, b = (torch.randn(x, dtype=dtype, device=device) for x in ((rows, inner), (inner, columns)))
        a @ b
        end = now(place) + seconds
        while (start := now(place)) < end:
            a @ b
            best = max(best, 2 * rows * inner * columns / (now(place) - start))
    return best

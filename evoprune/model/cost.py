"""Estimate the number of operations and the memory required for a run, and measure how long each stage takes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from evoprune.backend import Device
from evoprune.errors import memory_guard
from evoprune.model.config import ANSWER_COLUMNS, PATCHES, Config, TextConfig, head_size
from evoprune.model.numerics import without_autocast
from evoprune.model.weights import MtpWeights, Tower

SMALL_CHANGE = 128 * 2**20  # number of bytes needed for even the smallest run
# Number of row-sized tensors that a layer keeps in memory at once: the rows, queries, keys, values, the attention output, and
# copies of some of these tensors.
ROW_COPIES = 6
DELTA_CHUNK = 64  # number of columns that a Gated DeltaNet processes at once, same as in transformers


T = TypeVar("T")


class Clock:
    """Measures the total time spent in each stage of a run, in seconds."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._device = device

    def now(self) -> float:
        return Device(self._device).now()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent in a `with` block to a stage. If memory runs out inside the block, the error mentions the stage."""
        start = self.now()
        try:
            with memory_guard(name):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield items and add the time spent producing them to a stage, excluding time spent in the consumer."""
        source = iter(items)
        while True:
            with self.stage(name):
                item = next(source, None)
            if item is None:
                return
            yield item


class Cost:
    """Estimates the cost of running a model: its parameters, operations, and memory in bytes.

    A multiply-add counts as two operations.
    """

    def __init__(self, config: Config):
        self._config = config
        self._vision = config.vision_config
        self._text = config.text_config

    @property
    def parameters(self) -> int:
        """Number of model parameters, including all experts and counting tied parameters once."""
        text = self._text
        net = text.delta_net
        experts = text.experts
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
            total = sum(weight.numel() for weight in Tower(self._vision).parameters())
        total += text.vocab_size * h + h
        if not self._config.tie_word_embeddings:
            total += text.vocab_size * h
        for layer in range(text.num_hidden_layers):
            total += 2 * h
            if text.qwen4:
                total += 2 * (text.qwen4.mixer_weights(h) - h)
                total += 0 if text.is_linear(layer) else text.qwen4.indexer_weights(h)
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
        if text.mtp_num_hidden_layers:
            with torch.device("meta"):
                total += sum(weight.numel() for weight in MtpWeights(text).parameters())
        if text.qwen4:
            total += text.qwen4.mixer_weights(h, writes=False) - h + text.qwen4.ngram_weights(h)
        return total

    def tower_flop(self, rows: Sequence[int], grids: int, windows: int) -> float:
        """Return the number of vision tower operations for encoding a video.

        Args:
            rows: The number of rows computed by each layer for the entire video, followed by the number of rows entering the
                merger.
            grids: The number of frame pairs.
            windows: The number of attention windows per frame pair.
        """
        config = self._vision
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

    def prefill_flop(self, length: int | Sequence[int | Sequence[int]]) -> float:
        """Return the number of operations for prefill, with logits for only the last token.

        Args:
            length: The number of prompt tokens after pruning, either a single number or one entry per layer. An entry can also
                consist of three numbers: the number of tokens with keys and values, the number of tokens with queries and an
                attention output, and the number of tokens that go through the MLP.
        """
        config = self._text
        h = config.hidden_size
        lengths = _of_each_layer(length, config.num_hidden_layers)
        key_value, wide = (
            head_size(config) * heads for heads in (config.num_key_value_heads, config.num_attention_heads)
        )
        total = 2.0 * h * config.vocab_size
        gate = 2 * h * wide if config.output_gate else 0
        for layer, layer_length in enumerate(lengths):
            keys, queries, mlp = (layer_length,) * 3 if isinstance(layer_length, int) else layer_length
            if config.is_linear(layer):
                total += keys * self._delta_flop()
            else:
                total += 4 * h * (key_value * keys + wide * queries) + 2 * keys * queries * wide + gate * queries
            total += 6 * h * _mlp_size(config, layer) * mlp
            if config.has_experts(layer):
                gates = config.experts.num_experts + (config.experts.shared_expert_intermediate_size is not None)
                total += 2 * h * gates * mlp
        if config.qwen4:
            layers = config.num_hidden_layers
            attention = sum(not config.is_linear(layer) for layer in range(layers))
            total += config.qwen4.prefill_flop(h, layers, attention, keys)
        return total

    def _delta_flop(self) -> float:
        """Return the number of Gated DeltaNet operations per prompt token.

        This includes the projections, the convolution, and the chunked delta rule.
        """
        net = self._text.delta_net
        key = net.linear_key_head_dim
        value = net.linear_value_head_dim
        heads = net.linear_num_value_heads
        mixed = 2 * net.key_size + net.value_size
        projections = 2 * self._text.hidden_size * (mixed + 2 * net.value_size + 2 * heads)
        # Within each chunk, the keys are multiplied by the keys and by the queries, a triangular system is solved for keys and
        # values, and the queries read the values. The state is read twice (with the keys and the queries) and written once.
        inside = DELTA_CHUNK * (4 * key + (key + value) + 2 * value)
        return projections + 2 * net.linear_conv_kernel_dim * mixed + heads * (inside + 6 * key * value)

    def working_memory(
        self,
        units: int,
        piece_units: int,
        prompt: int | Sequence[int],
        bytes_each: int,
        rows: int | None = None,
        left: int | None = None,
        *,
        pair_means: bool = False,
        sets_aside: bool = False,
    ) -> int:
        """Estimate the peak memory of a run in bytes, excluding the weights.

        Args:
            units: The number of visual units in the video.
            piece_units: The number of units processed in a single matrix product.
            prompt: The number of prompt tokens, either a single number or one number per layer.
            bytes_each: The number of bytes per weight.
            rows: The maximum number of rows computed by any tower layer. None means one row per unit.
            left: The number of rows output by the tower. None means one row per unit.
            pair_means: Whether a selector computes the means of frame pairs.
            sets_aside: Whether rows are set aside in the tower, to return after its last layer.
        """
        piece_units = min(units, piece_units)
        vision = self._vision
        row_bytes = PATCHES * vision.hidden_size * bytes_each
        # Units are embedded piece by piece. Concatenating the pieces creates a copy, and selecting rows creates another copy.
        embedding = 2 * units * row_bytes + self._pixel_bytes(piece_units, bytes_each)
        if rows is None:
            rows = units
        if left is None:
            left = units
        layers = ROW_COPIES * rows * row_bytes + self._tower_bytes(piece_units, bytes_each)
        features = left * vision.out_hidden_size * vision.layers_read * bytes_each
        more = 0
        if pair_means:
            more = units * PATCHES * vision.hidden_size * 4  # computed in float32
        if sets_aside:
            # Include two more tensors per row: its earlier state, and its subsequent change in float32.
            more = 2 * units * PATCHES * vision.hidden_size * (bytes_each + 4)
        return SMALL_CHANGE + features + more + max(embedding, layers, self.language_bytes(prompt, bytes_each))

    def unpruned_memory(self, units: int, prompt: int, bytes_each: int) -> int:
        """Estimate the peak memory of plain transformers (without pruning) in bytes, excluding the weights.

        Args:
            units: The number of units in the video.
            prompt: The number of prompt tokens.
            bytes_each: The number of bytes per weight.
        """
        held = SMALL_CHANGE + self._pixel_bytes(units, bytes_each)
        return held + max(self._tower_bytes(units, bytes_each), self.language_bytes(prompt, bytes_each))

    def _pixel_bytes(self, units: int, bytes_each: int) -> int:
        """Return the number of bytes needed to store the pixels of `units` units in both float32 and the weight dtype."""
        vision = self._vision
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return units * PATCHES * values * (4 + bytes_each)

    def _tower_bytes(self, units: int, bytes_each: int) -> int:
        """Return the number of bytes needed for the vision tower to process `units` visual units.

        Most of this memory is used by the float32 rotary embedding and the MLP.
        """
        vision = self._vision
        return units * PATCHES * (12 * vision.hidden_size * 4 + 3 * vision.intermediate_size * bytes_each)

    def carried_bytes(self, places: int, bytes_each: int) -> int:
        """Return the size in bytes of the keys and values that the tower stores for later frame pairs.

        Each tower layer stores the keys and values of `places` units.
        """
        vision = self._vision
        return places * vision.depth * 2 * PATCHES * vision.hidden_size * bytes_each

    def conversation_bytes(self, rows: int, columns: int, bytes_each: int) -> int:
        """Return the number of bytes that encoded inputs and the KV cache take between questions.

        Args:
            rows: The number of rows that the inputs keep for later questions, tokens included.
            columns: The number of tokens in the KV cache.
            bytes_each: The number of bytes per value.
        """
        return rows * self._text.hidden_size * bytes_each + self.kv_bytes(columns, bytes_each)

    def kv_bytes(self, tokens: int | Sequence[int], bytes_each: int = 2) -> int:
        """Return the size of the language model's KV cache for a prompt, in bytes.

        Instead of keys and values, Gated DeltaNet layers store a float32 state whose size doesn't depend on the prompt.

        Args:
            tokens: The number of prompt tokens, either a single number or one number per layer.
            bytes_each: The number of bytes per value.
        """
        text = self._text
        depth = text.num_hidden_layers
        lengths = _of_each_layer(tokens, depth)
        net = getattr(text, "delta_net", None)  # transformers configs lack this attribute
        linear = [net is not None and text.is_linear(layer) for layer in range(depth)]
        of_token = 2 * text.num_key_value_heads * head_size(text) * bytes_each
        total = of_token * sum(length for length, is_linear in zip(lengths, linear, strict=True) if not is_linear)
        if net:
            state = net.value_size * net.linear_key_head_dim * 4
            seen = (2 * net.key_size + net.value_size) * net.linear_conv_kernel_dim * bytes_each
            total += sum(linear) * (state + seen)
            if text.qwen4:
                columns = sum(length for length, is_linear in zip(lengths, linear, strict=True) if not is_linear)
                total += text.qwen4.state_bytes(text.hidden_size, columns, bytes_each)
        return total

    def language_bytes(self, prompt: int | Sequence[int], bytes_each: int) -> int:
        """Return the number of bytes needed for the language model to read a prompt, including the KV cache.

        Args:
            prompt: The number of prompt tokens, either a single number or one number per layer.
            bytes_each: The number of bytes per value.
        """
        text = self._text
        lengths = _of_each_layer(prompt, text.num_hidden_layers)
        added = self._vision.layers_read - 1  # number of layers to which DeepStack adds features
        inner = max(_mlp_size(text, layer) for layer in range(text.num_hidden_layers))
        wide = 8 * 4 * text.hidden_size * (text.qwen4.hc_count if text.qwen4 else 1)
        if net := text.delta_net:  # chunks are float32, with a copy of the keys for each value head
            heads = net.linear_num_value_heads
            key = net.linear_key_head_dim
            value = net.linear_value_head_dim
            wide = max(wide, heads * (6 * key + 6 * value + 3 * DELTA_CHUNK) * 4)
        widest = max(lengths) * (wide + added * bytes_each * text.hidden_size + 3 * inner * bytes_each)
        held = [tokens + ANSWER_COLUMNS for tokens in lengths]
        # A recurrent state cannot be cropped, so a copy is kept for the next question.
        copies = 2 if text.delta_net else 1
        return widest + copies * self.kv_bytes(held, bytes_each)


def _of_each_layer(tokens: int | Sequence[T], depth: int) -> Sequence[int | T]:
    """Return the number of tokens in each layer. A single number is repeated for all `depth` layers."""
    return [tokens] * depth if isinstance(tokens, int) else tokens


def _mlp_size(config: TextConfig, layer: int) -> int:
    """Return the number of inner features a layer computes per token, either in its MLP or in all of the token's experts."""
    if not config.has_experts(layer):
        return config.intermediate_size
    experts = config.experts
    shared = experts.shared_expert_intermediate_size or 0
    return experts.num_experts_per_tok * experts.moe_intermediate_size + shared


@without_autocast()
def matmul_rate(
    dtype: torch.dtype,
    device: str = "cpu",
    seconds: float = 0.1,
    shapes: Sequence[tuple[int, int, int]] = ((1024, 1024, 1024),),
) -> float:
    """Measure the speed of plain matrix products on a device, in operations per second.

    Args:
        dtype: The dtype of the factors.
        device: The device name.
        seconds: How long to measure each shape, in seconds.
        shapes: The shapes to try, as (rows, inner, columns). The result is the speed of the fastest shape.
    """
    best = 0.0
    clock = Device(device)
    for rows, inner, columns in shapes:
        a, b = (torch.randn(x, dtype=dtype, device=device) for x in ((rows, inner), (inner, columns)))
        a @ b
        end = clock.now() + seconds
        while (start := clock.now()) < end:
            a @ b
            best = max(best, 2 * rows * inner * columns / (clock.now() - start))
    return best

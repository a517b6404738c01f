"""Settings and sizes of the layers that Qwen4-Exp (Qwen3.8-Flash-Next) adds to the Qwen3.5 language model.

- Hyper-connections: The model has multiple residual streams. Each layer reads a mix of the streams and writes to all of them.
- Indexers: Each attention layer has an indexer, which selects the key blocks that a column attends to.
- N-gram embeddings (PLE): Some layers add embeddings of token ID n-grams, so the model requires token IDs, not just embeddings.
"""

from dataclasses import dataclass
from itertools import count, islice
from typing import Annotated

from evoprune.untrusted import TEXT, Rule

SIZE = Rule.whole(1, 2**22)
Size = Annotated[int, SIZE]
SMALL = Rule.whole(1, 1000)
Small = Annotated[int, SMALL]
# Values in `layer_types` for attention layers with an indexer. Published files use "full_attention" instead.
INDEXED = ("indexed_attention", "qwen_sparse_attention")
DEFAULTS = {
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "hc_count": 4,
    "hc_lowrank": 320,
    "ple_layer_ids": (),
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 512,
    "seed": 1234,
}


@dataclass(frozen=True)
class Qwen4:
    """The settings that Qwen4-Exp adds to Qwen3.5, using the same names as in `config.json`."""

    hc_count: Small  # number of residual streams
    hc_lowrank: Size  # rank of the matrices that mix the streams
    indexer_n_heads: Small
    indexer_kv_heads: Small
    indexer_head_dim: Size
    indexer_budget: Size  # maximum number of columns, in whole blocks, read by an attention layer
    indexer_compress_ratio: Small  # number of columns per block
    ple_layer_ids: Annotated[tuple[int, ...], Rule.list_of(SMALL)]  # one-based indices of layers with n-gram embeddings
    ple_embed_dim: Size
    ple_conv_kernel_size: Small
    ngram_size: Annotated[int, Rule.whole(2, 16)]
    heads_per_ngram: Small
    ngram_vocab_size_base: Annotated[int, Rule.whole(1, 2**27)]
    make_ngram_vocab_size_divisible_by: Annotated[int, Rule.whole(1, 2**20)]
    split_ngram_parts: Annotated[int, Rule.whole(1, 2**16)]  # number of tensors per table in the weight files
    seed: Annotated[int, Rule.whole(0, 2**62)]
    output_gate_type: Annotated[str | None, TEXT] = None  # activation in Gated DeltaNets; None means same as in MLPs

    def problem(self, linear: list[bool], turned: int) -> str | None:
        """Return the reason why transformers cannot build a model with these settings, or None if it can.

        Args:
            linear: Whether each layer is a Gated DeltaNet.
            turned: The number of features per attention head rotated by the rotary embedding.
        """
        layers = [number - 1 for number in self.ple_layer_ids]
        tables = (self.ngram_size - 1) * self.heads_per_ngram
        checks = {
            "hc_count is 1": self.hc_count > 1,
            f"indexer_kv_heads is {self.indexer_kv_heads}, not 1": self.indexer_kv_heads == 1,
            "indexer_compress_ratio does not divide indexer_budget": self.indexer_budget % self.indexer_compress_ratio
            == 0,
            f"indexer_head_dim is less than {turned}": turned <= self.indexer_head_dim,
            "ple_layer_ids names a layer without linear attention": all(
                layer < len(linear) and linear[layer] for layer in layers
            ),
            "ple_embed_dim is not a multiple of the n-gram heads": not layers or self.ple_embed_dim % tables == 0,
            f"output_gate_type is {self.output_gate_type!r}": self.output_gate_type in (None, "sigmoid", "silu"),
        }
        return next((problem for problem, holds in checks.items() if not holds), None)

    def mixer_weights(self, hidden: int, writes: bool = True) -> int:
        """Return the number of weights in a single hyper-connection.

        Args:
            hidden: The language model's hidden size.
            writes: Whether the hyper-connection writes to the residual streams. This is False only for the last hyper-connection.
        """
        wide = self.hc_count * hidden
        return wide * (1 + 2 * self.hc_lowrank + writes * self.hc_count)

    def indexer_weights(self, hidden: int) -> int:
        heads = self.indexer_n_heads + self.indexer_kv_heads
        return self.indexer_head_dim * (hidden * heads + 2)

    def ngram_weights(self, hidden: int) -> int:
        """Return the number of weights in the n-gram embeddings of all layers, including their tables."""
        tables = (self.ngram_size - 1) * self.heads_per_ngram
        wide = self.hc_count * hidden
        sizes = islice(filter(_is_prime, count(self.ngram_vocab_size_base)), tables * len({*self.ple_layer_ids}))
        total = 0
        for _ in {*self.ple_layer_ids}:
            rows = -sum(islice(sizes, tables)) // self.make_ngram_vocab_size_divisible_by
            total -= rows * self.make_ngram_vocab_size_divisible_by * (self.ple_embed_dim // tables)
            total += self.ple_embed_dim * (wide + hidden) + wide * (3 + self.ple_conv_kernel_size)
        return total

    def prefill_flop(self, hidden: int, layers: int, attention_layers: int, length: int) -> float:
        """Return the number of operations in Qwen4-Exp's additional layers for a prompt of `length` tokens."""
        wide = self.hc_count * hidden
        mixed = 2 * layers * (self.mixer_weights(hidden) - wide) + self.mixer_weights(hidden, writes=False) - wide
        embedded = len({*self.ple_layer_ids}) * (
            self.ple_embed_dim * (wide + hidden) + wide * self.ple_conv_kernel_size
        )
        scores = length / 2 / self.indexer_compress_ratio * self.indexer_n_heads * self.indexer_head_dim
        indexed = attention_layers * (self.indexer_weights(hidden) - 2 * self.indexer_head_dim + scores)
        return 2.0 * length * (mixed + embedded + indexed)

    def state_bytes(self, hidden: int, columns: int, bytes_each: int) -> int:
        """Return the size of the indexer keys and the n-gram embedding state, in bytes.

        `columns` is the total number of columns in all layers' indexers.
        """
        keys = columns * self.indexer_kv_heads * self.indexer_head_dim * bytes_each
        seen = self.hc_count * hidden * (self.ple_conv_kernel_size - 1) * self.ngram_size * bytes_each
        return keys + len({*self.ple_layer_ids}) * (seen + (self.ngram_size - 1) * 8)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))

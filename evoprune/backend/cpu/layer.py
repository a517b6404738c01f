"""A decoder layer with quantized weights, which `layer.c` computes if it was compiled when evoprune was installed."""

import weakref
from ctypes import Structure, byref, c_float, c_int64, c_void_p
from operator import is_not
from typing import Self

import torch
from torch import nn

from evoprune.backend.cpu import four_bits
from evoprune.backend.cpu.compiled import Linear, library, working_memory


class _Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("before", "after", "q_norm", "k_norm")),
        ("dim", c_int64),
        ("eps", c_float),
    )


class CompiledLayer:
    """A decoder layer of Qwen2, Qwen2.5, or Qwen3, as two calls of `layer.c`.

    Use `CompiledLayer.of` to create one.
    """

    def __init__(self, linears: list[nn.Module], norms: list[torch.Tensor | None], dim: int, eps: float):
        self.linears = linears
        self._norms = [norm if norm is None else norm.float() for norm in norms]  # the structure holds only addresses
        addresses = (norm if norm is None else norm.data_ptr() for norm in self._norms)
        self._structure = byref(_Layer(*(each.structure() for each in linears), *addresses, dim, eps))
        self._dim = dim
        q, k, _, o, gate, _, _ = linears
        self._queries = q.out_features
        longest = max(each.in_features for each in linears)
        # Working memory for each row: the normalized input, and either the queries, keys, and values, or the two halves of the MLP
        wide = max(q.out_features + 2 * k.out_features, 2 * gate.out_features)
        floats = max(q.in_features, o.out_features) + wide
        self._room_bytes = 4 * floats + four_bits.room_bytes(longest)

    @classmethod
    def of(cls, layer: nn.Module, config) -> Self | None:
        """Return a layer's compiled form, or None if it has none.

        Args:
            layer: The layer module. Its norms must not be replaced later.
            config: The language model config.
        """
        if library() is None:
            return None
        attention = layer.self_attn
        linears = [attention._modules[f"{name}_proj"] for name in "qkvo"]
        linears += [layer.mlp._modules[f"{name}_proj"] for name in ("gate", "up", "down")]
        for each in linears:
            if not hasattr(each, "structure") or each._forward_hooks or each._forward_pre_hooks:
                return None
        made = _known.get(layer)
        if made is None or any(map(is_not, linears, made.linears)):
            made = _known[layer] = cls._made(layer, linears, config)
        return made

    @classmethod
    def _made(cls, layer: nn.Module, linears: list[nn.Module], config) -> Self | None:
        attention = layer.self_attn
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        weights = [None if norm is None else norm.weight.detach() for norm in norms]
        dim = attention.q_proj.out_features // config.num_attention_heads
        if dim % 8 or norms[0].weight.dtype not in (torch.float32, torch.bfloat16):
            return None
        return cls(linears, weights, dim, config.rms_norm_eps)

    def before_attention(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Compute the queries, and write the keys and values of new columns.

        Args:
            x: The layer's input, float32 `[L, hidden]`.
            cos, sin: The cosines and sines from `rotation` in language/decoder.py, float32.
            keys, values: The places of the new columns in the KV cache, float32 or bf16 `[kv_heads, L, head_dim]`, with equal
                strides.

        Returns:
            The queries, `[1, L, heads, head_dim]`, in the dtype of the cache.
        """
        rows = len(x)
        queries = torch.empty(1, rows, self._queries // self._dim, self._dim, dtype=keys.dtype, device="cpu")
        room = working_memory(rows, self._room_bytes)
        pointers = (tensor.data_ptr() for tensor in (x, cos, sin, queries, keys, values, room))
        sizes = rows, keys.stride(0), keys.dtype == torch.bfloat16
        library().evoprune_before_attention(self._structure, *pointers, *sizes, torch.get_num_threads())
        return queries

    def after_attention(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, float32 `[L, hidden]`.

        Args:
            x: The layer's input, float32 `[L, hidden]`.
            seen: The result of the attention, `[L, heads * head_dim]`.
        """
        rows = len(x)
        y = torch.empty_like(x)
        seen = seen.float().contiguous()
        room = working_memory(rows, self._room_bytes)
        pointers = (tensor.data_ptr() for tensor in (x, seen, y, room))
        library().evoprune_after_attention(self._structure, *pointers, rows, torch.get_num_threads())
        return y


_known: weakref.WeakKeyDictionary[nn.Module, CompiledLayer] = weakref.WeakKeyDictionary()

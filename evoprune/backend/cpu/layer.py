"""A decoder layer with quantized weights, which the compiled library computes."""

import weakref
from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p
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


class _Columns(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("heads", "count", "stride")),
        ("bf16", c_int),
    )


class CompiledLayer:
    """A decoder layer of Qwen2, Qwen2.5, or Qwen3, as one call of `layer.c`.

    Use `CompiledLayer.of` to create one.
    """

    def __init__(self, linears: list[nn.Module], norms: list[torch.Tensor | None], dim: int, eps: float):
        self.linears = linears
        self._norms = [norm if norm is None else norm.float() for norm in norms]  # the structure holds only addresses
        addresses = (norm if norm is None else norm.data_ptr() for norm in self._norms)
        self._structure = byref(_Layer(*(each.structure() for each in linears), *addresses, dim, eps))
        q, k, _, _, gate, _, _ = linears
        self._heads = q.out_features // dim
        # Working memory for each row, not counting the scores: the normalized input, queries, keys, values, the attention's result,
        # the two halves of the MLP, and the working memory of a linear layer
        floats = q.in_features + 2 * q.out_features + 2 * k.out_features + 2 * gate.out_features
        self._room_bytes = 4 * floats + four_bits.room_bytes(max(each.in_features for each in linears))

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

    def __call__(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the layer's output for new columns, and write their keys and values.

        Args:
            x: The layer's input, float32 `[L, hidden]`.
            cos, sin: The cosines and sines from `rotation` in language/decoder.py, float32.
            keys, values: All columns in the KV cache, float32 or bf16 `[1, kv_heads, n, head_dim]`, with equal strides. The last L
                columns are the new ones.
            bias: float32 `[n]`, the bias to add to each key's attention scores.

        Returns:
            float32 `[L, hidden]`.
        """
        rows = len(x)
        x = x.contiguous()
        y = torch.empty_like(x)
        _, kv_heads, count, _ = keys.shape
        cache = _Columns(
            keys.data_ptr(), values.data_ptr(), kv_heads, count, keys.stride(1), keys.dtype == torch.bfloat16
        )
        room = working_memory(rows, self._room_bytes + 4 * self._heads * count)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (bias, y, room)]
        given = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), byref(cache), *pointers)
        library().evoprune_layer(self._structure, *given, rows, torch.get_num_threads())
        return y


_known: weakref.WeakKeyDictionary[nn.Module, CompiledLayer] = weakref.WeakKeyDictionary()

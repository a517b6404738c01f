"""A decoder layer with quantized weights, which the compiled library computes."""

import weakref
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int, c_int64, c_void_p
from operator import is_not
from typing import ClassVar, Self

import torch
from torch import nn

from evoprune.backend.cpu import four_bits
from evoprune.backend.cpu.compiled import Linear, library, working_memory
from evoprune.backend.layers import is_unhooked_linear

DTYPES = torch.float32, torch.bfloat16
MLP = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"


class _Layer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("before", "after", "q_norm", "k_norm")),
        *((name, c_int64) for name in ("dim", "rotated")),
        ("gated", c_int),
        ("eps", c_float),
    )


class _DeltaLayer(Structure):
    _fields_ = (
        *((name, Linear) for name in ("qkv", "z", "out", "gate", "up", "down")),
        *((name, c_void_p) for name in ("before", "after", "a", "b", "rate", "offset", "scale", "conv")),
        *((name, c_int64) for name in ("kernel", "key_heads", "heads", "key_dim", "value_dim")),
        ("eps", c_float),
    )


class _Columns(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("heads", "count", "stride")),
        ("bf16", c_int),
    )


class CompiledLayer:
    """A decoder layer of Qwen2, Qwen2.5, Qwen3, or Qwen3.5, as one call of `layer.c`. See the subclasses.

    Use `CompiledLayer.of` to create one.

    Args:
        linears: The layer's quantized linear layers, in the order of the C structure. If the layer has experts instead of an MLP,
            these are only the linear layers before them, and the caller has to run the experts (see `has_mlp`).
        vectors: The other tensors, in the same order. The C structure holds only their addresses.
        floats: Size of the working memory for each row, in floats, not counting the MLP and a linear layer's working memory.
    """

    PATHS: ClassVar[tuple[str, ...]]  # the linear layers before the MLP

    def __init__(self, linears: list[nn.Module], vectors: Sequence[torch.Tensor | None], floats: int):
        self.linears = linears
        self._vectors = [each if each is None else each.detach().float().contiguous() for each in vectors]
        self._floats = floats
        self._mlp_floats = 0
        self.has_mlp = len(linears) > len(self.PATHS)
        if self.has_mlp:
            gate = linears[-3]
            self._mlp_floats = gate.in_features + 2 * gate.out_features
        self._rest_bytes = four_bits.room_bytes(max(each.in_features for each in linears))

    @classmethod
    def of(cls, layer: nn.Module, config) -> "CompiledAttention | CompiledDelta | None":
        """Return a layer's compiled form, or None if it has none.

        Args:
            layer: The layer module. Its norms and other vectors must not be replaced later.
            config: The language model config.
        """
        if library() is None:
            return None
        form = CompiledDelta if hasattr(layer, "linear_attn") else CompiledAttention
        experts = getattr(layer.mlp, "experts", None)
        inner = MLP if experts is None else ()
        linears = [layer.get_submodule(path) for path in (*form.PATHS, *inner)]
        if experts is not None and not getattr(experts, "is_compiled", False):
            return None
        for each in linears:
            if not hasattr(each, "structure") or each._forward_hooks or each._forward_pre_hooks:
                return None
        made = _known.get(layer)
        if made is None or any(map(is_not, linears, made.linears)):
            made = _known[layer] = form.made(layer, linears, config)
        return made

    def _addresses(self) -> list[object]:
        return [
            *(each.structure() for each in self.linears),
            *(Linear() for _ in MLP if not self.has_mlp),  # an MLP without features adds nothing
            *(each if each is None else each.data_ptr() for each in self._vectors),
        ]

    def _room(self, rows: int, more: int = 0) -> torch.Tensor:
        floats = max(self._floats + more, self._mlp_floats)
        return working_memory(rows, 4 * floats + self._rest_bytes)


def _norms(layer: nn.Module, config) -> list[torch.Tensor]:
    """Return the weights of a layer's norms, which apply to the hidden states."""
    return [_gain(norm, config) for norm in (layer.input_layernorm, layer.post_attention_layernorm)]


def _gain(norm: nn.Module, config) -> torch.Tensor:
    weight = norm.weight.float()
    return weight if getattr(config, "delta_net", None) is None else weight + 1


class CompiledAttention(CompiledLayer):
    """A decoder layer with attention."""

    PATHS = tuple(f"self_attn.{name}_proj" for name in "qkvo")

    def __init__(self, linears: list[nn.Module], norms: list[torch.Tensor | None], dim: int, rotated: int, eps: float):
        q, k, _, o, *_ = linears
        gated = q.out_features > o.in_features
        floats = q.in_features + q.out_features + (1 + gated) * o.in_features + 2 * k.out_features
        super().__init__(linears, norms, floats)
        self._structure = byref(_Layer(*self._addresses(), dim, rotated, gated, eps))
        self._heads = o.in_features // dim

    @classmethod
    def made(cls, layer: nn.Module, linears: list[nn.Module], config) -> Self | None:
        attention = layer.self_attn
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        dim = attention.o_proj.in_features // config.num_attention_heads
        if dim % 8 or layer.input_layernorm.weight.dtype not in DTYPES:
            return None
        gains = [*_norms(layer, config), *(norm and _gain(norm, config) for norm in norms)]
        rotated = 2 * sum(config.rope_parameters["mrope_section"])
        return cls(linears, gains, dim, rotated, config.rms_norm_eps)

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
        room = self._room(rows, self._heads * count)
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in (bias, y, room)]
        given = (x.data_ptr(), cos.data_ptr(), sin.data_ptr(), byref(cache), *pointers)
        library().evoprune_layer(self._structure, *given, rows, torch.get_num_threads())
        return y


class CompiledDelta(CompiledLayer):
    """A decoder layer with a Gated DeltaNet."""

    PATHS = tuple(f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "out_proj"))

    def __init__(self, linears: list[nn.Module], vectors: list[torch.Tensor], net, eps: float):
        qkv, *_ = linears
        heads = net.linear_num_value_heads
        # The room for the heads doesn't depend on the number of rows.
        floats = qkv.in_features + net.channels + 2 * net.value_size + 2 * heads * net.linear_key_head_dim
        super().__init__(linears, vectors, floats)
        sizes = net.linear_conv_kernel_dim, net.linear_num_key_heads, heads, net.linear_key_head_dim
        self._structure = byref(_DeltaLayer(*self._addresses(), *sizes, net.linear_value_head_dim, eps))

    @classmethod
    def made(cls, layer: nn.Module, linears: list[nn.Module], config) -> Self | None:
        net = config.delta_net
        delta = layer.linear_attn
        gates = [delta.in_proj_a, delta.in_proj_b]
        if net.linear_key_head_dim % 8 or net.linear_value_head_dim % 8 or delta.norm.weight.dtype not in DTYPES:
            return None
        if not all(map(is_unhooked_linear, gates)):
            return None
        vectors = [gate.weight for gate in gates]
        vectors += [-delta.A_log.float().exp(), delta.dt_bias, delta.norm.weight, delta.conv1d.weight[:, 0].T]
        return cls(linears, [*_norms(layer, config), *vectors], net, config.rms_norm_eps)

    def __call__(
        self, x: torch.Tensor, inputs: torch.Tensor, recurrent: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the layer's output for new columns.

        Args:
            x: The layer's input, float32 `[L, hidden]`.
            inputs: The last inputs of the convolution, `[kernel - 1, channels]`.
            recurrent: The recurrent state, float32 `[value_heads, key_dim, value_dim]`.

        Returns:
            The layer's output, float32 `[L, hidden]`; the last and the new inputs of the convolution, float32 `[kernel - 1 + L,
            channels]`; and the recurrent state after each column, float32 `[L, value_heads, key_dim, value_dim]`.
        """
        rows = len(x)
        x = x.contiguous()
        y = torch.empty_like(x)
        known = len(inputs)
        every = torch.empty(known + rows, inputs.shape[1], dtype=torch.float32, device="cpu")
        every[:known] = inputs
        after = torch.empty(rows, *recurrent.shape, dtype=torch.float32, device="cpu")
        tensors = x, every, recurrent.contiguous(), after, y, self._room(rows)
        library().evoprune_delta_layer(
            self._structure, *(tensor.data_ptr() for tensor in tensors), rows, torch.get_num_threads()
        )
        return y, every, after


_known: weakref.WeakKeyDictionary[nn.Module, CompiledAttention | CompiledDelta | None] = weakref.WeakKeyDictionary()

"""Read the tensors of GGUF files under their Hugging Face names, one at a time, like a safetensors file.

llama.cpp's and Ollama's converters rename tensors, split and join them, and reorder some of them. This module undoes it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Self

import torch

from evoprune.backend import Device
from evoprune.files import FileIdentity
from evoprune.session.gguf.blocks import PLAIN, dequantize
from evoprune.session.gguf.files import reported, settings_of
from evoprune.session.gguf.folder import gguf_files, gguf_title
from evoprune.session.gguf.reader import TensorInfo
from evoprune.session.gguf.settings import LAYER, GgufSettings
from evoprune.untrusted import YES_OR_NO

Change = Callable[..., torch.Tensor]  # computes a tensor from the tensors in the file
Entry = tuple[str, Change, list[str]]  # a tensor's name, how to compute it, and the names in the file

ROWS = 512  # number of rows of embeddings to dequantize at a time
VISUAL = "model.visual."
TEXT = {
    "token_embd.weight": "model.language_model.embed_tokens.weight",
    "output_norm.weight": "model.language_model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Names inside a layer of the language model. The norms are stored as their difference from 1 in some families.
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
# Names inside the layer for multi-token prediction, in addition to those of an attention layer.
MTP = {
    "nextn.eh_proj": "fc",
    "nextn.enorm": "pre_fc_norm_embedding",
    "nextn.hnorm": "pre_fc_norm_hidden",
    "nextn.shared_head_norm": "norm",
}
# Names inside a layer of the tower; llama.cpp's first, then Ollama's.
BLOCK = {
    "attn_qkv": "attn.qkv", "attn_out": "attn.proj", "ln1": "norm1", "ln2": "norm2",
    "norm1": "norm1", "norm2": "norm2", "mlp.linear_fc1": "mlp.linear_fc1", "mlp.linear_fc2": "mlp.linear_fc2",
}  # fmt: skip
# Positions of the merger's layers in `Family.merger`.
MERGER = {"v.post_ln": 0, "mm.0": 1, "mm.2": 2}
SINGLE = {
    "v.patch_embd.bias": "patch_embed.proj.bias", "v.patch_embed.bias": "patch_embed.proj.bias",
    "v.position_embd.weight": "pos_embed.weight", "v.pos_embed.weight": "pos_embed.weight",
}  # fmt: skip
# Pairs of tensors that contain the weights of the two frames of a frame pair.
PATCHES = {"v.patch_embd.weight": "v.patch_embd.weight.1", "v.patch_embd_0.weight": "v.patch_embd_1.weight"}


class GgufSlice:
    """A tensor that is read when it is indexed with `[...]`, like a slice of a safetensors file."""

    def __init__(self, tensors: "GgufTensors", name: str):
        self._tensors = tensors
        self._name = name

    def get_dtype(self) -> str:
        """Return the safetensors name of the stored dtype. Quantized tensors count as float16."""
        _, sources = self._tensors.entries[self._name]
        kind = self._tensors.infos[sources[0]].kind.name
        return kind if kind in PLAIN else "F16"

    @property
    def shape(self) -> torch.Size:
        return self._tensors.placeholder(self._name).shape

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def split(self, rows: int) -> Iterator[torch.Tensor]:
        """Yield the rows of a matrix, a few at a time. If the file contains the whole matrix, no others are dequantized.

        Args:
            rows: Maximum number of rows at a time.
        """
        change, sources = self._tensors.entries[self._name]
        info = self._tensors.infos[sources[0]]
        if change is not _same or info.kind.name in PLAIN:
            yield from self[:].split(rows)
            return
        for data in self._tensors.blocks(info).split(rows * info.size // info.shape[0]):
            yield dequantize(data, info.kind).view(-1, info.shape[1])

    def __getitem__(self, index: object) -> torch.Tensor:
        return self._tensors.get_tensor(self._name)[index]


class GgufTensors:
    """The tensors of a model, with the methods of an opened safetensors file.

    Raises:
        ValueError: If a tensor has an unknown name, or the shapes of tensors do not fit together.
    """

    def __init__(self, settings: GgufSettings):
        self.infos = settings.tensors
        self.entries: dict[str, tuple[Change, list[str]]] = {}
        self.unmap()
        names = _Names(settings)
        for name in self.infos:
            for known, change, sources in names.entries(name):
                if known in self.entries or not self.infos.keys() >= {*sources}:
                    raise ValueError(f"the tensors for {known} are missing or stored twice")
                self.entries[known] = change, sources
        for known in self.entries:
            self.placeholder(known)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        self.unmap()

    def unmap(self) -> None:
        """Close the memory-mapped files. They are mapped again when the next tensor is read."""
        self._files: dict[Path, torch.Tensor] = {}

    def keys(self) -> list[str]:
        return list(self.entries)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU. It is memory-mapped if it is stored unchanged, and float32 if it is quantized."""
        change, sources = self.entries[name]
        return change(*map(self._values, sources))

    def get_slice(self, name: str) -> GgufSlice:
        return GgufSlice(self, name)

    def placeholder(self, name: str) -> torch.Tensor:
        """Return a tensor with the right shape on the meta device.

        Raises:
            ValueError: If the shapes of the stored tensors do not fit together.
        """
        change, sources = self.entries[name]
        try:
            return change(
                *(torch.empty(self.infos[each].shape, dtype=torch.float32, device="meta") for each in sources)
            )
        except (RuntimeError, IndexError) as problem:
            shapes = ", ".join(str(list(self.infos[each].shape)) for each in sources)
            raise ValueError(f"the shape of the tensor {sources[0]} is invalid: {shapes}") from problem

    def compact(self, name: str) -> torch.Tensor:
        """Return a matrix like `get_tensor`, but float16 if it is quantized."""
        _, sources = self.entries[name]
        if self.infos[sources[0]].kind.name in PLAIN:
            return self.get_tensor(name)
        made = torch.empty(self.placeholder(name).shape, dtype=torch.float16, device="cpu")
        for place, rows in zip(made.split(ROWS), self.get_slice(name).split(ROWS), strict=True):
            place.copy_(rows)
        return made

    def _values(self, name: str) -> torch.Tensor:
        info: TensorInfo = self.infos[name]
        data = self.blocks(info)
        if (dtype := PLAIN.get(info.kind.name)) is not None:
            return data.view(dtype).view(info.shape)
        return dequantize(data, info.kind).view(info.shape)

    def blocks(self, info: TensorInfo) -> torch.Tensor:
        """Return the memory-mapped bytes of a tensor in a file, uint8 `[bytes]`."""
        if info.file not in self._files:
            size = info.file.stat().st_size
            self._files[info.file] = torch.from_file(str(info.file), size=size, dtype=torch.uint8, device="cpu")
        return self._files[info.file][info.offset : info.offset + info.size]


class _Names:
    """Translates the names of tensors in GGUF files to Hugging Face names."""

    def __init__(self, settings: GgufSettings):
        self._settings = settings
        self._traits = settings.traits
        self._norm = _minus_one if "full_attention_interval" in settings.traits.text else _same

    def entries(self, name: str) -> Iterator[Entry]:
        """Yield the tensors to compute from a tensor in the file, and from others whose names follow from its name.

        Raises:
            ValueError: If the name is unknown.
        """
        if name.startswith("mtp."):  # Ollama's tensors for multi-token prediction, which are not used
            return
        if name in TEXT:
            yield TEXT[name], self._norm if name == "output_norm.weight" else _same, [name]
        elif layer := LAYER.fullmatch(name):
            number = int(layer[1])
            base, _, part = layer[2].rpartition(".")
            if number < self._settings.depth:
                for known, change, sources in self._in_layer(number, layer[2], name):
                    yield f"model.language_model.layers.{number}.{known}", change, sources
            elif number > self._settings.depth:  # only the first layer for multi-token prediction is used
                return
            elif base in MTP:
                yield f"mtp.{MTP[base]}.{part}", self._norm if base.endswith("norm") else _same, [name]
            elif not base.startswith("nextn."):
                for known, change, sources in self._in_layer(number, layer[2], name):
                    yield f"mtp.layers.0.{known}", change, sources
        else:
            for known, change, sources in self._in_tower(name):
                yield VISUAL + known, change, sources

    def _in_layer(self, layer: int, name: str, full: str) -> Iterator[Entry]:
        base, _, part = name.rpartition(".")
        others = partial("blk.{}.{}".format, layer)
        if base in NORMS:
            yield f"{NORMS[base]}.{part}", self._norm, [full]
        elif layer < self._settings.depth and self._settings.linear[layer] and (found := self._delta_net(name)):
            yield from ((f"linear_attn.{known}", change, [full]) for known, change in found)
        elif base in LINEAR:
            yield f"{LINEAR[base]}.{part}", _same, [full]
        elif name == "ffn_gate_inp_shexp.weight":
            yield "mlp.shared_expert_gate.weight", lambda x: x.reshape(1, -1), [full]
        elif name in ("ffn_gate_exps.weight", "ffn_gate_up_exps.weight"):
            sources = [full] if "_up_" in name else [full, others("ffn_up_exps.weight")]
            yield "mlp.experts.gate_up_proj", lambda *x: self._experts(_cat(x, 1)), sources
        elif name == "ffn_down_exps.weight":
            yield "mlp.experts.down_proj", self._experts, [full]
        elif name != "ffn_up_exps.weight":
            raise ValueError(f"the tensor {full[:80]} is unknown")

    def _experts(self, x: torch.Tensor) -> torch.Tensor:
        # Checkpoints of the older family, which has no shared expert, contain transposed matrices.
        return x if "shared_expert_intermediate_size" in self._traits.text else x.transpose(1, 2)

    def _delta_net(self, name: str) -> list[tuple[str, Change]]:
        settings = self._settings
        keys, values = settings.text("ssm.group_count"), settings.text("ssm.time_step_rank")
        size = settings.text("ssm.inner_size") // values
        start = 2 * keys * settings.text("ssm.state_size")
        tiled = keys != values and settings.text("ssm.v_head_reordered", YES_OR_NO, True)

        def grouped(x: torch.Tensor, dim: int = 0, size: int = 1, start: int = 0) -> torch.Tensor:
            """Return the value heads along `dim`, after position `start`, grouped by key head instead of tiled."""
            if not tiled:
                return x
            first, heads = x.split([start, x.shape[dim] - start], dim)
            shape = heads.shape
            heads = heads.unflatten(dim, (values // keys, keys, size)).transpose(dim, dim + 1).reshape(shape)
            return _cat([first, heads], dim) if start else heads

        def of_key_heads(x: torch.Tensor, which: int) -> torch.Tensor:
            return x.unflatten(0, (keys, 2, values // keys))[:, which].flatten(0, 1)

        rows = partial(grouped, size=size)
        return {
            "attn_qkv.weight": [("in_proj_qkv.weight", partial(rows, start=start))],
            "attn_gate.weight": [("in_proj_z.weight", rows)],
            "ssm_alpha.weight": [("in_proj_a.weight", grouped)],
            "ssm_beta.weight": [("in_proj_b.weight", grouped)],
            # The two previous ones in a single matrix, for each key head
            "ssm_ba.weight": [
                ("in_proj_b.weight", partial(of_key_heads, which=0)),
                ("in_proj_a.weight", partial(of_key_heads, which=1)),
            ],
            "ssm_a": [("A_log", lambda x: grouped(torch.log(-x.float()) if _has_values(x) else x))],
            "ssm_dt.bias": [("dt_bias", grouped)],
            "ssm_dt": [("dt_bias", grouped)],
            "ssm_conv1d.weight": [("conv1d.weight", lambda x: rows(x.flatten(0, -2), start=start)[:, None])],
            "ssm_norm.weight": [("norm.weight", _same)],
            "ssm_out.weight": [("out_proj.weight", partial(rows, dim=1))],
        }.get(name, [])

    def _in_tower(self, name: str) -> Iterator[Entry]:
        traits = self._traits
        base, _, part = name.rpartition(".")
        if name in PATCHES:
            yield (
                "patch_embed.proj.weight",
                lambda *x: _cat([each.unsqueeze(2) for each in x], 2),
                [name, PATCHES[name]],
            )
        elif name == "v.patch_embed.weight":  # Ollama joins the input and output channels
            yield "patch_embed.proj.weight", lambda x: x.unflatten(0, (-1, 3)), [name]
        elif name in SINGLE:
            yield SINGLE[name], _same, [name]
        elif base in MERGER:
            yield f"merger.{traits.merger[MERGER[base]]}.{part}", _same, [name]
        elif base.removeprefix("v.merger.") in traits.merger:
            yield name.removeprefix("v."), _same, [name]
        elif block := re.fullmatch(r"v\.blk\.(\d+)\.(.+)", base):
            prefix = f"blocks.{block[1]}."
            if block[2] == "attn_q":
                yield (
                    f"{prefix}attn.qkv.{part}",
                    lambda *x: _cat(x, 0),
                    [f"v.blk.{block[1]}.attn_{each}.{part}" for each in "qkv"],
                )
            elif block[2] in self._block:
                yield f"{prefix}{self._block[block[2]]}.{part}", _same, [name]
            elif block[2] not in ("attn_k", "attn_v"):
                raise ValueError(f"the tensor {name[:80]} is unknown")
        elif name not in PATCHES.values():
            yield self._in_deepstack(name), _same, [name]

    @cached_property
    def _block(self) -> dict[str, str]:
        mlp = self._traits.mlp
        names = ("ffn_gate", "ffn_up", "ffn_down") if len(mlp) == 3 else ("ffn_up", "ffn_down")
        settings = self._settings
        up, down = "v.blk.0.ffn_up.weight", "v.blk.0.ffn_down.weight"
        # Old files of Qwen2-VL swap the two matrices.
        if (
            len(mlp) == 2
            and up in settings.tensors
            and settings.rows(up) == settings.tower_width != settings.rows(down)
        ):
            names = names[::-1]
        return BLOCK | {name: f"mlp.{known}" for name, known in zip(names, mlp, strict=True)}

    def _in_deepstack(self, name: str) -> str:
        for number, (_, prefix) in enumerate(self._settings.deepstack):
            if name.startswith(f"{prefix}."):
                rest = re.sub(r"^fc", "linear_fc", name.removeprefix(f"{prefix}."))
                return f"deepstack_merger_list.{number}.{rest}"
        raise ValueError(f"the tensor {name[:80]} is unknown")


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _has_values(x: torch.Tensor) -> bool:
    """Return False on the meta device, where calculations would import torch's compiler, which takes seconds."""
    return Device(x.device).holds_values


def _minus_one(x: torch.Tensor) -> torch.Tensor:
    return x.float() - 1 if _has_values(x) else x


def _cat(tensors: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    if _has_values(tensors[0]):
        return torch.cat(tensors, dim)
    first, *others = (each.movedim(dim, 0) for each in tensors)
    if any(other.shape[1:] != first.shape[1:] for other in others):
        raise IndexError("the shapes differ")
    length = sum(each.shape[dim] for each in tensors)
    return first.new_empty(length, *first.shape[1:]).movedim(0, dim)


def gguf_tensors(folder: Path) -> GgufTensors:
    """Return the tensors of a model folder for which `gguf_files` isn't empty.

    Raises:
        ModelError: If a file is missing or damaged, or tensors are missing, unknown, or have invalid shapes.
    """
    files = tuple(gguf_files(folder))
    title = gguf_title(folder)
    with reported(title):
        found = copy(_tensors_of(files, tuple(map(FileIdentity.of, files)), title))
    found.unmap()
    return found


@lru_cache(maxsize=4)
def _tensors_of(files: tuple[Path, ...], state: tuple[FileIdentity, ...], title: str) -> GgufTensors:
    return GgufTensors(settings_of(files, title, vocabulary=False))

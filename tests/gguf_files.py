"""Write the files of a model folder as GGUF files, as llama.cpp's and Ollama's converters do.

This is written independently of evoprune's reader.
"""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ALIGNMENT = 32
KINDS = {"F32": 0, "F16": 1, "BF16": 30, "Q8_0": 8}
ARCHITECTURES = {
    "qwen2_vl": "qwen2vl", "qwen2_5_vl": "qwen2vl", "qwen3_vl": "qwen3vl", "qwen3_vl_moe": "qwen3vlmoe",
    "qwen3_5": "qwen35", "qwen3_5_moe": "qwen35moe",
}  # fmt: skip


def string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def value(given, typed=True):
    """Return a metadata value with its type."""
    if isinstance(given, bool):
        kind, data = 7, struct.pack("<?", given)
    elif isinstance(given, int):
        kind, data = 4, struct.pack("<I", given)
    elif isinstance(given, float):
        kind, data = 6, struct.pack("<f", given)
    elif isinstance(given, list):
        kind = 9
        inner = value(given[0])[:4] if given else struct.pack("<I", 4)
        data = inner + struct.pack("<Q", len(given)) + b"".join(value(each)[4:] for each in given)
    else:
        kind, data = 8, string(given)
    return struct.pack("<I", kind) + data


def stored(tensor, kind):
    """Return the bytes of a tensor. A tensor that does not consist of whole blocks is stored as F16, as in llama.cpp."""
    tensor = tensor.float().contiguous()
    if tensor.ndim < 2:
        kind = "F32"
    if kind == "Q8_0" and tensor.shape[-1] % 32:
        kind = "F16"
    if kind == "F32":
        return kind, tensor.numpy().tobytes()
    if kind == "F16":
        return kind, tensor.half().numpy().tobytes()
    if kind == "BF16":
        return kind, tensor.bfloat16().view(torch.uint16).numpy().tobytes()
    blocks = tensor.numpy().reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    codes = np.round(blocks / np.maximum(scale, 1e-30)).astype(np.int8)
    return kind, np.concatenate([scale.astype(np.float16).view(np.uint8), codes.view(np.uint8)], 1).tobytes()


def write_gguf(path, fields, tensors, kind="F32"):
    """Write a GGUF file. `kind` is the type of all matrices, or a function that returns it for a name."""
    infos, data = b"", b""
    for name, tensor in tensors.items():
        chosen, content = stored(tensor, kind(name) if callable(kind) else kind)
        shape = tensor.shape[::-1]
        data += b"\0" * (-len(data) % ALIGNMENT)
        infos += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, KINDS[chosen], len(data))
        data += content
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    head += b"".join(string(key) + value(each) for key, each in fields.items()) + infos
    Path(path).write_bytes(head + b"\0" * (-len(head) % ALIGNMENT) + data)
    return Path(path)


def weights_of(folder):
    """Return a folder's tensors, with the names of current checkpoints."""
    tensors = {}
    for name, tensor in load_file(Path(folder) / "model.safetensors").items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
            name = name.replace("model.", "model.language_model.", 1)
        tensors[name] = tensor
    return tensors


class Folder:
    """The contents of a model folder."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = json.loads((self.folder / "config.json").read_text())
        self.family = self.config["model_type"]
        self.architecture = ARCHITECTURES[self.family]
        self.text = self.config.get("text_config", self.config)
        self.vision = self.config["vision_config"]
        self.tensors = weights_of(folder)

    def text_fields(self, architecture=None):
        text = self.text
        head = text.get("head_dim")
        rope = text.get("rope_parameters") or text["rope_scaling"]
        arch = architecture or self.architecture
        fields = {
            "block_count": text["num_hidden_layers"] + text.get("mtp_num_hidden_layers", 0),
            "context_length": text["max_position_embeddings"],
            "embedding_length": text["hidden_size"],
            "attention.head_count": text["num_attention_heads"],
            "attention.head_count_kv": text["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": text["rms_norm_eps"],
            "rope.freq_base": float(rope["rope_theta"]),
            "rope.dimension_sections": [*rope["mrope_section"], 0],
        }
        if text.get("intermediate_size"):
            fields["feed_forward_length"] = text["intermediate_size"]
        if head:
            fields |= {"attention.key_length": head, "attention.value_length": head}
        if "num_experts" in text or "num_local_experts" in text:
            fields |= {
                "expert_count": text.get("num_experts") or text["num_local_experts"],
                "expert_used_count": text["num_experts_per_tok"],
                "expert_feed_forward_length": text["moe_intermediate_size"],
            }
        if "shared_expert_intermediate_size" in text:
            fields["expert_shared_feed_forward_length"] = text["shared_expert_intermediate_size"]
        if text.get("mtp_num_hidden_layers"):
            fields["nextn_predict_layers"] = text["mtp_num_hidden_layers"]
        if "linear_num_key_heads" in text:
            fields |= {
                "rope.dimension_count": int(head * rope["partial_rotary_factor"]),
                "ssm.conv_kernel": text["linear_conv_kernel_dim"],
                "ssm.state_size": text["linear_key_head_dim"],
                "ssm.group_count": text["linear_num_key_heads"],
                "ssm.time_step_rank": text["linear_num_value_heads"],
                "ssm.inner_size": text["linear_value_head_dim"] * text["linear_num_value_heads"],
                "full_attention_interval": 4,  # as in llama.cpp: a default that the tensors contradict
            }
        return {"general.architecture": arch, "general.name": "Tiny", "general.alignment": ALIGNMENT} | {
            f"{arch}.{name}": each for name, each in fields.items()
        }

    def tokenizer_fields(self, pre=None, padded=0):
        tokenizer = json.loads((self.folder / "tokenizer.json").read_text())
        vocab = dict(tokenizer["model"]["vocab"])
        kinds = dict.fromkeys(vocab.values(), 1)
        for added in tokenizer["added_tokens"]:
            vocab[added["content"]] = added["id"]
            looks = added["content"].startswith("<|") and added["content"].endswith("|>")
            kinds[added["id"]] = 3 if added["special"] or looks else 4
        tokens = {number: token for token, number in vocab.items()}
        size = max(tokens) + 1 + padded
        merges = [each if isinstance(each, str) else " ".join(each) for each in tokenizer["model"]["merges"]]
        named = json.loads((self.folder / "tokenizer_config.json").read_text())
        template = self.folder / "chat_template.jinja"
        return {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or ("qwen35" if "3_5" in self.family else "qwen2"),
            "tokenizer.ggml.tokens": [tokens.get(number, f"[PAD{number}]") for number in range(size)],
            "tokenizer.ggml.token_type": [kinds.get(number, 5) for number in range(size)],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.eos_token_id": vocab[named["eos_token"]],
            "tokenizer.ggml.padding_token_id": vocab[named["pad_token"]],
            "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": template.read_text() if template.is_file() else named["chat_template"],
        }

    def projector_fields(self):
        vision = self.vision
        kind = {"qwen2_vl": "qwen2vl_merger", "qwen2_5_vl": "qwen2.5vl_merger"}.get(self.family, "qwen3vl_merger")
        processor = json.loads((self.folder / "preprocessor_config.json").read_text())
        fields = {
            "projection_dim": self.text["hidden_size"],
            "patch_size": vision["patch_size"],
            "embedding_length": vision.get("embed_dim") or vision["hidden_size"],
            "feed_forward_length": vision.get("intermediate_size") or 0,
            "block_count": vision["depth"],
            "attention.head_count": vision["num_heads"],
            "image_mean": processor["image_mean"],
            "image_std": processor["image_std"],
            "spatial_merge_size": vision["spatial_merge_size"],
        }
        if "fullatt_block_indexes" in vision:
            fields["n_wa_pattern"] = vision["fullatt_block_indexes"][0] + 1
        own = {"general.architecture": "clip", "clip.has_vision_encoder": True, "clip.projector_type": kind}
        return own | {f"clip.vision.{name}": each for name, each in fields.items()}

    def tiled(self, tensor, dim, size=1, start=0):
        """Return the value heads of a Gated DeltaNet tiled over the key heads instead of grouped by them."""
        keys = self.text["linear_num_key_heads"]
        each = self.text["linear_num_value_heads"] // keys
        first, heads = tensor.split([start, tensor.shape[dim] - start], dim)
        shape = heads.shape
        heads = heads.unflatten(dim, (keys, each, size)).transpose(dim, dim + 1).reshape(shape)
        return torch.cat([first, heads], dim)

    def text_tensors(self, reordered=True, fused=False):
        found = {}
        new = "linear_num_key_heads" in self.text
        plain = {
            "input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm" if new else "ffn_norm",
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
            "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
            "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
            "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
            "linear_attn.in_proj_qkv": "attn_qkv", "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha",
            "linear_attn.in_proj_b": "ssm_beta", "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm",
            "linear_attn.out_proj": "ssm_out", "eh_proj": "nextn.eh_proj", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm",
            "shared_head.norm": "nextn.shared_head_norm",
        }  # fmt: skip
        for name, tensor in self.tensors.items():
            tensor = tensor.float()
            if name.startswith("model.visual."):
                continue
            if name == "lm_head.weight":
                found["output.weight"] = tensor
                continue
            rest = self._of_mtp(name) or name.removeprefix("model.language_model.")
            if new and rest.endswith("norm.weight") and "linear_attn" not in rest:
                tensor = tensor + 1
            if not rest.startswith("layers."):
                found[{"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[rest]] = tensor
                continue
            _, layer, rest = rest.split(".", 2)
            if new and rest.startswith("linear_attn."):
                tensor = self._delta_net(rest.removeprefix("linear_attn."), tensor, reordered)
            block = f"blk.{layer}."
            if rest.endswith("experts.gate_up_proj"):
                tensor = tensor.transpose(1, 2) if self.family == "qwen3_vl_moe" else tensor
                gate, up = tensor.chunk(2, 1)
                found |= {f"{block}ffn_gate_exps.weight": gate, f"{block}ffn_up_exps.weight": up}
            elif rest.endswith("experts.down_proj"):
                tensor = tensor.transpose(1, 2) if self.family == "qwen3_vl_moe" else tensor
                found[f"{block}ffn_down_exps.weight"] = tensor
            elif rest == "linear_attn.A_log":
                found[f"{block}ssm_a"] = tensor
            elif rest == "linear_attn.dt_bias":
                found[f"{block}ssm_dt.bias"] = tensor
            elif rest.startswith("mlp.experts."):
                _, _, number, matrix, _ = rest.split(".")
                key = f"{block}ffn_{matrix.removesuffix('_proj')}_exps.weight"
                found.setdefault(key, {})[int(number)] = tensor
            else:
                base, _, part = rest.rpartition(".")
                found[f"{block}{plain[base]}.{part}"] = tensor
        found = {
            name: torch.stack([each[number] for number in sorted(each)]) if isinstance(each, dict) else each
            for name, each in found.items()
        }
        if fused:
            keys = self.text["linear_num_key_heads"]
            for name in [each for each in found if each.endswith("ssm_beta.weight")]:
                pair = [found.pop(each).unflatten(0, (keys, -1)) for each in (name, name.replace("beta", "alpha"))]
                found[name.replace("beta", "ba")] = torch.cat(pair, 1).flatten(0, 1)
        return found

    def _of_mtp(self, name):
        """Return the name of a tensor for multi-token prediction inside an additional layer, or None for another tensor."""
        if not name.startswith("mtp."):
            return None
        names = {
            "fc": "eh_proj",
            "pre_fc_norm_embedding": "enorm",
            "pre_fc_norm_hidden": "hnorm",
            "norm": "shared_head.norm",
        }
        base, _, part = name.removeprefix("mtp.").rpartition(".")
        inside = names.get(base) or base.removeprefix("layers.0.")
        return f"layers.{self.text['num_hidden_layers']}.{inside}.{part}"

    def _delta_net(self, name, tensor, reordered):
        size = self.text["linear_value_head_dim"]
        start = 2 * self.text["linear_num_key_heads"] * self.text["linear_key_head_dim"]
        if name == "conv1d.weight":
            tensor = tensor[:, 0]
        if name == "A_log":
            tensor = -torch.exp(tensor)
        if not reordered:
            return tensor
        places = {
            "in_proj_qkv.weight": (0, size, start), "conv1d.weight": (0, size, start), "in_proj_z.weight": (0, size),
            "out_proj.weight": (1, size), "in_proj_a.weight": (0,), "in_proj_b.weight": (0,), "A_log": (0,), "dt_bias": (0,),
        }  # fmt: skip
        return self.tiled(tensor, *places[name]) if name in places else tensor

    def projector_tensors(self):
        found = {}
        blocks = {
            "attn.qkv": "attn_qkv",
            "attn.proj": "attn_out",
            "norm1": "ln1",
            "norm2": "ln2",
            "mlp.gate_proj": "ffn_gate",
        }
        blocks |= dict.fromkeys(("mlp.fc1", "mlp.up_proj", "mlp.linear_fc1"), "ffn_up")
        blocks |= dict.fromkeys(("mlp.fc2", "mlp.down_proj", "mlp.linear_fc2"), "ffn_down")
        merger = {"ln_q": "v.post_ln", "norm": "v.post_ln", "mlp.0": "mm.0", "linear_fc1": "mm.0", "mlp.2": "mm.2"}
        merger |= {"linear_fc2": "mm.2"}
        for name, tensor in self.tensors.items():
            tensor = tensor.float()
            if not name.startswith("model.visual."):
                continue
            rest = name.removeprefix("model.visual.")
            base, _, part = rest.rpartition(".")
            if rest == "patch_embed.proj.weight":
                found |= {"v.patch_embd.weight": tensor[:, :, 0], "v.patch_embd.weight.1": tensor[:, :, 1]}
            elif rest == "patch_embed.proj.bias":
                found["v.patch_embd.bias"] = tensor
            elif rest == "pos_embed.weight":
                found["v.position_embd.weight"] = tensor
            elif base.startswith("merger."):
                found[f"{merger[base.removeprefix('merger.')]}.{part}"] = tensor
            elif base.startswith("deepstack_merger_list."):
                _, number, inner = base.split(".", 2)
                layer = self.vision["deepstack_visual_indexes"][int(number)]
                found[f"v.deepstack.{layer}.{inner.removeprefix('linear_')}.{part}"] = tensor
            else:
                _, layer, inner = base.split(".", 2)
                block = f"v.blk.{layer}."
                if inner == "attn.qkv" and self.family in ("qwen2_vl", "qwen2_5_vl"):
                    parts = zip("qkv", tensor.chunk(3), strict=True)
                    found |= {f"{block}attn_{each}.{part}": piece for each, piece in parts}
                else:
                    found[f"{block}{blocks[inner]}.{part}"] = tensor
        return found

    def write_pair(self, folder, kind="F32", name="tiny", tower=None, text=None):
        """Write a text file and a projector. Returns the text file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(folder / f"mmproj-{name}-f16.gguf", self.projector_fields(), self.projector_tensors(), tower or kind)
        fields = self.text_fields() | self.tokenizer_fields() | (text or {})
        fields = {key: each for key, each in fields.items() if each is not None}
        return write_gguf(
            folder / f"{name}-{kind if isinstance(kind, str) else 'mixed'}.gguf", fields, self.text_tensors(), kind
        )

    def write_parts(self, folder, count=3):
        """Write the text file in several parts, and a projector. Returns the first part."""
        first = self.write_pair(folder)
        first.unlink()
        tensors = list(self.text_tensors().items())
        step = -(-len(tensors) // count)
        paths = [Path(folder) / f"tiny-F32-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
        for number, path in enumerate(paths):
            split = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
            fields = split if number else self.text_fields() | self.tokenizer_fields() | split
            write_gguf(path, fields, dict(tensors[number * step : (number + 1) * step]))
        return paths[0]

    def single_fields(self, reordered=True):
        """Return the metadata of Ollama's single files."""
        arch = {"qwen2_5_vl": "qwen25vl"}.get(self.family, self.architecture)
        fields = self.text_fields(arch) | self.tokenizer_fields()
        sections = fields.pop(f"{arch}.rope.dimension_sections")
        if arch == "qwen25vl":
            fields["qwen25vl.rope.mrope_section"] = sections[:3]
        if "qwen3" in arch:  # published models have heads of another size, for which Ollama's files leave it out
            fields[f"{arch}.mrope_sections"] = sections[:3]
        if "qwen35" in arch:
            kinds = self.text["layer_types"]
            keys = fields[f"{arch}.attention.head_count_kv"]
            fields[f"{arch}.attention.head_count_kv"] = [keys if kind == "full_attention" else 0 for kind in kinds]
            fields[f"{arch}.ssm.v_head_reordered"] = reordered
        vision = self.vision
        own = {
            name.removeprefix("clip.vision."): each
            for name, each in self.projector_fields().items()
            if ".vision." in name
        }
        for name in ("projection_dim", "feed_forward_length", "n_wa_pattern"):
            own.pop(name, None)
        if arch == "qwen25vl":
            own |= {"window_size": vision["window_size"], "fullatt_block_indexes": vision["fullatt_block_indexes"]}
        else:
            own["deepstack_visual_indexes"] = vision.get("deepstack_visual_indexes", [])
            own |= {"shortest_edge": 65536, "longest_edge": 16777216}
        ends = [self.text["eos_token_id"], fields["tokenizer.ggml.padding_token_id"]]
        return (
            fields
            | {f"{arch}.vision.{name}": each for name, each in own.items()}
            | {"tokenizer.ggml.eos_token_ids": ends}
        )

    def single_tensors(self, reordered=True, fused=False):
        """Return the tensors of Ollama's single files."""
        text = self.text_tensors(reordered, fused)
        found = {name.replace("ssm_dt.bias", "ssm_dt"): each for name, each in text.items()}
        tower = self.projector_tensors()
        if self.family == "qwen2_5_vl":
            names = {"v.patch_embd.weight.1": "v.patch_embd_1.weight", "v.patch_embd.weight": "v.patch_embd_0.weight"}
            merger = {"v.post_ln": "v.merger.ln_q", "mm.0": "v.merger.mlp.0", "mm.2": "v.merger.mlp.2"}
            for name, tensor in tower.items():
                base, _, part = name.rpartition(".")
                found[names.get(name) or f"{merger.get(base, base)}.{part}"] = tensor
            return found
        patch = self.tensors["model.visual.patch_embed.proj.weight"].float()
        found["v.patch_embed.weight"] = patch.flatten(0, 1)
        for name, tensor in self.tensors.items():
            if not name.startswith("model.visual.") or name == "model.visual.patch_embed.proj.weight":
                continue
            rest = (
                name.removeprefix("model.visual.").replace("patch_embed.proj", "patch_embed").replace("blocks.", "blk.")
            )
            rest = rest.replace("deepstack_merger_list", "deepstack_merger").replace("attn.proj", "attn_out")
            if "attn.qkv" in rest:
                for each, piece in zip("qkv", tensor.float().chunk(3), strict=True):
                    found["v." + rest.replace("attn.qkv", f"attn_{each}")] = piece
            else:
                found[f"v.{rest}"] = tensor.float()
        return found

    def write_single(self, path, reordered=True, fused=False, more=None, kind="F32"):
        tensors = self.single_tensors(reordered, fused) | (more or {})
        return write_gguf(path, self.single_fields(reordered), tensors, kind)


def add_to_ollama(store, name, files, tag="latest", owner="library", host="registry.ollama.ai"):
    """Add files to an Ollama store, the text file first. Returns the manifest."""
    store = Path(store)
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    layers = []
    for kind, file in zip(("model", "projector"), files, strict=False):
        content = Path(file).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        (store / "blobs" / f"sha256-{digest}").write_bytes(content)
        layers.append(
            {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}
        )
    layers.append({"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}", "size": 3})
    manifest = store / "manifests" / host / owner / name / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": layers}))
    return manifest

"""Write a small model of each family, with random weights whose rows consist of whole blocks of every quantized type."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from evoprune.bundled import DEMOS
from evoprune.model import FAMILIES
from experiments.speed.checkpoint import SPECIAL_TOKENS

# The families that llama.cpp's converter supports, with the number of layers of the language model.
LAYERS = {"qwen2_vl": 3, "qwen2_5_vl": 3, "qwen3_vl": 4, "qwen3_vl_moe": 4, "qwen3_5": 4, "qwen3_5_moe": 4}
WIDE = 256  # the number of values in the largest blocks
HEAD = 64
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 2 * WIDE}
DELTA_NET = {
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": HEAD,
    "linear_value_head_dim": HEAD,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mtp_num_hidden_layers": 0,
}
TOWER = {"depth": 4, "num_heads": 4, "out_hidden_size": WIDE, "spatial_merge_size": 2, "temporal_patch_size": 2}


def words_of(family: str) -> str:
    """Return the name of a family's pre-tokenizer in GGUF files."""
    return "qwen35" if family.startswith("qwen3_5") else "qwen2"


def write_model(folder: Path, family: str) -> None:
    """Write a model of a family in float32, with its tokenizer and settings, to a new folder."""
    from transformers import AutoModelForImageTextToText

    folder.mkdir(parents=True)
    vocabulary = _write_tokenizer(folder, family)
    model = AutoModelForImageTextToText.from_config(_config(family, vocabulary), dtype=torch.float32)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            _fill(name, weight, random)
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    traits = FAMILIES[family]
    picture = {name: value for name, value in traits.picture.items() if name.endswith("_pixels")}
    half, clip = ([0.5] * 3, [0.5] * 3), ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    mean, std = half if traits.head_norms else clip
    patch = 16 if traits.head_norms else 14
    settings = picture | {"image_mean": mean, "image_std": std, "patch_size": patch, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"temporal_patch_size": 2}))
    ends = [vocabulary[f"<|{name}|>"] for name in ("im_end", "endoftext")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))


def _transpose_experts(file: Path) -> None:
    """Store experts like the published checkpoints, which transformers transposes when it loads them."""
    tensors = load_file(file)
    experts = {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name}
    save_file(tensors | experts, file, {"format": "pt"})


def _fill(name: str, weight: torch.Tensor, random: torch.Generator) -> None:
    """Fill a weight with random values large enough that the logits depend on the whole prompt."""
    if name.endswith("A_log"):
        weight.uniform_(1, 16, generator=random).log_()
    elif weight.ndim > 1:
        embeds = "embed" in name and "patch" not in name
        weight.normal_(0, 1.0 if embeds else weight[0].numel() ** -0.5, generator=random)
    elif name.endswith("bias"):
        weight.normal_(0, 0.1, generator=random)
    else:  # norms
        weight += torch.empty_like(weight).uniform_(-0.3, 0.3, generator=random)


def _config(family: str, vocabulary: dict[str, int]):
    from transformers import AutoConfig

    newer = FAMILIES[family].head_norms
    text: dict[str, Any] = {
        "vocab_size": len(vocabulary), "hidden_size": WIDE, "intermediate_size": 2 * WIDE, "num_hidden_layers": LAYERS[family],
        "num_attention_heads": WIDE // HEAD, "num_key_value_heads": 2, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6,
        "eos_token_id": vocabulary["<|im_end|>"], "bos_token_id": vocabulary["<|endoftext|>"],
    }  # fmt: skip
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    tower = TOWER | {"hidden_size": WIDE, "intermediate_size": 2 * WIDE, "patch_size": 14}
    if newer:
        text["head_dim"] = HEAD
        rope |= {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
        tower |= {"patch_size": 16, "num_position_embeddings": 100, "hidden_act": "gelu_pytorch_tanh"}
    if family == "qwen2_vl":
        tower = TOWER | {"embed_dim": WIDE, "hidden_size": WIDE, "mlp_ratio": 2, "patch_size": 14}
        del tower["out_hidden_size"]
    elif family == "qwen2_5_vl":
        tower |= {"window_size": 112, "fullatt_block_indexes": [1, 3], "tokens_per_second": 2}
    elif family.startswith("qwen3_vl"):
        tower["deepstack_visual_indexes"] = [0, 1, 2]
    else:
        text |= DELTA_NET
        rope |= {"partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]}
    if family.endswith("moe"):
        text |= EXPERTS
        text |= {"shared_expert_intermediate_size": WIDE} if family == "qwen3_5_moe" else {"mlp_only_layers": []}
    tokens = {
        name: vocabulary[f"<|{name.removesuffix('_token_id')}|>"]
        for name in ("vision_start_token_id", "vision_end_token_id")
    }
    tokens |= {"image_token_id": vocabulary["<|image_pad|>"], "video_token_id": vocabulary["<|video_pad|>"]}
    return AutoConfig.for_model(family, text_config=text | {"rope_parameters": rope}, vision_config=tower, **tokens)


def _write_tokenizer(folder: Path, family: str) -> dict[str, int]:
    """Write a tokenizer with the demo's words, and return the IDs of all tokens."""
    demo = DEMOS["demo"].folder
    tokenizer = json.loads((demo / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in tokenizer["added_tokens"]}
    words = [word for word in tokenizer["model"]["vocab"] if word not in special]
    vocabulary = {word: number for number, word in enumerate(words)}
    names = [f"<|{name}|>" for name in SPECIAL_TOKENS]
    plain = ["<think>", "</think>", "<|fim_prefix|>"]  # added tokens that are not special
    added = {name: len(words) + number for number, name in enumerate([*names, *plain])}
    like = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [
        like | {"id": number, "content": name, "special": name in names} for name, number in added.items()
    ]
    tokenizer["model"]["vocab"] = vocabulary
    (split, _) = tokenizer["pre_tokenizer"]["pretokenizers"]
    if words_of(family) == "qwen35":  # words also contain combining marks
        words_pattern = (
            split["pattern"]["Regex"].replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"\s\p{L}", r"\s\p{L}\p{M}")
        )
        split["pattern"] = {"Regex": words_pattern}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    config = json.loads((demo / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": names[1:]}))
    template = (demo / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return vocabulary | added

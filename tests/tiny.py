"""Tiny models for all families: seeded random weights, byte-level tokenizer, the hub's file layout."""

import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from evoprune.model import FAMILIES, Config, QwenVL
from evoprune.video import InputLimits
from evoprune.vision import Encoded

_NAMES = (
    "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end "
    "vision_start vision_end vision_pad image_pad video_pad"
)
# Families whose language model evoprune runs itself.
NATIVE = [family for family, traits in FAMILIES.items() if traits.native]
SPECIAL_TOKENS = [f"<|{name}|>" for name in _NAMES.split()]

CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{{ '<|vision_start|><|' + part.type + '_pad|><|vision_end|>' if part.type in ('video', 'image') else part.text }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

_WORDS = """system user assistant You are a helpful assistant. What happens after the man opens the door?
How many red squares are there in the video? Which one moves to the left, and when does it stop?
The green circle stays in the middle. Yes. No. One, two, three, four. Das größte Rad dreht sich, 你好世界."""


@cache
def tiny_tokenizer():
    """Return a byte-level BPE tokenizer with a few merges and Qwen's special tokens. It is shared, so tests must not change it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(
        [_WORDS], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
QWEN2_5_VISION = PATCHES | {
    **{"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64},
    **{"window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
}
QWEN2_VISION = PATCHES | {"depth": 2, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 4}
QWEN3_VISION = PATCHES | {
    **{"depth": 6, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16},
    **{"num_position_embeddings": 25, "deepstack_visual_indexes": [1, 2, 4]},
}
# The heads are wider than hidden size / heads, and there is one layer more than DeepStack adds to.
QWEN3_TEXT = {"num_hidden_layers": 4, "head_dim": 24}
# Two Gated DeltaNet layers before each attention layer. The rotary embedding covers half of an attention head.
QWEN3_5_TEXT = {
    "num_hidden_layers": 6,
    "head_dim": 24,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
QWEN4_TEXT = {
    "output_gate_type": "sigmoid",
    **{"hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [2], "ple_embed_dim": 32, "ple_conv_kernel_size": 3},
    **{"ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 31, "make_ngram_vocab_size_divisible_by": 8},
    # Fewer columns than tests read, so that the indexers have to select.
    **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64},
    **{"indexer_compress_ratio": 4, "split_ngram_parts": 4},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 48}


# Maps a family that transformers does not have yet to the family whose transformers classes compute the same. With an entry here, a
# tiny model of the family can be written, and is compared with these classes.
STAND_INS: dict[str, str] = {}


@cache
def _register(family: str, stand_in: str) -> None:
    """Add a family to transformers. Its classes are subclasses of the classes of `stand_in`."""
    from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    def subclass(kind: type, **attributes) -> type:
        return type(f"{kind.__name__}_{family}", (kind,), attributes)

    def renamed(kind: type, **attributes) -> type:
        return subclass(kind, model_type=kind.model_type.replace(stand_in, family), **attributes)

    theirs = CONFIG_MAPPING[stand_in]
    parts = {name: renamed(kind) for name, kind in theirs.sub_configs.items()}
    config = renamed(theirs, sub_configs=parts, sub_configs_defaults=parts)
    for each in (config, *parts.values()):
        AutoConfig.register(each.model_type, each)
    for name, part in parts.items():
        AutoModel.register(part, subclass(MODEL_MAPPING[theirs.sub_configs[name]], config_class=part))
    whole = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[theirs]
    AutoModelForImageTextToText.register(config, subclass(whole, config_class=config))


def register_stand_in(family: str) -> None:
    """Make transformers know a family in `STAND_INS`. Does nothing for families that it has."""
    from transformers import CONFIG_MAPPING

    if family in STAND_INS:
        _register(family, STAND_INS[family])
    assert family in CONFIG_MAPPING, f"transformers has no {family}: add a family that computes the same to STAND_INS"


def _tiny_vision(traits) -> dict:
    """Return the tiny tower of a family, as far as its values differ from the defaults."""
    vision = QWEN2_VISION if traits.embed_dim else QWEN2_5_VISION if traits.windows else QWEN3_VISION
    vision = vision | {"patch_size": traits.vision.get("patch_size", PATCHES["patch_size"])}
    if "deepstack_visual_indexes" not in traits.vision:
        vision.pop("deepstack_visual_indexes", None)
    return vision


def _tiny_text(traits) -> dict:
    """Return the tiny language model of a family, as far as its values differ from the defaults."""
    if not traits.head_norms:
        return {}
    text = dict(QWEN3_5_TEXT if "full_attention_interval" in traits.text else QWEN3_TEXT)
    if "num_experts" in traits.text:
        text |= EXPERTS
        shared = "shared_expert_intermediate_size" in traits.text
        text |= SHARED_EXPERT if shared else {"mlp_only_layers": [1]}
    if "hc_count" in traits.text:
        text |= QWEN4_TEXT
    return text


def tiny_config(family: str = "qwen2_5_vl", heads: int = 4):
    """Return a config with two language layers and two vision layers, hidden size 64 and head dimension 16.

    Qwen2.5-VL gets both window and full attention. Later families have a few more layers. With two heads, the head dimension of the
    language model is 32, the smallest that vLLM has kernels for.
    """
    from transformers import AutoConfig

    register_stand_in(family)
    traits = FAMILIES[family]
    vision = _tiny_vision(traits)
    text = _tiny_text(traits)
    rope = {"mrope_section": [8 // heads, 12 // heads, 12 // heads]}
    if traits.head_norms:
        half = text["head_dim"] // 2
        rope = {"mrope_section": [half // 2, half // 4, half // 4], "mrope_interleaved": True}
    if "layer_types" in text:
        part = text["head_dim"] // 4
        rope["mrope_section"] = [part - part // 3 * 2, part // 3, part // 3]
        rope["partial_rotary_factor"] = 0.5
    tokenizer = tiny_tokenizer()
    special = tokenizer.convert_tokens_to_ids
    return AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **rope},
            "bos_token_id": special("<|endoftext|>"),
            "eos_token_id": special("<|im_end|>"),
            **text,
        },
        vision_config=vision,
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )


def tiny_model(seed: int = 0, family: str = "qwen2_5_vl", heads: int = 4):
    """Return a random float32 model in eval mode with sdpa. Large weights make its logits depend on the input."""
    from transformers import AutoModelForImageTextToText

    how = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    model = AutoModelForImageTextToText.from_config(tiny_config(family, heads), **how).eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                wide = 1.0 if "embed" in name and "patch" not in name else weight[0].numel() ** -0.5
                weight.normal_(0, wide, generator=random)
            elif name.endswith("bias"):
                weight.normal_(0, 0.1, generator=random)
            elif name.endswith("A_log"):  # decay rates of the DeltaNet heads
                weight.uniform_(1, 16, generator=random).log_()
    return model


def native_model(seed: int = 0, family: str = "qwen2_5_vl") -> QwenVL:
    """Return the same model as `tiny_model`, as loaded by evoprune itself."""
    host = tiny_model(seed, family)
    model = QwenVL.empty(Config.parse(host.config.to_dict()))
    model.load_state_dict(host.state_dict(), assign=True)
    model.tie()
    return model.requires_grad_(False)


def add_mtp(folder: Path, seed: int = 0) -> None:
    """Add random weights of a layer for multi-token prediction to a folder of `save_tiny`, as published checkpoints have them."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["text_config"] |= {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
    file.write_text(json.dumps(content))
    random = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, like in QwenVL.empty(Config.parse(content)).state_dict().items():
        if name.startswith("mtp."):
            wide = 0.3 if like.ndim == 1 else like.shape[-1] ** -0.5  # norms multiply by the weight + 1
            tensors[name] = torch.randn(like.shape, generator=random) * wide
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_tiny(folder: str | Path, seed: int = 0, family: str = "qwen2_5_vl", heads: int = 4, mtp: bool = False) -> Path:
    """Save model, tokenizer and processor settings in the layout of a hub repository. Returns the folder."""
    folder = Path(folder)
    tiny_model(seed, family, heads).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    traits = FAMILIES[family]
    values = asdict(InputLimits(**traits.video))
    normal = {name: list(values[name]) for name in ("image_mean", "image_std")}
    patch = traits.vision.get("patch_size", PATCHES["patch_size"])
    size = {"shortest_edge": 12544, "longest_edge": 50176}
    if values["of_all_frames"]:  # the size limits apply to all frames of a video together
        size = {"shortest_edge": 4096, "longest_edge": 12 * 50176}
    for name, content in {
        "generation_config.json": {"eos_token_id": ends, "do_sample": True, "temperature": 1e-6},
        "preprocessor_config.json": normal | {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": patch},
        "video_preprocessor_config.json": normal | {"size": size, "fps": 2.0, "min_frames": 2, "max_frames": 32},
    }.items():
        (folder / name).write_text(json.dumps(content))
    if mtp:
        add_mtp(folder)
    return folder


def encoded_tokens(features, kept, size=None, deepstack=None, grid=None) -> Encoded:
    """Return tokens as the encoder would for units without rows. `grid`: (T, H, W), by default one row of units."""
    kept = torch.as_tensor(kept)
    grid = grid or (1, 1, int(kept.max()) + 1)
    nothing = torch.full((math.prod(grid),), -1)
    return Encoded(features, kept, features[:0], nothing, (grid,), [], 0.0, size=size, deepstack=deepstack)

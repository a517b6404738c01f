"""Build the untrained demo model: architecture, tokenizer, and initial weights. Imported by `train`."""

import json
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from experiments.demo.clips import make_clip
from experiments.demo.lessons import ask_all

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>",
    "<|video_pad|>",
]  # fmt: skip
BEFORE_VIDEO = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
AFTER_QUESTION = "<|im_end|>\n<|im_start|>assistant\n"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 1024


def build_config():
    """Return a config with the exact architecture of Qwen2.5-VL, but with tiny dimensions."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 8, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 192,
            "fullatt_block_indexes": [1, 3, 5, 7], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [6, 5, 5]},
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        },
        tie_word_embeddings=True, vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip


def shapes_texts() -> Iterator[str]:
    """Yield questions and answers about shapes as training text for the tokenizer."""
    for seed in range(1500):
        for q in ask_all(make_clip("train", seed), np.random.default_rng(seed), 20):
            yield from (q.question, q.answer)


def build_tokenizer(texts: Iterable[str] | None = None):
    """Return a byte-level BPE tokenizer with Qwen's special tokens and pre-tokenizer.

    The tokenizer is trained on `texts` or, if None, on questions and answers about shapes.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX, Qwen2Tokenizer

    raw = Tokenizer(models.BPE())
    raw.normalizer = normalizers.NFC()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    texts = [BEFORE_VIDEO, AFTER_QUESTION, *(shapes_texts() if texts is None else texts)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    state = json.loads(raw.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in state["merges"]],
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIALS[1:],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def init_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Initialize weights with standard deviation 1/sqrt(fan in), or half of that in layers that add to the residual stream."""
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(1.0 if "norm" in name or "ln_q" in name else 0.0)
            continue
        std = p[0].numel() ** -0.5
        if "embed_tokens" in name:
            std = p.shape[1] ** -0.5
        if any(part in name for part in ("attn.proj", "down_proj", "o_proj")):
            std /= 2
        p.data.normal_(0, std, generator=generator)

"""Plain Hugging Face transformers on the same weights: the reference that everything is measured against."""

from dataclasses import asdict

import torch

from evoprune.model.config import QWEN2, QWEN2_5, Config, TextConfig, VisionConfig
from evoprune.model.weights import QwenVL


def hugging_face_config(config: Config):
    """`Qwen2_5_VLConfig` or `Qwen2VLConfig` with the same numbers."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

    of_vision, text = config.vision_config, config.text_config
    vision = {name: value for name, value in _plain(of_vision).items() if name != "family"}
    if of_vision.family == QWEN2:
        vision |= {"embed_dim": of_vision.hidden_size, "hidden_size": of_vision.out_hidden_size}
        vision |= {"mlp_ratio": of_vision.intermediate_size // of_vision.hidden_size}
    rope = {"rope_type": "default"} | text.rope_parameters
    special = {"rope_parameters": rope, "bos_token_id": None, "eos_token_id": text.eos_token_id}
    made_by = {QWEN2_5: Qwen2_5_VLConfig, QWEN2: Qwen2VLConfig}[of_vision.family]
    tied = config.tie_word_embeddings
    return made_by(vision_config=vision, text_config=_plain(text) | special, tie_word_embeddings=tied)


def _plain(config: VisionConfig | TextConfig) -> dict:
    known = {name: value for name, value in asdict(config).items() if value is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}


def hugging_face_model(model: QwenVL):
    """A `Qwen2_5_VLForConditionalGeneration` or `Qwen2VLForConditionalGeneration` under sdpa, on the tensors of `model`."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLForConditionalGeneration

    family = model.config.vision_config.family
    made_by = {QWEN2_5: Qwen2_5_VLForConditionalGeneration, QWEN2: Qwen2VLForConditionalGeneration}[family]
    with torch.device("meta"):
        made = made_by._from_config(hugging_face_config(model.config), dtype=model.dtype, attn_implementation="sdpa")
    made.load_state_dict(model.state_dict(), strict=True, assign=True)
    made.tie_weights()
    # Rotary frequencies follow from the config, and are not part of the weights.
    for parent in list(made.modules()):
        for name, child in parent.named_children():
            if hasattr(child, "inv_freq"):
                # The tower's module has no config before transformers 5.17.
                given = (child.config,) if hasattr(child, "config") else (child.dim, child.theta)
                with model.device:
                    setattr(parent, name, type(child)(*given))
    return made.eval().requires_grad_(False)

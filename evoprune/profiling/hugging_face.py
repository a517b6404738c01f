"""Plain Hugging Face transformers on the same weights: the reference that everything is measured against."""

import torch

from evoprune.model.config import Config, as_written
from evoprune.model.weights import QwenVL


def hugging_face_config(config: Config):
    """The config of transformers with the same numbers, of the class for this family."""
    from transformers import AutoConfig

    content = as_written(config)
    content["text_config"] |= {"bos_token_id": None, "eos_token_id": config.text_config.eos_token_id}
    return AutoConfig.for_model(**content)


def hugging_face_model(model: QwenVL):
    """The model of transformers for this family (`Qwen3VLForConditionalGeneration`, ...) under sdpa, on the tensors of `model`."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        how = {"dtype": model.dtype, "attn_implementation": "sdpa"}
        made = AutoModelForImageTextToText.from_config(hugging_face_config(model.config), **how)
    # Those that are a part of a padded matrix as a user has them.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    made.load_state_dict(weights, strict=True, assign=True)
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

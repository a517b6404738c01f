"""Plain Hugging Face transformers on the same weights: the reference that everything is measured against."""

from importlib.util import find_spec
from pathlib import Path

import torch

from evoprune.backend.devices import is_host
from evoprune.model.config import Config, as_written
from evoprune.model.weights import QwenVL


def hugging_face_config(config: Config):
    """The config of transformers with the same numbers, of the class for this family."""
    from transformers import AutoConfig

    content = as_written(config)
    content["text_config"] |= {"bos_token_id": None, "eos_token_id": config.text_config.eos_token_id}
    return AutoConfig.for_model(**content)


def fastest_attention(model: QwenVL) -> str:
    """The fastest attention that transformers has here for this model: flash-attn's where it is installed, else torch's."""
    installed = find_spec("flash_attn") is not None
    return "flash_attention_2" if installed and not is_host(model.device) and model.dtype.itemsize == 2 else "sdpa"


def hugging_face_model(model: QwenVL, attention: str = "sdpa"):
    """The model of transformers for this family (`Qwen3VLForConditionalGeneration`, ...), on the tensors of `model`."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        how = {"dtype": model.dtype, "attn_implementation": attention}
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


def hugging_face_from_files(folder: Path, dtype: torch.dtype, device: torch.device):
    """The model of transformers as it reads a folder, config and weights, by itself; under sdpa."""
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        how = {"local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
        made = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **how)
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return made.to(device).eval().requires_grad_(False)


def share_equal(made, model: QwenVL) -> list[str]:
    """Puts the tensors of `model` in the places of those of a transformers model that are equal to them.

    Returns the names of the others: of all that one of the two has, and the other has otherwise or not at all.
    """
    ours = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(made.named_parameters(remove_duplicate=False))
    differing = sorted(ours.keys() ^ theirs.keys())
    for name in sorted(ours.keys() & theirs.keys()):
        if torch.equal(ours[name], theirs[name]):
            module, _, last = name.rpartition(".")
            made.get_submodule(module).register_parameter(last, ours[name])
        else:
            differing.append(name)
    return differing

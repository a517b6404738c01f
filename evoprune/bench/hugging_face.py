"""Plain Hugging Face transformers models built from evoprune's weights, used as the reference in comparisons."""

import torch

from evoprune.model import Model
from evoprune.session import meta_model


def hugging_face_model(model: Model, attention: str = "sdpa"):
    """Build this family's transformers model, such as `Qwen3VLForConditionalGeneration`, from the tensors of `model`."""
    reference = meta_model(model.config, model.dtype, model.device, attention)
    if not model.native:
        reference.model.visual = model.model.visual
        reference.model.language_model = model.model.language_model
        reference.lm_head = model.lm_head
        return reference.eval()
    # Some weights are views of a padded matrix. They are copied to make them contiguous, as in a plain transformers model.
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    reference.load_state_dict(weights, strict=True, assign=True)
    reference.tie_weights()
    return reference.eval().requires_grad_(False)


def share_equal(made, model: Model) -> list[str]:
    """Make a transformers model share all parameters that are equal in `model`, so that only one copy is kept in memory.

    Returns:
        The names of all parameters that differ or exist in only one of the models.
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

"""Decide which calls to a Hugging Face model can be pruned."""

import torch

from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.methods import arange_on


def unsupported_reason(model, call: dict, generating: bool, optional: bool) -> UsageError | None:
    """Return an error explaining why evoprune cannot run a call with a new prompt and videos, or None if it can.

    Args:
        optional: Whether the model's own code could run the call instead and produce the same result.
    """
    visual = model.model.visual
    given = [call.get(name) for name in ("pixel_values_videos", "pixel_values")]
    if call.get(interface.ENCODED) or given == [None, None]:
        return UsageError(
            f"the inputs in {interface.ENCODED} are already encoded", "pass the processor's pixels instead"
        )
    # Weights require gradients by default, even in eval mode, where gradients are rarely needed. In those rare cases, `backward`
    # raises an error.
    training = visual.training or optional
    traced = any(pixels is not None and pixels.requires_grad for pixels in given)
    if torch.is_grad_enabled() and (traced or (training and trained_weights(visual))):
        return no_gradients()
    ids = call.get("input_ids")
    if ids is None or call.get("inputs_embeds") is not None:
        hint = "pass input_ids, which contain the video's tokens"
        return UsageError("inputs_embeds together with a video cannot be pruned", hint)
    per_column = ("attention_mask", *interface.PER_COLUMN)
    for name in ("input_ids", *per_column, "position_ids", "video_grid_thw", "image_grid_thw"):
        if not isinstance(call.get(name), torch.Tensor | None):
            hint = "call the processor with return_tensors='pt'"
            return UsageError(f"{name} is of class {type(call[name]).__name__}, not a tensor", hint)
    if ids.ndim != 2:
        return UsageError(f"input_ids has shape {list(ids.shape)}, not [prompts, columns]", "pass input_ids[None]")
    for name in (*per_column, "position_ids"):
        # The shape of `position_ids` varies, so compare only the last dimension.
        compared = slice(-1, None) if name == "position_ids" else slice(None)
        if call.get(name) is not None and call[name].shape[compared] != ids.shape[compared]:
            shapes = f"shape {list(call[name].shape)} of {name} does not match {list(ids.shape)} of input_ids"
            return UsageError(shapes, "pass a value for each column of the whole prompt")
    if _has_packed_sequences(call):
        return UsageError("several sequences packed into one row cannot be pruned", "pass them as rows of a batch")
    if generating:
        return None
    shape = ids.shape
    known = {"input_ids", "attention_mask", "position_ids", *interface.PER_COLUMN, *interface.VISION_INPUTS}
    for name, value in call.items():
        per_column = isinstance(value, torch.Tensor) and value.shape[:2] == shape and name not in known
        if per_column or name.startswith("cu_seq_lens"):
            return UsageError(
                f"{name} cannot be combined with a pruned prompt", "leave it out, or remove the pruning first"
            )
    if isinstance(call.get("logits_to_keep"), torch.Tensor):
        return UsageError("logits_to_keep as indices would select wrong columns", "pass a number of last columns, or 0")
    return None


def _has_packed_sequences(call: dict) -> bool:
    """Return True if a batch row contains multiple packed sequences, based on the text indices in `position_ids`."""
    at = call.get("position_ids")
    mask = call.get("attention_mask")
    if at is None or len(at) != 4 or at.ndim != 3 or not (mask is None or mask.all()):
        return False
    return not torch.equal(at[0], arange_on(at.shape[2], at.device).expand_as(at[0]))


def check_follows(call: dict, generating: bool) -> None:
    """Check that a call that continues from a pruned prompt's KV cache contains only text.

    Raises:
        UsageError: If the call has images, or passes embeddings to `generate`.
    """
    if call.get("pixel_values") is not None or (generating and call.get("inputs_embeds") is not None):
        raise UsageError("only text can follow a pruned video in a KV cache", "pass the whole conversation again")


def no_gradients() -> UsageError:
    hint = "to train only the language model: model.model.visual.requires_grad_(False)"
    return UsageError("the vision tower has no gradients while it prunes", hint)


def trained_weights(visual) -> list[torch.Tensor]:
    return [weight for weight in visual.parameters() if weight.requires_grad]
